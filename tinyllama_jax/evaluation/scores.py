"""Scores of the original's tasks: what was published, and a run's own beside it."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyllama_jax.errors import UserError
from tinyllama_jax.files import write_aside

FILE = "results.json"
SOURCE = "TinyLlama's repository, model cards and paper (arXiv 2401.02385)"

TaskScores = Mapping[str, Mapping[str, float]]
"""{task or group: {metric: value}}, a standard error as `<metric>_stderr`."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One task of a suite, as the original scored it."""

    title: str
    task: str
    """lm-eval's name of the task or group."""
    metric: str
    shots: int


@dataclasses.dataclass(frozen=True)
class Published:
    """One row of a published table, in percent; no scores where only the mean is known."""

    model: str
    tokens: str
    scores: tuple[float, ...]
    mean: float | None = None
    """As published: that of step 1431k is not quite that of its scores."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that are shown as one table."""

    columns: tuple[Column, ...]
    published: tuple[Published, ...]
    note: str


SUITES = {
    "commonsense": Suite(
        columns=(
            Column("Hella\nSwag", "hellaswag", "acc_norm", 0),
            Column("OBQA", "openbookqa", "acc_norm", 0),
            Column("WinoG", "winogrande", "acc", 0),
            Column("ARC-c", "arc_challenge", "acc_norm", 0),
            Column("ARC-e", "arc_easy", "acc_norm", 0),
            Column("BoolQ", "boolq", "acc", 0),
            Column("PIQA", "piqa", "acc_norm", 0),
        ),
        published=(
            Published("OPT-1.3B", "", (), 51.44),
            Published(
                "Pythia-1.0B", "300B", (47.16, 31.40, 53.43, 27.05, 48.99, 60.83, 69.21), 48.30
            ),
            Published("Pythia-1.4B", "300B", (), 51.33),
            Published(
                "TinyLlama 50k", "103B", (43.50, 29.80, 53.28, 24.32, 44.91, 59.66, 67.30), 46.11
            ),
            Published("  240k", "503B", (49.56, 31.40, 55.80, 26.54, 48.32, 56.91, 69.42), 48.28),
            Published("  480k", "1.0T", (52.54, 33.40, 55.96, 27.82, 52.36, 59.54, 69.91), 50.22),
            Published("  715k", "1.5T", (53.68, 35.20, 58.33, 29.18, 51.89, 59.08, 71.65), 51.29),
            Published("  955k", "2.0T", (54.63, 33.40, 56.83, 28.07, 54.67, 63.21, 70.67), 51.64),
            Published("  1195k", "2.5T", (58.96, 34.40, 58.72, 31.91, 56.78, 63.21, 73.07), 53.86),
            Published("  1431k", "3.0T", (59.20, 36.00, 59.12, 30.12, 55.25, 57.83, 73.29), 52.99),
            Published("  v1.1", "2.0T", (61.47, 36.80, 59.43, 32.68, 55.47, 55.99, 73.56), 53.63),
        ),
        note="zero-shot, acc_norm; WinoGrande and BoolQ acc",
    ),
    "instruct": Suite(
        columns=(
            Column("MMLU", "mmlu", "acc", 5),
            Column("BBH", "bbh_fewshot", "exact_match", 3),
            Column("HumanEval", "humaneval", "pass@1", 0),
            Column("DROP", "drop", "em", 3),
        ),
        published=(
            Published("TinyLlama 50k", "103B", (26.45, 28.82, 5.49, 11.42)),
            Published("  240k", "503B", (26.16, 28.83, 4.88, 12.43)),
            Published("  480k", "1.0T", (24.65, 29.21, 6.10, 13.03)),
            Published("  715k", "1.5T", (24.85, 28.20, 7.93, 14.43)),
            Published("  955k", "2.0T", (25.97, 29.07, 6.71, 13.14)),
            Published("  1195k", "2.5T", (25.92, 29.32, 9.15, 15.45)),
        ),
        note="MMLU 5-shot, BBH and DROP 3-shot, HumanEval 0-shot; the published ones are by "
        "Instruct-Eval, which asks and counts in its own way",
    ),
}


def render(name: str, found: TaskScores, asked: Sequence[str], limit: int | None) -> RenderableType:
    """Tables for a terminal: each suite asked for beside what was published, then the others.

    Args:
      name: of the model.
      found: what `harness.Tasks.score` gives.
      asked: names as the user gave them.
      limit: documents of a task, if not all.
    """
    shown: list[RenderableType] = []
    if limit is not None:
        cut = f" Only the first {limit} documents of each task: not to be compared."
        shown += [Text(cut, style="bold yellow"), ""]
    others = dict(found)
    for suite in (SUITES[suite] for suite in asked if suite in SUITES):
        note = f" {suite.note}. Published: {SOURCE}."
        shown += [_beside_published(name, found, suite), Text(note, style="dim"), ""]
        # A group, such as MMLU, comes with each of its subjects.
        for task in [task for column in suite.columns for task in found if _within(task, column)]:
            others.pop(task, None)
    if others:
        shown.append(_plain(others))
    return Group(*shown)


def _within(task: str, column: Column) -> bool:
    return task == column.task or task.startswith(f"{column.task}_")


def _beside_published(name: str, found: TaskScores, suite: Suite) -> Table:
    """Fits 80 columns; a mean only where means were published."""
    table = Table(box=box.HORIZONTALS, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    titles = [column.title for column in suite.columns]
    if has_means := any(row.mean is not None for row in suite.published):
        titles.append("mean")
    for title in ("tokens", *titles):
        table.add_column(title, justify="right", no_wrap=True, min_width=5)
    for row in suite.published:
        cells = [f"{score:.2f}" for score in row.scores] or [""] * len(suite.columns)
        if row.mean is not None:
            cells.append(f"{row.mean:.2f}")
        table.add_row(row.model, row.tokens, *cells, style="dim")
    table.add_section()
    own = [100 * found[column.task][column.metric] for column in suite.columns]
    if has_means:
        own.append(sum(own) / len(own))
    table.add_row(name, "", *(f"{score:.2f}" for score in own), style="bold")
    return table


def _plain(found: TaskScores) -> Table:
    table = Table(box=box.HORIZONTALS, show_edge=False)
    for title in ("task", "metric"):
        table.add_column(title, no_wrap=True)
    for title in ("value", "standard error"):
        table.add_column(title, justify="right")
    for task, values in found.items():
        for metric, value in values.items():
            if metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr", math.nan)
            shown = "" if math.isnan(error) else f"{error:.4f}"
            table.add_row(task, metric, f"{value:.4f}", shown)
    return table


def write_results(run: Path, step: int, found: TaskScores, limit: int | None) -> None:
    """Adds scores to a run's results.json: {step: {task: {metric: value}}}.

    Args:
      run: the run folder.
      step: of the checkpoint.
      found: what `harness.Tasks.score` gives.
      limit: documents of a task, if not all.

    Raises:
      UserError: the file of an earlier evaluation is damaged.
    """
    file = run / FILE
    try:
        steps = json.loads(file.read_text()) if file.exists() else {}
        tasks = steps.setdefault(str(step), {})
        how = {"limit": limit, "lm_eval": version("lm_eval")}
        tasks |= {task: {**values, **how} for task, values in found.items()}
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{file} is damaged: move it away.") from None
    write_aside(file, json.dumps(steps, indent=2) + "\n")
