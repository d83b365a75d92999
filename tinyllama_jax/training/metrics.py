"""Where a run's numbers go: metrics.jsonl, TensorBoard and the terminal."""

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
    """Writes the same names and values to metrics.jsonl and TensorBoard, a line a call.

    A value that is not finite is null in metrics.jsonl. Of several processes the first writes.
    """

    def __init__(self, run_folder: Path, first_step: int):
        self._file = None
        if not processes.is_first():
            return
        path = run_folder / FILE
        # The steps after the checkpoint are made again. Lines of theirs that stayed would be read
        # as this run's: those of a run whose checkpoints were removed, or of a step now left out.
        if path.exists():
            kept = [line for step, line in _lines(path) if step <= first_step]
            write_aside(path, "".join(f"{line}\n" for line in kept))
        self._file = open(path, "a")
        self._board = _summary_writer()(str(run_folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Values after `step` optimizer steps."""
        if self._file is None:
            return
        # JSON has no NaN, which the loss of a skipped step is.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


def _summary_writer() -> type:
    """tensorboardX's writer, without torch. It imports torch where there is one, for a type that
    no number here has: seconds at the start of a run, and in a process of JAX a second set of CUDA
    libraries."""
    modules: dict[str, Any] = sys.modules
    hidden = modules.setdefault("torch", None) is None  # which is as if there were none
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del modules["torch"]
    return SummaryWriter


def read_metrics(run_folder: str | Path) -> dict[int, dict[str, Any]]:
    """{step: values} of a run, rising."""
    steps: dict[int, dict[str, Any]] = {}
    for step, line in _lines(Path(run_folder) / FILE):
        values = json.loads(line)
        del values["step"]
        steps.setdefault(step, {}).update(values)
    return dict(sorted(steps.items()))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(step, line) of each whole line; a killed process leaves its last one unfinished."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield int(json.loads(line)["step"]), line
        except (ValueError, KeyError, TypeError):
            continue


class Terminal:
    """A live bar on a terminal, plain lines elsewhere; of several processes the first speaks."""

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
        """Moves the bar; a line of numbers, when there is one, replaces the last."""
        if self._bar is not None:
            self._line = self._line if line is None else line
            self._bar.update(self._task, completed=step, line=self._line)
        elif line is not None:
            tail = "" if eta is None else f"  eta {int(eta) // 60}:{int(eta) % 60:02}"
            self.console.print(f"step {step}/{self._steps}  {line}{tail}", markup=False)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
