"""Groups of a corpus over the cores of one machine, with their progress."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from tinyllama_jax.errors import UserError, require
from tinyllama_jax.files import remove_leftovers, write_aside
from tinyllama_jax.preparation.groups import Group, Preparation, write_group

SECONDS = 1.0  # between two looks at the progress


def run_groups(
    preparation: Preparation,
    groups: Sequence[Group],
    processes: int | None = None,
    label: str = "",
) -> None:
    """Writes the groups, each in one process; cores that are left over become tokenizer threads.

    Args:
      preparation: what all groups share.
      groups: which to do.
      processes: at most so many at a time; all cores that this process may use by default.
      label: tells the progress of several workers apart: `progress{label}.json`.

    Raises:
      UserError: what `write_group` raises in any process, or a process that died.
    """
    if not groups:
        return
    require(processes is None or processes > 0, f"--processes is {processes}: give 1 or more.")
    cores = processes or available_cores()
    workers = min(cores, len(groups))
    threads = cores // workers
    with _Progress(preparation, groups, label) as progress:
        if workers == 1:
            for group in groups:
                write_group(preparation, group, progress.add, threads)
                progress.groups_done += 1
        else:
            _run_in_processes(preparation, groups, workers, threads, progress)


def available_cores() -> int:
    """Cores that this process may use, where the system tells; else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run_in_processes(preparation, groups, workers: int, threads: int, progress) -> None:
    # Spawned: a fork would copy the locks of this process's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 2)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _begin_process, (counters,)) as pool:
        try:
            pending = {pool.submit(_work, preparation, group, threads) for group in groups}
            while pending:
                done, pending = wait(pending, SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                    progress.groups_done += 1
                # Without its lock, which a process that was killed may hold.
                progress.show(*counters.get_obj())
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
                process.join()
            pool.shutdown(wait=False, cancel_futures=True)
            remove_leftovers(preparation.folder)
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "A process that prepared data was killed, perhaps for want of memory: the same "
                    "command goes on, with fewer --processes if need be."
                ) from None
            raise


_counters = None  # of this process's pool


def _begin_process(counters) -> None:
    global _counters
    _counters = counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _work(preparation: Preparation, group: Group, threads: int) -> None:
    write_group(preparation, group, _count, threads)


def _count(bytes_read: int, tokens: int) -> None:
    assert _counters
    with _counters.get_lock():
        _counters[0] += bytes_read
        _counters[1] += tokens


class _Progress:
    """A bar for people and progress.json for programs."""

    def __init__(self, preparation: Preparation, groups: Sequence[Group], label: str):
        self.file: Path = preparation.folder / "groups" / f"progress{label}.json"
        self.bytes = self.tokens = self.groups_done = 0
        self.groups, self.total = len(groups), sum(group.size() for group in groups)
        self.start = self.last = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            transient=True,
        )
        self.task = self.bar.add_task(preparation.name, total=self.total, speed="")

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()
        # Best effort: a full disk is told by the group that met it.
        with contextlib.suppress(UserError):
            self._write()

    def add(self, bytes_read: int, tokens: int) -> None:
        self.show(self.bytes + bytes_read, self.tokens + tokens)

    def show(self, bytes_read: int, tokens: int) -> None:
        self.bytes, self.tokens = bytes_read, tokens
        if time.monotonic() - self.last >= SECONDS:
            self.last = time.monotonic()
            self.bar.update(self.task, completed=self.bytes, speed=f"{self._speed():,.0f} tokens/s")
            self._write()

    def _speed(self) -> float:
        return self.tokens / max(time.monotonic() - self.start, 1e-9)

    def _write(self) -> None:
        elapsed = time.monotonic() - self.start
        left = elapsed * (self.total / self.bytes - 1) if self.bytes else None
        facts = {
            "time": time.time(),
            "groups": self.groups,
            "groups_done": self.groups_done,
            "bytes": self.total,
            "bytes_read": self.bytes,
            "tokens": self.tokens,
            "tokens_per_sec": self._speed(),
            "seconds_left": left,
        }
        write_aside(self.file, json.dumps(facts) + "\n")


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
