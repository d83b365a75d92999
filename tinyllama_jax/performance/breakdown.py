"""Where the time of a step went, by kind of work, beside the least that each kind needs."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from tinyllama_jax.config import Config
from tinyllama_jax.performance import roofline
from tinyllama_jax.performance.program import read_program
from tinyllama_jax.performance.targets import CARDS

# What the time of a step is told by, in this order -> how people read it.
NAMES = {
    "matmul": "matrix products",
    "attention": "attention",
    "memory": "memory-bound",
    "optimizer": "optimizer",
    "communication": "communication",
    "other": "other programs",
    "unknown": "unattributed",
    "idle": "idle",
}

Window = tuple[float, float]  # from, to


class Event(NamedTuple):
    """Something that a device did; times in ns."""

    kind: str
    """Of `NAMES`: `unknown` is a part of the step that nothing tells the kind of, such as a loop
    besides its body."""
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of work, in seconds of a step."""

    kind: str
    seconds: float
    roofline_seconds: float | None
    """At the least; None where nobody knows."""


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """The mean of some steps on one device."""

    device: str
    first_step: int
    steps: int
    rows: tuple[Row, ...]
    """One for each of `NAMES`; together the wall time of a step."""

    @property
    def step_seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def roofline_seconds(self) -> float | None:
        """Of all kinds that have one."""
        known = [row.roofline_seconds for row in self.rows if row.roofline_seconds is not None]
        return sum(known) if known else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the names above."""
        totals = {
            "step_seconds": self.step_seconds,
            "roofline_seconds": self.roofline_seconds,
        }
        return dataclasses.asdict(self) | totals


def share_time(events: Sequence[Event], windows: Sequence[Window]) -> dict[str, float]:
    """The time of the windows by kind, which adds up to all of it.

    Kinds that run at the same time share it evenly; `unknown` takes what no other does, and `idle`
    what is left.
    """
    spans = [(event.start, event.end, event.kind) for event in events]
    spans += [(start, end, "window") for start, end in windows]
    edges = [(start, 1, kind) for start, _, kind in spans]
    edges += [(end, -1, kind) for _, end, kind in spans]
    shares = dict.fromkeys(NAMES, 0.0)
    running, before = Counter(), 0.0
    for time, change, kind in sorted(edges):
        if running["window"]:
            active = [name for name in NAMES if running[name]]
            known = [name for name in active if name != "unknown"] or active or ["idle"]
            for name in known:
                shares[name] += (time - before) / len(known)
        running[kind] += change
        before = time
    return shares


def make_breakdown(
    device: str,
    steps: range,
    windows: Sequence[Window],
    events: Sequence[Event],
    least: Mapping[str, float],
) -> Breakdown:
    """The breakdown of traced steps.

    Args:
      device: its kind.
      steps: their numbers.
      windows: when they ran, in ns.
      events: what the device did.
      least: what `roofline_by_kind` returns.
    """
    rows = tuple(
        Row(kind, time / 1e9 / len(steps), least.get(kind))
        for kind, time in share_time(events, windows).items()
    )
    return Breakdown(device, steps.start, len(steps), rows)


def roofline_by_kind(
    compiled: jax.stages.Compiled, config: Config, tokens: float, device: str
) -> dict[str, float]:
    """Seconds of a step at the least; empty for a device that is no card of `CARDS`.

    Attention has none where documents are masked: what it takes hangs on their lengths.

    Args:
      compiled: the step.
      config: the run.
      tokens: that a device reads in a step.
      device: its kind.
    """
    target = next((card for card in CARDS.values() if card.device_kind == device), None)
    if target is None:
        return {}
    work = roofline.work_of_program(read_program(compiled), config, tokens)
    least = roofline.seconds_by_kind(work, target)
    if config.data.mask_documents:
        del least["attention"]
    return least
