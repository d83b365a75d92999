"""Splits the measured time of a step by kind of work, beside the least time that each kind needs.

`trace.py` reads the events off a profile, `breakdown_table.py` shows the result.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from tinyllama_jax.config import Config
from tinyllama_jax.performance import roofline
from tinyllama_jax.performance.program import read_program
from tinyllama_jax.performance.targets import CARDS

# The kinds of work, in the order of the table -> their labels in it. The first five are those of
# `program.Kind`.
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

Window = tuple[float, float]  # (start, end) of an interval of time, in ns


class Event(NamedTuple):
    """A piece of work that a device did, from `start` to `end`, both in ns."""

    kind: str
    """A key of `NAMES`. The kind is `unknown` if the event belongs to the step but neither its
    instruction nor its kernel's name says what it does, and `other` if it belongs to another
    program, such as a copy between steps."""
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Row:
    """The time that one kind of work takes of a step."""

    kind: str
    """A key of `NAMES`."""
    seconds: float
    """The measured time."""
    roofline_seconds: float | None
    """The least time by the roofline; None if there is no roofline for this kind or this card."""


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """The time of a step by kind of work, as the mean of several traced steps on one device."""

    device: str
    """The kind of the device, as JAX reports it."""
    first_step: int
    """The number of the first traced step."""
    steps: int
    """How many steps were traced."""
    rows: tuple[Row, ...]
    """One row for each key of `NAMES`. Their times add up to the wall time of a step."""

    @property
    def step_seconds(self) -> float:
        """The wall time of a step."""
        return sum(row.seconds for row in self.rows)

    @property
    def roofline_seconds(self) -> float | None:
        """The sum over all kinds that have a roofline; None if no kind has one."""
        known = [row.roofline_seconds for row in self.rows if row.roofline_seconds is not None]
        return sum(known) if known else None

    def to_json(self) -> dict[str, Any]:
        """The fields and both totals as plain JSON values."""
        totals = {
            "step_seconds": self.step_seconds,
            "roofline_seconds": self.roofline_seconds,
        }
        return dataclasses.asdict(self) | totals


def share_time(events: Sequence[Event], windows: Sequence[Window]) -> dict[str, float]:
    """Divides the time of the windows among the kinds of work, so that every moment counts once.

    Kinds that run at the same time share it evenly, since no measurement tells which of them the
    step waited for. `unknown` gets only time in which no other kind runs: a loop is such an event,
    and lasts as long as everything inside it. Time without any event is `idle`.

    Returns:
      The time in ns for each key of `NAMES`. The values add up to the length of the windows.
    """
    # A sweep over all starts and ends in order of time: between two of them nothing changes.
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
    """Builds the breakdown of traced steps.

    Args:
      device: the kind of the device.
      steps: the numbers of the traced steps.
      windows: the intervals in which they ran.
      events: the work that the device did.
      least: the least time of each kind in seconds a step, from `roofline_by_kind`.
    """
    rows = tuple(
        Row(kind, time / 1e9 / len(steps), least.get(kind))
        for kind, time in share_time(events, windows).items()
    )
    return Breakdown(device, steps.start, len(steps), rows)


def roofline_by_kind(
    compiled: jax.stages.Compiled, config: Config, tokens: float, device: str
) -> dict[str, float]:
    """The least time that each kind of work needs in a step.

    Args:
      compiled: the compiled step.
      config: the run's configuration.
      tokens: the number of tokens that a device reads in a step.
      device: the kind of the device, as JAX reports it.

    Returns:
      Seconds by kind; nothing at all for a device that is not in `targets.CARDS`.
    """
    target = next((card for card in CARDS.values() if card.device_kind == device), None)
    if target is None:
        return {}
    work = roofline.work_of_program(read_program(compiled), config, tokens)
    least = roofline.seconds_by_kind(work, target)
    # With masked documents attention skips whole tiles, so that its work depends on the lengths of
    # the documents in each batch. The roofline knows only the work without a mask.
    if config.data.mask_documents:
        del least["attention"]
    return least
