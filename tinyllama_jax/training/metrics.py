"""Writes a run's numbers to metrics.jsonl, to TensorBoard and to the terminal."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tinyllama_jax.files import write_aside
from tinyllama_jax.runtime import processes

FILE = "metrics.jsonl"


class Metrics:
    """Writes metrics under the same names to metrics.jsonl and to TensorBoard.

    Only the first process writes; on the others all methods do nothing.

    Args:
      run_folder: the run folder, which exists.
      first_step: the step of the checkpoint that the run resumes from; 0 for a new run.
    """

    def __init__(self, run_folder: Path, first_step: int):
        self._file = None
        if not processes.is_first():
            return
        path = run_folder / FILE
        # A run that resumes from a checkpoint repeats the steps after it and writes their lines
        # again. The earlier lines of those steps are removed. Most would be overwritten when the
        # file is read, but not all: steps may now be logged at another interval, or the run may
        # start anew because its checkpoints were deleted.
        if path.exists():
            kept = [line for step, line in _lines(path) if step <= first_step]
            write_aside(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a")
        self._board = _summary_writer()(str(run_folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of values for a step.

        A value that is not finite becomes null in metrics.jsonl.

        Args:
          step: the number of optimizer steps done.
          values: the values by name.
        """
        if self._file is None:
            return
        # The loss of a step that was skipped is NaN, which JSON cannot express. Python would write
        # it all the same, and strict readers would then reject the file.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def _summary_writer() -> type:
    """Imports tensorboardX's writer while torch is hidden, and returns it.

    tensorboardX imports torch if it is installed, to recognize torch's tensors, of which there are
    none here. That would take 1.5 seconds at the start of every run, and load a second set of CUDA
    libraries into JAX's process.
    """
    modules: dict[str, Any] = sys.modules
    # A None in sys.modules makes Python's import fail as if the package were not installed.
    hidden = modules.setdefault("torch", None) is None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del modules["torch"]
    return SummaryWriter


def read_metrics(run_folder: str | Path) -> dict[int, dict[str, Any]]:
    """Reads the metrics of a run.

    Args:
      run_folder: the run folder, which has a metrics.jsonl.

    Returns:
      The values by step, in rising order. The lines of a step are merged, since training and
      validation write their own.
    """
    steps: dict[int, dict[str, Any]] = {}
    for step, line in _lines(Path(run_folder) / FILE):
        values = json.loads(line)
        del values["step"]
        steps.setdefault(step, {}).update(values)
    return dict(sorted(steps.items()))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the step and the text of every complete line.

    A process that is killed while it writes leaves its last line unfinished, which is passed over.
    """
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield int(json.loads(line)["step"]), line
        except (ValueError, KeyError, TypeError):
            continue


class Terminal:
    """Shows progress: as a live bar in a terminal, and as plain lines in a file or a pipe.

    Only the first process shows anything.

    Args:
      steps: the number of steps of the run.
      first_step: the number of steps already done.
    """

    def __init__(self, steps: int, first_step: int):
        self.console = Console(highlight=False, soft_wrap=True, quiet=not processes.is_first())
        self._steps, self._bar, self._line = steps, None, ""
        if self.console.is_terminal and not self.console.quiet:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[line]}"),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=first_step, line="")
            self._bar.start()

    def step(self, step: int, line: str | None, eta: float | None = None) -> None:
        """Shows that a step is done.

        Args:
          step: the number of the step.
          line: numbers to show. None leaves those of an earlier step beside the bar, and prints
            nothing where there is no bar.
          eta: the seconds to the end of the run, if they are known. The bar estimates them itself.
        """
        if self._bar is not None:
            self._line = self._line if line is None else line
            self._bar.update(self._task, completed=step, line=self._line)
        elif line is not None:
            tail = "" if eta is None else f"  eta {int(eta) // 60}:{int(eta) % 60:02}"
            self.console.print(f"step {step}/{self._steps}  {line}{tail}", markup=False)

    def say(self, text: str) -> None:
        """Prints a line that stays, above the bar if there is one."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        """Removes the live display, so that the terminal is usable again."""
        if self._bar is not None:
            self._bar.stop()
