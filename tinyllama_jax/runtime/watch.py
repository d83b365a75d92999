"""Who is still there: signs of life of all processes, and the end of a run that stands still."""

import contextlib
import ctypes
import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from tinyllama_jax.errors import ExitCode, UserError, require
from tinyllama_jax.files import make_folder
from tinyllama_jax.runtime.processes import every, exit_code, tell, together

BEAT = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a process is taken for dead or stopped

# Seconds that the others wait for a process which is alive and does not go on, by what it does.
PATIENCE = {
    "start": 3600,  # reads and hashes weights, and compiles the first step
    "data": 40,  # the next batch, of which the reader holds several ready
    "compile": 3600,  # a batch of another size
    "step": 1200,  # as long as few were timed, then `STEP` or more
    "save": 3600,  # waits for the checkpoint before, on a slow disk
    "validation": 6 * 3600,  # of all held-out rows at the end
    "evaluation": 6 * 3600,  # the slowest task asks 200,000 times
    "sample": 1200,
    "profile": 3600,  # process 0 reads what it traced
    "end": 6 * 3600,  # simple models are counted on the held-out rows
}
STANDSTILL = 3600  # seconds, at least, where nobody is ahead: then all are equally slow
STEP = 45  # seconds, at least, for a step of several processes once `TIMED` of them were timed,
SLOWER = 10  # and this many times the longest so far
TIMED = 3

LINGER = 10.0  # seconds that process 0 waits for the others to leave first
UNWINDING = 120.0  # seconds that a process with an error has to close its files


@dataclasses.dataclass
class _Seen:
    """What this process knows of one, itself among them, and for how long it did not change."""

    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    silent: float = 0.0
    still: float = 0.0


@contextlib.contextmanager
def watched(run_folder: Path) -> Iterator["Watch"]:
    """Leaves the block with all other processes, or tells them at once why it did not.

    All processes together.

    Raises:
      UserError: the processes do not see each other's files.
    """
    watch = Watch(run_folder)
    watch.start()
    try:
        yield watch
    except BaseException as error:
        watch.fail(error)
        raise
    watch.leave()


