"""A watchdog: ends every process of a run when one of them is gone or stands still.

JAX's own heartbeats cannot do this. They do not notice a process that is alive but stuck, they do
not say which process it was, and they end the others by an abort with a page of C++ messages.
"""

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

from tinyllama_jax.errors import ExitCode, UserError, first_line, require
from tinyllama_jax.files import make_folder
from tinyllama_jax.runtime.processes import every, exit_code, tell, together

BEAT = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without a sign of life after which a process counts as dead or stopped

# Phase -> the seconds for which a living process may stay in it while others wait for it. A phase
# has as much time as its slowest honest case needs, so that no slow run is ended by mistake.
PATIENCE = {
    "start": 3600,  # reads and hashes the weights, and compiles the first step
    "data": 40,  # short, because the reader always holds several batches ready
    "compile": 3600,  # compiles the step again for another batch size
    "step": 1200,  # for the first steps; once `TIMED` were timed, `STEP` and `SLOWER` hold
    "save": 3600,  # may wait for the previous checkpoint on a slow disk
    "validation": 6 * 3600,  # the one at the end reads all held-out rows
    "evaluation": 6 * 3600,  # the slowest task has 200,000 requests
    "sample": 1200,
    "profile": 3600,  # process 0 analyzes the trace, and the others wait for it
    "end": 6 * 3600,  # fits simple models to the held-out rows, for comparison
}
# Seconds at least if no process is ahead of the others: then all may be equally slow.
STANDSTILL = 3600
# A step of a run with several processes may take `SLOWER` times the longest step so far, but always
# `STEP` seconds, once `TIMED` steps were timed. A GPU that hangs stops all processes in the same
# step, so that none is ahead, and `STANDSTILL` alone would waste an hour.
STEP = 45
SLOWER = 10
TIMED = 3

LINGER = 10.0  # seconds for which process 0 waits for the others to leave before it
UNWINDING = 120.0  # seconds that a process with an error has to close its files


