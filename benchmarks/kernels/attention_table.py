"""The table of attention on a GPU: a row for each system in each case."""

import dataclasses
from typing import Any

from rich.table import Table

from benchmarks.kernels.attention_systems import OURS, Case

TOLERANCE = 1e-2
LEGEND = f"""\
bf16, causal. Median milliseconds of a call (fastest-slowest round). Backward is dq, dk and dv
alone: what the forward pass saved is there before the clock starts. TFLOP/s count 4 B N H T^2 / 2
operations forward, or with documents 4 N H for each pair of tokens that see each other, and 2.5
times that backward. Error: the largest of ||x - y|| / ||y|| over o, dq, dk and dv of one row and kv
head, against the reference in fp32; above {TOLERANCE} nothing is timed. Same bits: of two runs.
/ peer: ours over the fastest of the others (cudnn is among them, the reference is not).
/ whole: over the same shape without documents. *: calls were queued no faster than they ran."""


@dataclasses.dataclass
class Row:
    """The measurements of one system in one case."""

    case: Case
    system: str
    error: float | None = None
    same_bits: bool | None = None
    failure: str | None = None
    forward: dict[str, Any] | None = None
    backward: dict[str, Any] | None = None


def compare(rows: list[Row]) -> None:
    """Adds to each time its ratio to the fastest peer's and to the time without documents."""
    for row in rows:
        for which in ("forward", "backward"):
            if not (times := getattr(row, which)):
                continue
            others = [r for r in rows if r.system == row.system and str(r.case) == str(row.case)]
            whole = [getattr(r, which) for r in others if not r.case.documents]
            if row.case.documents and whole and whole[0]:
                times["over_whole"] = times["ms"] / whole[0]["ms"]
            peers = [r for r in rows if r.case == row.case]
            peers = [r for r in peers if r.system not in (*OURS, "reference") and getattr(r, which)]
            if row.system in OURS and peers:
                best = min(peers, key=lambda r: getattr(r, which)["ms"])
                times["best_peer"] = best.system
                times["over_best_peer"] = times["ms"] / getattr(best, which)["ms"]


COLUMNS = ("shape", "documents", "system", "forward ms", "TFLOP/s", "/ peer", "/ whole")
COLUMNS += ("backward ms", "TFLOP/s", "/ peer", "/ whole", "error", "same bits")


def cells(row: Row) -> list[str]:
    """A row of the table; a failure takes the place of the numbers."""

    def shown(times):
        if not times:
            return ["-"] * 4
        late = "*" if times["host_ms"] > 0.8 * times["ms"] else ""
        spread = f"{times['ms']:.3f} ({times['ms_min']:.3f}-{times['ms_max']:.3f}){late}"
        ratios = [times.get(key) for key in ("over_best_peer", "over_whole")]
        return [spread, f"{times['tflops']:.3g}", *(f"{r:.2f}" if r else "" for r in ratios)]

    start = [str(row.case), str(row.case.mean_document) if row.case.documents else "", row.system]
    error = "" if row.error is None else f"{row.error:.1e}"
    bits = {None: "", True: "yes", False: "no"}[row.same_bits]
    if row.failure:
        return [*start, row.failure]
    return [*start, *shown(row.forward), *shown(row.backward), error, bits]


def terminal_table(rows: list[Row], title: str) -> Table:
    """The table for a terminal, with a line between two cases."""
    table = Table(*COLUMNS, title=title, caption=LEGEND, caption_justify="left")
    for before, row in zip([None, *rows], rows, strict=False):
        if before and before.case != row.case:
            table.add_section()
        table.add_row(*cells(row))
    return table


def auto_rows(rows: list[Row], chip: str) -> list[str]:
    """Lines for `AUTO` in model/attention.py.

    The best backend is the one with the smallest sum of all forward and backward times.
    """
    lines = []
    for documents in (False, True):
        totals = {}
        for backend in ("pallas", "triton", "cudnn"):
            mine = [r for r in rows if r.system == backend and r.case.documents == documents]
            if mine and all(row.forward and row.backward for row in mine):
                totals[backend] = sum(row.forward["ms"] + row.backward["ms"] for row in mine)
        if totals:
            best, *others = sorted(totals, key=totals.__getitem__)
            beaten = [f"{b} takes {totals[b] / totals[best]:.2f} times as long" for b in others]
            reason = ", ".join(beaten) or "the only one that runs"
            lines.append(f'    ("{chip}", {documents}): ("{best}", "{reason}"),')
    return lines