class Watch:
    """Signs of life of all processes, in `RUN/processes/`, and the end of a run that stands still.

    A thread of each process writes its own file and reads the others'. Only changes count, by the
    reader's own clock, and only time that the thread itself lived through: a laptop that slept, or
    a job that was suspended, is not late. Since all processes run one program, the number of
    `at` calls says who is behind. One process writes nothing and only notices a standstill.
    """

    def __init__(self, run_folder: Path):
        self._me, self._count = jax.process_index(), jax.process_count()
        self._folder = run_folder / "processes"
        self._host = socket.gethostname()
        self._place = (0, "start", 0)
        self._left: dict[str, Any] | None = None
        self._beat = 0
        self._timed, self._longest, self._since = 0, 0.0, time.monotonic()  # of steps
        self._seen = [_Seen() for _ in range(self._count)]
        self._told = 0  # beats since another process was found to have left
        self._error: BaseException | None = None
        self._closing = 0.0  # seconds since there was an error
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)

    def at(self, phase: str, step: int) -> None:
        """Says what this process does next: a phase of `PATIENCE`."""
        assert phase in PATIENCE
        now = time.monotonic()
        if self._place[1] == "step":
            self._timed, self._longest = self._timed + 1, max(self._longest, now - self._since)
        self._place, self._since = (self._place[0] + 1, phase, step), now

    def start(self) -> None:
        if self._count > 1:
            self._meet()
        if self._me > 0:
            # Not `signal.signal`: the main thread runs its handlers, and waits in a collective.
            ctypes.CDLL(None).signal(signal.SIGABRT, self._aborted)
        self._thread.start()

    def leave(self) -> None:
        """Waits until all processes are here."""
        if self._count > 1:
            self._sign_off(0, "")
            while self._folder.is_dir() and not all(map(self._has_left, range(self._count))):
                time.sleep(BEAT / 20)
        self._ended.set()
        self._thread.join()
        if self._me > 0:
            ctypes.CDLL(None).signal(signal.SIGABRT, None)
        elif self._count > 1:
            shutil.rmtree(self._folder, ignore_errors=True)

    def fail(self, error: BaseException) -> None:
        """Tells the others of an error, unless it only shows that one of them is gone."""
        if self._count == 1:
            self._ended.set()
            return
        if _may_be_anothers(error):
            # Long enough to find out who is; then the thread ends this process.
            time.sleep(SILENCE + 5 * BEAT)
        code = exit_code(error)
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        self._sign_off(
            code,
            f"process {self._me} on {self._host} left with exit code {code} ({kind}{first_line})",
        )
        self._error = error
        if self._me == 0:
            self._linger()

    def _meet(self) -> None:
        """Writes the first sign of life, and waits for everyone's."""
        if self._me == 0:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
        every("")
        make_folder(self._folder)
        self._write()
        every("")  # nobody looks for a file before it is there, which NFS would remember
        deadline = time.monotonic() + SILENCE
        missing = set(range(self._count))
        while missing and time.monotonic() < deadline:
            missing -= {process for process in missing if self._read(process)}
            time.sleep(BEAT / 20)
        with together():
            require(
                not missing,
                f"{self._folder} shows nothing of process {sorted(missing)}: --run-folder must lie "
                "on a disk that all machines share.",
            )

    def _abort(self, number: int) -> None:
        """What SIGABRT does: JAX aborts a process at once when process 0, which serves its
        coordinator, is gone. That is held until the thread has said so and ended this process; an
        abort while process 0 lives is this process's own."""
        time.sleep(4 * BEAT)
        if self._seen[0].silent > 2 * BEAT:
            time.sleep(SILENCE)
        os._exit(128 + number)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(BEAT):
            now = time.monotonic()
            lived, last = min(now - last, 2 * BEAT), now
            if self._error is not None:
                self._closing += lived
                if self._closing > UNWINDING:  # closing waits for another process
                    tell(self._error)
                    os._exit(exit_code(self._error))
                continue
            self._look(lived)
            verdict = self._verdict()
            if verdict is not None and self._error is None:
                code, line = verdict
                Console().show_cursor()  # which a progress bar hides
                print(f"tinyllama: {line}", file=sys.stderr, flush=True)
                if self._count > 1:
                    self._sign_off(code, line)
                    if self._me == 0:
                        self._linger()
                os._exit(code)

    def _look(self, lived: float) -> None:
        """Writes the own state and reads everyone's."""
        if self._count > 1:
            self._write()
        for process, seen in enumerate(self._seen):
            state = self._state() if process == self._me else self._read(process) or seen.state
            before, seen.state = seen.state, state
            seen.silent = 0.0 if state.get("beat") != before.get("beat") else seen.silent + lived
            seen.still = 0.0 if state.get("moves") != before.get("moves") else seen.still + lived

    def _verdict(self) -> tuple[int, str] | None:
        """(exit code, reason) if the run cannot go on."""
        for process, seen in enumerate(self._seen):
            if process == self._me:
                continue
            left = seen.state.get("left")
            if left is not None and left["code"]:
                # An error of all processes alike is told by each: it gets there on its own.
                self._told += 1
                if self._told > 2:
                    return left["code"], left["reason"]
            elif left is None and seen.silent > SILENCE:
                host = seen.state.get("host", "an unknown host")
                return ExitCode.WATCHDOG, (
                    f"process {process} on {host} has not been heard of for {SILENCE:.0f} s; the "
                    "same command in all processes goes on from the last checkpoint."
                )
        working = [p for p, seen in enumerate(self._seen) if not seen.state.get("left")]
        if not working:
            return None
        moves = [seen.state.get("moves", 0) for seen in self._seen]
        slowest = min(working, key=lambda process: moves[process])
        seen = self._seen[slowest]
        phase, step = seen.state.get("phase", "start"), seen.state.get("step", 0)
        behind = moves[slowest] < max(moves)
        patience = self._patience(phase, behind)
        if seen.still <= patience:
            return None
        who = f"process {slowest} on {seen.state.get('host')} has not"
        if not behind and len(working) > 1:
            who = "no process has"
        return ExitCode.WATCHDOG, (
            f"{who} gone on for {patience:.0f} s (step {step}, {phase}); the same command goes on "
            "from the last checkpoint."
        )

    def _patience(self, phase: str, behind: bool) -> float:
        """Seconds that the last process may stay where it is; `behind`: others are further."""
        if phase == "step" and self._count > 1 and self._timed >= TIMED:
            return max(STEP, SLOWER * self._longest)
        return PATIENCE[phase] if behind else max(PATIENCE[phase], STANDSTILL)

    def _state(self) -> dict[str, Any]:
        moves, phase, step = self._place
        return {
            "host": self._host,
            "pid": os.getpid(),
            "step": step,
            "phase": phase,
            "moves": moves,
            "beat": self._beat,
            "left": self._left,
        }

    def _write(self) -> None:
        # In place: on NFS a name leads to the file before a rename for up to a minute, but opening
        # a file shows what was last closed. Who reads half of it keeps what it read before. A disk
        # that is full or away for a while must not end the thread.
        with self._writing, contextlib.suppress(OSError):
            self._beat += 1
            state = json.dumps(self._state()).encode()
            file = os.open(self._folder / f"{self._me}.json", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.ftruncate(file, os.write(file, state))
            finally:
                os.close(file)

    def _read(self, process: int) -> dict[str, Any] | None:
        try:
            return json.loads((self._folder / f"{process}.json").read_text())
        except (OSError, ValueError):
            return None

    def _sign_off(self, code: int, reason: str) -> None:
        self._left = {"code": code, "reason": reason}
        self._write()

    def _has_left(self, process: int) -> bool:
        state = self._read(process)
        return state is not None and state["left"] is not None

    def _linger(self) -> None:
        """Lets the others go first: process 0 serves JAX's coordinator, without which they are
        aborted before they can say why they leave."""
        deadline = time.monotonic() + LINGER
        alive = [p for p, seen in enumerate(self._seen) if p != self._me and seen.silent < SILENCE]
        while time.monotonic() < deadline and not all(map(self._has_left, alive)):
            time.sleep(BEAT / 20)
        time.sleep(BEAT / 4)


def _may_be_anothers(error: BaseException | None) -> bool:
    """Whether an error may come from a broken connection to another process."""
    while error is not None:
        # On CPUs the library of the collectives is Gloo, whose errors are ValueErrors here.
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
