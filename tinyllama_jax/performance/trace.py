"""JAX's profiler over some steps of a run, and what its trace says of one device."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from tinyllama_jax.config import Config
from tinyllama_jax.errors import require
from tinyllama_jax.files import folder_aside_name, replace_folder
from tinyllama_jax.performance.breakdown import (
    Breakdown,
    Event,
    Window,
    make_breakdown,
    roofline_by_kind,
)
from tinyllama_jax.performance.breakdown_table import write
from tinyllama_jax.performance.program import Kind, kernel_kind, read_kinds
from tinyllama_jax.runtime import processes

Say = Callable[[str], None]

FOLDER = "profile"  # of a run
STEPS, PAUSE = "traced steps", "between steps"  # how the trace names them


def parse_steps(asked: str | None, config: Config) -> range:
    """The steps START, ..., STOP - 1 of `START:STOP`, counted from 1; none if None is asked for.

    Raises:
      UserError: no such range, steps that the run does not have, or one that is compiled.
    """
    if asked is None:
        return range(0)
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", asked)
    start, stop = map(int, found.groups()) if found else (0, 0)
    require(
        start < stop,
        f"--profile is {asked}: give START:STOP, the first step to trace and the one after the "
        "last, as in 10:20.",
    )
    require(
        stop - 1 <= config.steps,
        f"--profile {asked} ends with step {stop - 1} and the run with step {config.steps}: give "
        "steps that the run has.",
    )
    for before, _ in config.batch_sizes():
        require(
            not start <= before + 1 < stop,
            f"--profile {asked} holds step {before + 1}, before which the step is compiled: begin "
            f"at step {before + 2}, or end before it.",
        )
    return range(start, stop)


class Profiler:
    """Traces some steps of a run into `RUN/profile/`, with what `Breakdown` makes of them.

    All processes call `end` together, and the first traces; its first device is looked at. A
    trace that is cut leaves nothing, and one that is whole takes the place of the one before.
    """

    def __init__(
        self, steps: range, first_step: int, folder: Path, config: Config, mesh: Mesh, say: Say
    ):
        """`first_step`: how many steps there were before this process; `say` takes a line, where
        nothing can be traced."""
        compiled = first_step + 1
        if steps and steps.start <= compiled:
            say(
                f"NOTHING IS TRACED: --profile {steps.start}:{steps.stop} begins before step "
                f"{compiled + 1}, the first one here that is not compiled: give a later range."
            )
            steps = range(0)
        self._steps, self._config, self._mesh, self._say = steps, config, mesh, say
        self._folder = folder / FOLDER
        self._aside = folder_aside_name(self._folder)
        self._running = contextlib.ExitStack()

    @property
    def last_step(self) -> int | None:
        return self._steps[-1] if self._steps else None

    def before(self, step: int, state) -> None:
        """Begins before the first step, when the devices have done all that was before."""
        if not self._steps or step != self._steps[0]:
            return
        jax.block_until_ready(state)
        if not processes.is_first():
            return
        shutil.rmtree(self._aside, ignore_errors=True)  # of a run that was killed
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it slows the host down, and Python is not looked at
        jax.profiler.start_trace(self._aside, profiler_options=options)
        self._running.callback(jax.profiler.stop_trace)
        self._running.enter_context(jax.profiler.TraceAnnotation(STEPS))

    def end(self, train_step, state, batch) -> Breakdown | None:
        """Ends after the last step: where the time went, or None.

        Args:
          train_step: what `make_step` returns.
          state: what the last step gave, and the devices have done.
          batch: the other arguments of the step.
        """
        try:
            # No work: what runs is found. All ask, as compiling would be the work of all.
            compiled = train_step.lower(state, *batch).compile()
            return self._read(compiled, batch) if processes.is_first() else None
        except Exception as error:  # a run of months does not end because of its trace
            self._say(f"NOTHING IS TRACED: {type(error).__name__}: {error}")
            return None

    def _read(self, compiled: jax.stages.Compiled, batch) -> Breakdown | None:
        self._running.close()
        program, kinds = read_kinds(compiled)
        (file,) = self._aside.rglob("*.xplane.pb")
        windows, events = read_trace(file, program, kinds)
        if all(event.kind == "other" for event in events):
            self._say(
                "NOTHING IS TRACED: the profiler saw nothing of the step; on an NVIDIA GPU it "
                "needs CUPTI, and the right to use it."
            )
            return None
        tokens = batch[1].size / self._mesh.size
        device = self._mesh.devices.flat[0].device_kind
        try:
            least = roofline_by_kind(compiled, self._config, tokens, device)
        except Exception as error:  # what was measured does not hang on what was foretold
            self._say(f"There is no roofline: {type(error).__name__}: {error}")
            least = {}
        found = make_breakdown(device, self._steps, windows, events, least)
        write(found, self._aside)
        replace_folder(self._aside, self._folder)
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what is done in this block between two steps."""
        with jax.profiler.TraceAnnotation(PAUSE):
            yield

    def close(self) -> None:
        self._running.close()
        if processes.is_first():
            shutil.rmtree(self._aside, ignore_errors=True)


class _Line(NamedTuple):
    """An event as the profiler has it."""

    name: str
    start: float
    end: float
    facts: dict


def read_trace(
    file: Path, program: str, kinds: dict[str, Kind]
) -> tuple[list[Window], list[Event]]:
    """(the traced time without pauses, what the first device did in the trace), both in ns.

    Args:
      file: an `.xplane.pb`.
      program: the name of the step in it.
      kinds: of its instructions.
    """
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(file)).planes}
    host = [line for lines in planes["/host:CPU"].lines for line in _lines(lines)]
    (steps,) = [(line.start, line.end) for line in host if line.name == STEPS]
    pauses = sorted((line.start, line.end) for line in host if line.name == PAUSE)
    ends = [steps[0], *(time for pause in pauses for time in pause), steps[1]]
    windows = list(zip(ends[::2], ends[1::2], strict=True))

    gpus = sorted(name for name in planes if name.startswith("/device:GPU:"))
    if gpus:
        streams = [lines for lines in planes[gpus[0]].lines if lines.name.startswith("Stream")]
        done = [line for lines in streams for line in _lines(lines)]
    else:
        done = _on_first_cpu(host)
    return windows, [Event(_kind(line, program, kinds), line.start, line.end) for line in done]


def _lines(line) -> list[_Line]:
    return [
        _Line(event.name, event.start_ns, event.start_ns + event.duration_ns, dict(event.stats))
        for event in line.events
    ]


def _on_first_cpu(host: list[_Line]) -> list[_Line]:
    """The instructions among the events of the host.

    One that other threads work on returns at once, and a second event, "end: NAME", says when they
    were done; numbers lead from the one to the other.
    """
    done = [line for line in host if "hlo_op" in line.facts]
    first = min((line.facts.get("device_ordinal", 0) for line in done), default=0)
    ends = {
        (line.facts.get("_ct"), line.facts["_c"]): line.end for line in host if "_c" in line.facts
    }
    return [
        line._replace(end=max(line.end, ends.get((line.facts.get("_pt"), line.facts.get("_p")), 0)))
        for line in done
        if line.facts.get("device_ordinal", 0) == first
    ]


def _kind(line: _Line, program: str, kinds: dict[str, Kind]) -> str:
    if line.facts.get("hlo_module") != program:
        return "other"
    # A GPU is given many instructions as one graph, whose name all their kernels have as `hlo_op`.
    return kinds.get(line.facts.get("hlo_op", "")) or kernel_kind(line.name, kinds) or "unknown"
