"""Traces some steps of a run with JAX's profiler, and reads one device's work off the trace."""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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

FOLDER = "profile"  # the trace's folder in the run folder
# Annotations in the trace: the traced steps, and pauses between them, as for a validation.
STEPS, PAUSE = "traced steps", "between steps"


def parse_steps(asked: str | None, config: Config) -> range:
    """Reads the value of `--profile`, START:STOP, as the steps from START to STOP - 1.

    Steps are counted from 1. None stands for no option and gives no steps.

    Raises:
      UserError: the value is not such a range, the run does not have these steps, or the step is
        compiled before one of them.
    """
    if asked is None:
        return range(0)
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", asked)
    start, stop = map(int, match.groups()) if match else (0, 0)
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
    # Every size of batch has a program of its own, which is compiled at its first step. A trace
    # with a compilation in it would be minutes of compiler and a moment of the step.
    for before, _ in config.batch_sizes():
        require(
            not start <= before + 1 < stop,
            f"--profile {asked} holds step {before + 1}, before which the step is compiled: begin "
            f"at step {before + 2}, or end before it.",
        )
    return range(start, stop)


class Profiler:
    """Traces some steps of a run into the folder `profile` of the run, with their breakdown.

    Only the first process traces, and only its first device is broken down: in data parallelism all
    devices do the same. A trace that is interrupted leaves nothing behind. A complete one replaces
    the trace of an earlier run.

    Args:
      steps: the numbers of the steps to trace, from `parse_steps`.
      first_step: the number of steps that the run had done when this process began.
      folder: the run folder.
      config: the run's configuration.
      mesh: the mesh that the run uses.
      say: called with a line for the user if nothing can be traced.
    """

    def __init__(
        self, steps: range, first_step: int, folder: Path, config: Config, mesh: Mesh, say: Say
    ):
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
        """The number of the last step to trace; None if none is traced."""
        return self._steps[-1] if self._steps else None

    def before(self, step: int, state: dict[str, Any]) -> None:
        """Starts the trace if `step`, which is about to run, is the first one to trace.

        Args:
          step: the number of the step.
          state: the state that the step takes.
        """
        if not self._steps or step != self._steps[0]:
            return
        # JAX runs ahead of the device. Without this wait the trace would begin inside an earlier
        # step.
        jax.block_until_ready(state)
        if not processes.is_first():
            return
        shutil.rmtree(self._aside, ignore_errors=True)  # left by a run that was killed
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # tracing Python slows the host down, and nobody reads it
        jax.profiler.start_trace(self._aside, profiler_options=options)
        self._running.callback(jax.profiler.stop_trace)
        self._running.enter_context(jax.profiler.TraceAnnotation(STEPS))

    def end(
        self, train_step: Any, state: dict[str, Any], batch: Sequence[jax.Array]
    ) -> Breakdown | None:
        """Stops the trace after the last traced step, and writes it with its breakdown.

        All processes must call this together. A fault is reported to the user and not raised: a run
        of months must not end because of its trace.

        Args:
          train_step: the jitted step, from `make_step`.
          state: the state after the last traced step. The devices must have computed it already,
            because work that is still running would be missing from the trace.
          batch: the arguments of the step after the state.

        Returns:
          The breakdown of the traced steps; None on all processes but the first, and after a fault.
        """
        try:
            # JAX finds the program that is already running, so this compiles nothing. Every process
            # asks for it nevertheless: should it have to be compiled, all of them must take part.
            compiled = train_step.lower(state, *batch).compile()
            return self._read(compiled, batch) if processes.is_first() else None
        except Exception as error:
            self._say(f"NOTHING IS TRACED: {type(error).__name__}: {error}")
            return None

    def _read(self, compiled: jax.stages.Compiled, batch: Sequence[jax.Array]) -> Breakdown | None:
        """Stops the profiler, reads its trace and moves it to its final place."""
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
        except Exception as error:  # a measurement must not be lost because no roofline is known
            self._say(f"There is no roofline: {type(error).__name__}: {error}")
            least = {}
        breakdown = make_breakdown(device, self._steps, windows, events, least)
        write(breakdown, self._aside)
        replace_folder(self._aside, self._folder)
        return breakdown

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Marks work between two steps, such as a validation, which the breakdown leaves out."""
        with jax.profiler.TraceAnnotation(PAUSE):
            yield

    def close(self) -> None:
        """Stops a trace that `end` has not finished, and deletes it."""
        self._running.close()
        if processes.is_first():
            shutil.rmtree(self._aside, ignore_errors=True)


class _Line(NamedTuple):
    """An event as the profiler records it; times in ns."""

    name: str
    start: float
    end: float
    facts: dict[str, Any]


def read_trace(
    file: Path, program: str, kinds: dict[str, Kind]
) -> tuple[list[Window], list[Event]]:
    """Reads a trace.

    Args:
      file: the profiler's file, which ends in `.xplane.pb`.
      program: the name of the step's program in the trace, from `program.read_kinds`.
      kinds: the kind of work of each of its instructions, from `program.read_kinds`.

    Returns:
      The intervals of the traced steps, without the pauses between them, and the events of the
      first device.
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


def _lines(line: Any) -> list[_Line]:
    """The events of one of the profiler's lines, which are threads and a GPU's streams."""
    return [
        _Line(event.name, event.start_ns, event.start_ns + event.duration_ns, dict(event.stats))
        for event in line.events
    ]


def _on_first_cpu(host: list[_Line]) -> list[_Line]:
    """The events of instructions that the first fake device of a CPU ran.

    On a CPU, XLA hands a large instruction to a pool of threads. Its own event ends at once, and a
    second event, "end: NAME", is recorded when the threads are done. The producer's numbers in the
    first (`_pt` and `_p`) are the consumer's in the second (`_ct` and `_c`).
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
    """The kind of work of an event, a key of `breakdown.NAMES`."""
    if line.facts.get("hlo_module") != program:
        return "other"
    # XLA gives a GPU many instructions as one CUDA graph, and every kernel in it then carries the
    # graph's name as its `hlo_op`. Only the kernel's own name tells these apart.
    return kinds.get(line.facts.get("hlo_op", "")) or kernel_kind(line.name, kinds) or "unknown"
