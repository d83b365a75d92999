"""A breakdown as a table and as a picture."""

import io
import json
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from tinyllama_jax.files import write_aside
from tinyllama_jax.performance.breakdown import NAMES, Breakdown

COLUMNS = ("", "ms a step", "share", "roofline ms", "above it ms")


def title(found: Breakdown) -> str:
    first, last = found.first_step, found.first_step + found.steps - 1
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    return f"Where a step's time goes: {found.device}, {steps}"


def legend(found: Breakdown) -> list[str]:
    lines = ["Means of one device. Kinds that run at the same time share it evenly."]
    if found.roofline_seconds is not None:
        lines.append("Roofline: the least time at speeds that others measured (roofline.py).")
    return lines


def cells(found: Breakdown) -> list[list[str]]:
    """The rows of the table, the last one the whole step; without a roofline, three columns."""
    lines = [(NAMES[row.kind], row.seconds, row.roofline_seconds) for row in found.rows]
    lines.append(("step", found.step_seconds, found.roofline_seconds))
    known = found.roofline_seconds is not None
    return [
        [name, _ms(seconds), f"{seconds / found.step_seconds:.1%}"]
        + ([_ms(least), _ms(None if least is None else seconds - least)] if known else [])
        for name, seconds, least in lines
    ]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.2f}"


def render(found: Breakdown) -> RenderableType:
    """A rich table, readable from 80 columns on."""
    *rows, whole = cells(found)
    table = Table(box=box.HORIZONTALS, show_edge=False, show_footer=True)
    for column, total in zip(COLUMNS, whole, strict=False):
        table.add_column(column, total, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    return Group(title(found), table, *legend(found))


def draw(found: Breakdown, path: Path) -> None:
    """Bars of what was measured, and of the roofline, as a PNG."""
    from matplotlib.figure import Figure  # here, because it takes a second to import

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names = [NAMES[row.kind] for row in found.rows]
    known = found.roofline_seconds is not None
    height = 0.4 if known else 0.7
    places = [index - (height / 2 if known else 0) for index in range(len(names))]
    bars = axes.barh(
        places, [1e3 * row.seconds for row in found.rows], height, color="#3b6ea5", label="measured"
    )
    shares = [f"{row.seconds / found.step_seconds:.1%}" for row in found.rows]
    axes.bar_label(bars, shares, padding=4, fontsize=8)
    if known:
        axes.barh(
            [index + height / 2 for index in range(len(names))],
            [1e3 * (row.roofline_seconds or 0) for row in found.rows],
            height,
            color="#d9a441",
            label=f"roofline: {_ms(found.roofline_seconds)} ms in all",
        )
        axes.legend(loc="lower right", frameon=False)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"ms a step, of {_ms(found.step_seconds)}")
    axes.set_title(title(found), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def write(found: Breakdown, folder: Path) -> None:
    """breakdown.txt, .json and .png into a folder."""
    text = io.StringIO()
    Console(file=text, width=80).print(render(found))
    write_aside(folder / "breakdown.txt", text.getvalue())
    write_aside(folder / "breakdown.json", json.dumps(found.to_json(), indent=1) + "\n")
    draw(found, folder / "breakdown.png")
