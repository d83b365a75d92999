"""Where a run's numbers go: metrics.jsonl, TensorBoard and the terminal."""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


class Metrics:
    """Writes the same names and values to metrics.jsonl and TensorBoard, a line a call.

    A value that is not finite is null in metrics.jsonl.
    """

    def __init__(self, run_folder: Path, first_step: int):
        path = run_folder / FILE
        text = path.read_text() if path.exists() else ""
        self._file = open(path, "a")
        if text and not text.endswith("\n"):  # the process died within its last line
            self._file.write("\n")
        # A run that goes on repeats the steps after its checkpoint; the later line counts.
        self._board = SummaryWriter(str(run_folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Values after `step` optimizer steps."""
        # JSON has no NaN, which the loss of a skipped step is.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run_folder: str | Path) -> dict[int, dict[str, Any]]:
    """{step: values} of a run, rising; for a step that was repeated, the last values.

    A line that a killed process left unfinished is passed over.
    """
    steps: dict[int, dict[str, Any]] = {}
    for line in (Path(run_folder) / FILE).read_text().splitlines():
        try:
            values = json.loads(line)
            steps.setdefault(values.pop("step"), {}).update(values)
        except (ValueError, KeyError, AttributeError):
            continue
    return dict(sorted(steps.items()))


class Terminal:
    """A live bar on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, first_step: int):
        self.console = Console(highlight=False, soft_wrap=True)
        self._steps, self._bar, self._line = steps, None, ""
        if self.console.is_terminal:
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
