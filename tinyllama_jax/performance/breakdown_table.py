"""Shows a breakdown of a step's time as a table, as JSON and as a picture."""

import io
import json
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from tinyllama_jax.files import write_aside
from tinyllama_jax.performance.breakdown import NAMES, Breakdown

COLUMNS = ("", "ms a step", "share", "roofline ms", "above it ms")


def title(breakdown: Breakdown) -> str:
    """One line that names the device and the traced steps."""
    first, last = breakdown.first_step, breakdown.first_step + breakdown.steps - 1
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"Where a step's time goes: {breakdown.device}, {steps}"


def legend(breakdown: Breakdown) -> list[str]:
    """The lines that explain the columns of the table."""
    lines = ["Means of one device. Kinds that run at the same time share it evenly."]
    if breakdown.roofline_seconds is not None:
        lines.append("Roofline: the least time at speeds that others measured (roofline.py).")
    return lines


def cells(breakdown: Breakdown) -> list[list[str]]:
    """The text of the table's cells by row, under `COLUMNS`; the last row is the whole step.

    Without a roofline the rows have only the first three columns.
    """
    lines = [(NAMES[row.kind], row.seconds, row.roofline_seconds) for row in breakdown.rows]
    lines.append(("step", breakdown.step_seconds, breakdown.roofline_seconds))
    known = breakdown.roofline_seconds is not None
    return [
        [name, _ms(seconds), f"{seconds / breakdown.step_seconds:.1%}"]
        + ([_ms(least), _ms(None if least is None else seconds - least)] if known else [])
        for name, seconds, least in lines
    ]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.2f}"


def render(breakdown: Breakdown) -> RenderableType:
    """A table for the terminal, which is readable from a width of 80 columns on."""
    *rows, whole = cells(breakdown)
    table = Table(box=box.HORIZONTALS, show_edge=False, show_footer=True)
    for column, total in zip(COLUMNS, whole, strict=False):
        table.add_column(column, total, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return Group(title(breakdown), table, *legend(breakdown))


def draw(breakdown: Breakdown, path: Path) -> None:
    """Writes a PNG with a bar for the measured time of each kind, and one for its roofline."""
    # Imported here, because the import takes a second that most commands need not wait for. A
    # Figure made without pyplot needs no display, and is freed when this function returns.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names = [NAMES[row.kind] for row in breakdown.rows]
    known = breakdown.roofline_seconds is not None
    height = 0.4 if known else 0.7
    places = [index - (height / 2 if known else 0) for index in range(len(names))]
    bars = axes.barh(
        places,
        [1e3 * row.seconds for row in breakdown.rows],
        height,
        color="#3b6ea5",
        label="measured",
    )
    shares = [f"{row.seconds / breakdown.step_seconds:.1%}" for row in breakdown.rows]
    axes.bar_label(bars, shares, padding=4, fontsize=8)
    if known:
        axes.barh(
            [index + height / 2 for index in range(len(names))],
            [1e3 * (row.roofline_seconds or 0) for row in breakdown.rows],
            height,
            color="#d9a441",
            label=f"roofline: {_ms(breakdown.roofline_seconds)} ms in all",
        )
        axes.legend(loc="lower right", frameon=False)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"ms a step, of {_ms(breakdown.step_seconds)}")
    axes.set_title(title(breakdown), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def write(breakdown: Breakdown, folder: Path) -> None:
    """Writes breakdown.txt, breakdown.json and breakdown.png into a folder."""
    # The text has a fixed width, so that it does not depend on the terminal of the run.
    text = io.StringIO()
    Console(file=text, width=80).print(render(breakdown))
    write_aside(folder / "breakdown.txt", text.getvalue())
    write_aside(folder / "breakdown.json", json.dumps(breakdown.to_json(), indent=1) + "\n")
    draw(breakdown, folder / "breakdown.png")