@dataclasses.dataclass
class _Seen:
    """What this process knows about one process, which may be itself."""

    state: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The content of its file, as `Watch._state` makes it."""
    silent: float = 0.0
    """Seconds since its last sign of life."""
    still: float = 0.0
    """Seconds since it entered its current phase."""


@contextlib.contextmanager
def watched(run_folder: Path) -> Iterator["Watch"]:
    """Watches the processes of a run during the block, which all of them must enter.

    At the end of the block a process waits for the others. If the block raises an error, the
    process tells the others at once, so that they end too.

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
    """Signs of life of all processes as files in `RUN/processes/`, and the verdict on them.

    A thread of each process writes the file of its own process and reads those of the others. The
    files hold no times, because the clocks of machines differ: a reader measures by its own clock
    for how long a file has not changed. It counts only time in which its own thread was running,
    so that nobody seems late after a laptop slept or a job was suspended.

    All processes run the same program. So the number of calls of `at` that a process has made says
    how far it is, and the smallest number tells which process the others wait for. In a run of one
    process nothing is written, and the thread only notices a standstill.
    """

    def __init__(self, run_folder: Path):
        self._me, self._count = jax.process_index(), jax.process_count()
        self._folder = run_folder / "processes"
        self._host = socket.gethostname()
        # One tuple of (number of `at` calls, phase, step), because the thread reads it while the
        # main thread replaces it: it must never see a half of each.
        self._place = (0, "start", 0)
        self._left: dict[str, Any] | None = None
        self._beat = 0
        # How many steps were timed, the longest of them, and when the current phase began.
        self._timed, self._longest, self._since = 0, 0.0, time.monotonic()
        self._seen = [_Seen() for _ in range(self._count)]
        self._told = 0  # beats since another process was seen to have left with an error
        self._error: BaseException | None = None
        self._closing = 0.0  # seconds since this process had an error
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        # Kept in an attribute: C holds a pointer to it, which does not keep the object alive.
        self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)

    def at(self, phase: str, step: int) -> None:
        """Announces the phase, a key of `PATIENCE`, that this process enters now."""
        assert phase in PATIENCE
        now = time.monotonic()
        if self._place[1] == "step":
            self._timed, self._longest = self._timed + 1, max(self._longest, now - self._since)
        self._place, self._since = (self._place[0] + 1, phase, step), now

    def start(self) -> None:
        """Meets the other processes and starts the thread. All processes together."""
        if self._count > 1:
            self._meet()
        if self._me > 0:
            # C's `signal` and not Python's: Python runs its handlers in the main thread, between
            # two bytecodes, and the main thread is inside a collective when the abort comes.
            ctypes.CDLL(None).signal(signal.SIGABRT, self._aborted)
        self._thread.start()

    def leave(self) -> None:
        """Ends the watch when all processes have called this. All processes together."""
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
        """Tells the other processes that this one ends with an error.

        An error that may be the mere consequence of another process's end is held back until the
        thread has found out whether a process is gone. If one is, the thread names it and ends this
        process, and this function does not return.
        """
        if self._count == 1:
            self._ended.set()
            return
        if _may_be_anothers(error):
            # Longer than the thread needs to declare a process gone.
            time.sleep(SILENCE + 5 * BEAT)
        code = exit_code(error)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        self._sign_off(
            code,
            f"process {self._me} on {self._host} left with exit code {code} "
            f"({kind}{first_line(error)})",
        )
        self._error = error
        if self._me == 0:
            self._linger()

    def _meet(self) -> None:
        """Writes the first sign of life, and waits for those of all others."""
        if self._me == 0:
            shutil.rmtree(self._folder, ignore_errors=True)  # files of a run that was killed
        every("")  # a barrier: nobody writes before the old files are removed
        make_folder(self._folder)
        self._write()
        # A barrier: nobody looks for a file before it exists, since NFS would cache its absence.
        every("")
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
        """Handles SIGABRT: delays the abort until the thread has said which process is gone.

        Process 0 serves JAX's coordinator. When it is gone, JAX aborts all other processes within a
        second, long before the watch could name it. So the handler waits. If process 0 turns out to
        be silent, the thread prints its sentence and ends this process with the watchdog's exit
        code. If process 0 is alive, the abort was this process's own fault and takes its course.
        """
        time.sleep(4 * BEAT)
        if self._seen[0].silent > 2 * BEAT:
            time.sleep(SILENCE)
        os._exit(128 + number)  # what a shell reports for a process that a signal has ended

    def _run(self) -> None:
        """The thread: looks every `BEAT` seconds, and ends the process if the run cannot go on."""
        last = time.monotonic()
        while not self._ended.wait(BEAT):
            now = time.monotonic()
            # More time than two beats between two rounds means that the machine slept or the
            # process was suspended. Others had no chance to show signs of life in that time.
            lived, last = min(now - last, 2 * BEAT), now
            if self._error is not None:
                self._closing += lived
                if self._closing > UNWINDING:  # closing the files waits for a process that is gone
                    tell(self._error)
                    os._exit(exit_code(self._error))
                continue
            self._look(lived)
            verdict = self._verdict()
            if verdict is not None and self._error is None:
                code, line = verdict
                Console().show_cursor()  # a progress bar has hidden it, and nobody closes the bar
                print(f"tinyllama: {line}", file=sys.stderr, flush=True)
                if self._count > 1:
                    self._sign_off(code, line)
                    if self._me == 0:
                        self._linger()
                # Not sys.exit, which would only end this thread. The main thread may wait in a
                # collective for ever.
                os._exit(code)

    def _look(self, lived: float) -> None:
        """Writes this process's state, and reads those of all others.

        `lived` is the time since the last look, in seconds, without any in which this process was
        not running.
        """
        if self._count > 1:
            self._write()
        for process, seen in enumerate(self._seen):
            state = self._state() if process == self._me else self._read(process) or seen.state
            before, seen.state = seen.state, state
            seen.silent = 0.0 if state.get("beat") != before.get("beat") else seen.silent + lived
            seen.still = 0.0 if state.get("moves") != before.get("moves") else seen.still + lived

    def _verdict(self) -> tuple[int, str] | None:
        """Returns an exit code and the reason if the run cannot go on, else None."""
        for process, seen in enumerate(self._seen):
            if process == self._me:
                continue  # whoever runs this is neither gone nor silent
            left = seen.state.get("left")
            if left is not None and left["code"]:
                # Two beats of grace: if all processes have the same error, this one will raise and
                # report it by itself.
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
        """Returns how many seconds the process that is furthest back may stay in its phase.

        `behind` says whether any other process is further than that one.
        """
        if phase == "step" and self._count > 1 and self._timed >= TIMED:
            return max(STEP, SLOWER * self._longest)
        return PATIENCE[phase] if behind else max(PATIENCE[phase], STANDSTILL)

    def _state(self) -> dict[str, Any]:
        """Returns what the file of this process tells the others."""
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
        # The file is overwritten in place, not replaced by a rename as elsewhere. After a rename
        # another machine may see the old file under that name for up to a minute on NFS, whereas
        # opening a file shows what was last written and closed. A reader that meets half a file
        # keeps its previous reading. Errors are ignored, because a disk that is full or unreachable
        # for a while must not end the thread.
        with self._writing, contextlib.suppress(OSError):
            self._beat += 1
            state = json.dumps(self._state()).encode()
            file = os.open(self._folder / f"{self._me}.json", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.ftruncate(file, os.write(file, state))
            finally:
                os.close(file)

    def _read(self, process: int) -> dict[str, Any] | None:
        """Reads the state of a process; None if its file is missing or half written."""
        try:
            return json.loads((self._folder / f"{process}.json").read_text())
        except (OSError, ValueError):
            return None

    def _sign_off(self, code: int, reason: str) -> None:
        """Tells the others that this process leaves, with which exit code and why."""
        self._left = {"code": code, "reason": reason}
        self._write()

    def _has_left(self, process: int) -> bool:
        state = self._read(process)
        return state is not None and state["left"] is not None

    def _linger(self) -> None:
        """Waits for the other processes to leave.

        Process 0 serves JAX's coordinator. If it left first, JAX would abort the others before they
        can say why they leave.
        """
        deadline = time.monotonic() + LINGER
        alive = [p for p, seen in enumerate(self._seen) if p != self._me and seen.silent < SILENCE]
        while time.monotonic() < deadline and not all(map(self._has_left, alive)):
            time.sleep(BEAT / 20)
        time.sleep(BEAT / 4)


def _may_be_anothers(error: BaseException | None) -> bool:
    """Returns whether an error may come from a broken connection to another process."""
    while error is not None:
        # Collectives on CPUs run in Gloo, whose errors reach Python as ValueError.
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
