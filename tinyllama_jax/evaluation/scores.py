"""The suites of tasks that the original TinyLlama was scored on, and its published scores.

Tables show a run's own scores below the published ones, and results.json keeps them.
"""

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
"""Task or group -> metric -> value. The standard error of a metric is called `<metric>_stderr`."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One task of a suite, with the metric and the settings that the original used."""

    title: str
    """The heading in the table."""
    task: str
    """lm-evaluation-harness's name of the task or of the group of tasks."""
    metric: str
    """lm-evaluation-harness's name of the metric."""
    shots: int
    """The number of solved examples in each prompt."""


@dataclasses.dataclass(frozen=True)
class Published:
    """One row of a published table, in percent."""

    model: str
    """The name of the model, or the step of a TinyLlama checkpoint."""
    tokens: str
    """The number of tokens that the model was trained on."""
    scores: tuple[float, ...]
    """A score for each column of the suite; empty if only the mean was published."""
    mean: float | None = None
    """The mean as it was published. At step 1431k it differs slightly from the mean of the scores.
    """


@dataclasses.dataclass(frozen=True)
class Suite:
    """A set of tasks that are shown together as one table."""

    columns: tuple[Column, ...]
    published: tuple[Published, ...]
    note: str
    """A line below the table that says how the tasks were scored."""


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


def render(
    name: str, scores: TaskScores, asked: Sequence[str], limit: int | None
) -> RenderableType:
    """Makes tables for the terminal: a table for each suite that was asked for, and one for the
    other tasks.

    Args:
      name: the name of the model.
      scores: the scores, from `harness.Tasks.score`.
      asked: the names of suites and tasks that the user gave.
      limit: the number of documents that were scored of each task; None if all were.
    """
    shown: list[RenderableType] = []
    if limit is not None:
        cut = f" Only the first {limit} documents of each task: not to be compared."
        shown += [Text(cut, style="bold yellow"), ""]
    others = dict(scores)
    for suite in (SUITES[suite] for suite in asked if suite in SUITES):
        note = f" {suite.note}. Published: {SOURCE}."
        shown += [_beside_published(name, scores, suite), Text(note, style="dim"), ""]
        # lm-eval also reports each part of a group, such as MMLU's 57 subjects. Only the group is a
        # column, and its parts are not shown.
        for task in [task for column in suite.columns for task in scores if _within(task, column)]:
            others.pop(task, None)
    if others:
        shown.append(_plain(others))
    return Group(*shown)


def _within(task: str, column: Column) -> bool:
    """Whether a task is the column's task or a part of the column's group."""
    return task == column.task or task.startswith(f"{column.task}_")


def _beside_published(name: str, scores: TaskScores, suite: Suite) -> Table:
    """A suite's table: published rows first, the model's own row last. It fits into 80 columns.

    The column for the mean exists only in suites whose means were published.
    """
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
    own = [100 * scores[column.task][column.metric] for column in suite.columns]
    if has_means:
        own.append(sum(own) / len(own))
    table.add_row(name, "", *(f"{score:.2f}" for score in own), style="bold")
    return table


def _plain(scores: TaskScores) -> Table:
    """A table of tasks without published scores, with a row for each metric."""
    table = Table(box=box.HORIZONTALS, show_edge=False)
    for title in ("task", "metric"):
        table.add_column(title, no_wrap=True)
    for title in ("value", "standard error"):
        table.add_column(title, justify="right")
    for task, values in scores.items():
        for metric, value in values.items():
            if metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr", math.nan)
            # lm-eval knows no standard error for some metrics.
            shown = "" if math.isnan(error) else f"{error:.4f}"
            table.add_row(task, metric, f"{value:.4f}", shown)
    return table


def write_results(run: Path, step: int, scores: TaskScores, limit: int | None) -> None:
    """Adds scores to a run's results.json, whose form is {step: {task: {metric: value}}}.

    Scores of the same task and step replace earlier ones. Each task also notes `limit` and the
    version of lm-evaluation-harness, since scores with another limit or version do not compare.

    Args:
      run: the run folder.
      step: the step of the checkpoint.
      scores: the scores, from `harness.Tasks.score`.
      limit: the number of documents that were scored of each task; None if all were.

    Raises:
      UserError: the results.json of an earlier evaluation is damaged.
    """
    file = run / FILE
    try:
        steps = json.loads(file.read_text()) if file.exists() else {}
        tasks = steps.setdefault(str(step), {})
        how = {"limit": limit, "lm_eval": version("lm_eval")}
        tasks |= {task: {**values, **how} for task, values in scores.items()}
    # A file that is valid JSON but has another form fails in one of the lines above.
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{file} is damaged: move it away.") from None
    write_aside(file, json.dumps(steps, indent=2) + "\n")
