"""Shows a plan as tables for the terminal."""

from collections import defaultdict

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinyllama_jax.planning.plan import Plan, PlannedCollective, Range

GIB = 2**30


def render(plan: Plan) -> RenderableType:
    """Tables of the whole plan, which are readable from a width of 80 columns on."""
    compiled = "compiled for them" if plan.compiled else "ESTIMATE WITHOUT THE COMPILER"
    tried = "each compiled" if plan.compiled else "estimated"
    waits = f"{plan.exposed_communication_fraction:.1%} of the step waits for it"
    parts = {
        f"{plan.devices} x {plan.card}, {compiled}": _run(plan),
        "Memory of a GPU": _memory(plan),
        f"Largest micro-batch that fits, {tried}": _micro_batches(plan),
        f"Network: {waits if plan.compiled else f'{waits} if nothing hides it'}": _collectives(
            plan
        ),
        "Prediction, from the speed of a run that was measured to the roofline": _speed(plan),
        "Data": _sources(plan),
    }
    shown: list[RenderableType] = []
    for title, table in parts.items():
        if table.row_count:  # a single GPU has no network
            shown += [Text(f" {title}", style="bold"), table, ""]
    for note in plan.notes:
        shown.append(_paragraph(Text("note ", style="bold yellow"), note))
    for line in plan.assumptions:
        shown.append(_paragraph(Text("basis", style="bold"), line))
    return Group(*shown)


def _paragraph(label: Text, text: str) -> Table:
    """A label and beside it a text that wraps within its own column."""
    grid = Table.grid(padding=(0, 1))
    grid.add_row("", label, Text(text))
    return grid


def _table(*columns: str) -> Table:
    """An empty table with headings: names on the left, numbers on the right."""
    table = Table(box=box.HORIZONTALS, show_edge=False)
    for index, column in enumerate(columns):
        first = index == 0
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    return table


def _facts() -> Table:
    """An empty table of names and values without headings."""
    return Table("", "", box=box.HORIZONTALS, show_edge=False, show_header=False)


def _run(plan: Plan) -> Table:
    table = _facts()
    table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row(
        "FLOPs a token",
        f"{plan.flops_per_token_full / 1e9:.3f} G with full attention, "
        f"{plan.flops_per_token_causal / 1e9:.3f} G causal",
    )
    shape = f"{plan.devices // plan.data_axis} devices share one state"
    table.add_row("mesh", shape + (f", {plan.data_axis} times" if plan.data_axis > 1 else ""))
    table.add_row("micro-batch", f"{plan.rows_per_device} rows a GPU, recompute {plan.recompute}")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("", "GiB", "of the card")
    rows = {
        "weights, fp32": plan.weights_bytes_per_device,
        "optimizer, fp32": plan.optimizer_bytes_per_device,
        "activations, gradients, gathered weights": plan.activation_bytes_per_device,
        "peak of the step": plan.peak_bytes_per_device,
        "with NCCL and cuBLAS": plan.peak_bytes_per_device + plan.reserve_bytes_per_device,
    }
    for name, size in rows.items():
        style = "bold" if name.startswith("peak") else ""
        table.add_row(name, f"{size / GIB:.2f}", f"{size / plan.card_bytes:.0%}", style=style)
    verdict = Text("it fits", "bold green") if plan.fits else Text("IT DOES NOT FIT", "bold red")
    usable = f"{plan.usable_bytes_per_device / GIB:.2f}"
    share = f"{plan.usable_bytes_per_device / plan.card_bytes:.0%}"
    table.add_row(Text("usable: ").append(verdict), usable, share)
    return table


def _micro_batches(plan: Plan) -> Table:
    table = _table("recompute", "rows a GPU", "peak GiB", "")
    for micro_batch in plan.largest_micro_batches:
        limit = "a whole step" if micro_batch.whole_batch else ""
        peak = f"{micro_batch.peak_bytes_per_device / GIB:.2f}"
        if not micro_batch.rows:
            limit = "one row takes this much"
        table.add_row(micro_batch.recompute, str(micro_batch.rows or "none"), peak, limit)
    return table


def _collectives(plan: Plan) -> Table:
    """A row for each group of collectives that differ in size alone, since a step has dozens."""
    table = _table(
        "collective", "GPUs", "runs", "GB", "async", "TFLOP\nbeside", "takes\nms", "exposed\nms"
    )
    alike: dict[tuple, list[PlannedCollective]] = defaultdict(list)
    for one in plan.collectives:
        # Sums of single numbers, such as the loss, would otherwise hide among the large ones.
        size = "" if one.bytes * one.times >= 2**20 else ", small"
        alike[f"{one.kind} {one.dtype}{size}", one.devices, one.asynchronous].append(one)
    for (name, devices, asynchronous), group in alike.items():
        flops = sum(one.times * (one.overlapped_flops or 0) for one in group)
        table.add_row(
            name,
            str(devices),
            str(sum(one.times for one in group)),
            f"{sum(one.times * one.bytes for one in group) / 1e9:.3f}",
            "?" if asynchronous is None else "yes" if asynchronous else "no",
            "?" if asynchronous is None else f"{flops / 1e12:.2f}",
            f"{1e3 * sum(one.wire_seconds for one in group):.1f}",
            f"{1e3 * sum(one.exposed_seconds for one in group):.1f}",
        )
    return table


def _speed(plan: Plan) -> Table:
    table = _facts()
    table.add_row("tokens/s a GPU", _span(plan.tokens_per_second_per_device, ",.0f"))
    table.add_row("tokens/s", _span(plan.tokens_per_second, ",.0f"))
    table.add_row(
        "of the card's peak",
        f"{_span(plan.mfu_full, '.0%')} full attention, {_span(plan.mfu_causal, '.0%')} causal",
    )
    table.add_row("step", f"{_span(plan.step_seconds)} s")
    table.add_row("tokens", f"{plan.tokens:,}")
    table.add_row("days", _span(plan.days))
    table.add_row("GPU hours", _span(plan.gpu_hours))
    if plan.dollars is not None:
        price = f" at {plan.dollars_per_gpu_hour:,.2f} a GPU hour"
        table.add_row("dollars", _span(plan.dollars) + price)
    return table


def _sources(plan: Plan) -> Table:
    table = _table("source", "tokens read", "tokens there are", "epochs")
    for source in plan.sources:
        there = source.tokens_available
        table.add_row(
            source.name,
            f"{source.tokens_read:,}",
            "dataset not here (--tokens)" if there is None else f"{there:,.0f}",
            "?" if source.epochs is None else f"{source.epochs:.2f}",
        )
    return table


def _span(values: Range, form: str | None = None) -> str:
    """Both ends of a range, or the one value where they print alike.

    Without a format, numbers from 100 on are whole and smaller ones have three digits.
    """
    low, high = (format(value, form or (",.0f" if value >= 100 else "#.3g")) for value in values)
    return low if low == high else f"{low} to {high}"
