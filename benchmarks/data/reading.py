"""Measures reading a dataset as training does: time to the first batch, speed, and memory."""

import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.data.format import MANIFEST, RECORD
from tinyllama_jax.data.mixture import Mixture, batches
from tinyllama_jax.data.rows import Rows
from tinyllama_jax.preparation.shards import (
    ShardWriter,
    shard_name,
    token_features,
    write_tfds_metadata,
)

VOCAB, CONTEXT = 32_000, 2048
MICRO_BATCHES, ROWS = 8, 64  # one of two nodes reads these for a step of the 1.1B on 16 GPUs
SHARD_RECORDS = 2**14  # records in a shard of a real dataset, 268 MB of tokens
FEW_SHARDS = 4
STEPS = {"page cache": 90, "cold disk": 45}  # fewer from a cold disk: reading warms it


def write_dataset(folder: Path, stream: np.ndarray, shards: int, records: int) -> Path:
    """Writes a dataset whose records start at random positions of a stream of tokens."""
    folder.mkdir()
    features, rng, written = token_features(VOCAB), np.random.default_rng(0), []
    for index in range(shards):
        writer = ShardWriter(folder / shard_name("tokens", "train", index, shards), features)
        count = records * (index + 1) // shards - records * index // shards
        starts = rng.integers(0, len(stream) - RECORD, count)
        writer.write(stream[start : start + RECORD + 1] for start in starts)
        written.append(writer.finish())
    splits = {"train": {"records": records, "padding_tokens": 0, "shards": written}}
    write_tfds_metadata(folder, "tokens", features, splits)
    facts = {"tokenizer": {"sha256": "", "pieces": VOCAB}, "splits": splits}
    (folder / MANIFEST).write_text(json.dumps(facts))
    return folder


def set_page_cache(folder: Path, cache: str) -> None:
    """Reads all shards into the page cache, or asks the kernel to drop them from it."""
    for path in folder.glob("*array_record*"):
        with open(path, "rb") as file:
            if cache == "page cache":
                while file.read(2**24):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(name: str) -> float:
    """Memory of this process in MB: the current with VmRSS, the largest so far with VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


def read(folder: Path, cache: str) -> dict[str, float]:
    """Reads the batches of some steps; returns times, speed and memory.

    These are `first` (seconds to the first batch), `speed` (tokens/s after it), and `third` and
    `end` (MB that the process has grown by, after a third of the steps and at the end).
    """
    before, steps, start = memory("VmRSS"), STEPS[cache], time.perf_counter()
    rows = Rows(folder, "train", CONTEXT, VOCAB)
    order = {"seed": 0, "start": 0, "micro_batches": MICRO_BATCHES, "rows": ROWS}
    stream = batches([rows], Mixture([1.0]), **order)
    next(stream)
    first = time.perf_counter()
    for step in range(steps):
        next(stream)
        if step == steps // 3:
            third = memory("VmHWM")
    seconds = time.perf_counter() - first
    return {
        "first": first - start,
        "speed": steps * MICRO_BATCHES * ROWS * CONTEXT / seconds,
        "third": third - before,
        "end": memory("VmHWM") - before,
    }


def measure(folder: Path, stream: np.ndarray, rounds: int, records: int, many: int) -> list[Any]:
    """Reads three datasets in each round, each in a new process on two cores.

    Args:
      folder: where the datasets are written.
      stream: tokens that they are made of.
      rounds: how often each is read.
      records: records in each of the two larger datasets; the smaller has a quarter of them.
      many: shards of the dataset that has many.

    Returns:
      The rows of the table, with medians over the rounds.
    """
    cases = {
        f"{shards:,}": (write_dataset(folder / f"{shards}-shards", stream, shards, count), count)
        for shards, count in ((1, records // FEW_SHARDS), (FEW_SHARDS, records), (many, records))
    }
    cores, spawn = sorted(os.sched_getaffinity(0))[:2], multiprocessing.get_context("spawn")
    by_case: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for shards, (dataset, _) in cases.items():
            for cache in STEPS:
                set_page_cache(dataset, cache)
                with ProcessPoolExecutor(1, spawn, os.sched_setaffinity, (0, cores)) as pool:
                    turn = pool.submit(read, dataset, cache).result()
                by_case.setdefault((shards, cache), []).append(turn)
    table = []
    for (shards, cache), turns in by_case.items():
        speeds = [turn["speed"] / 1e6 for turn in turns]
        median = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        table.append(
            [
                shards,
                f"{cases[shards][1] * (RECORD + 1) * 2 / 1e6:,.0f}",
                cache,
                f"{statistics.median(speeds):.1f} ({min(speeds):.1f}-{max(speeds):.1f})",
                f"{median['first']:.2f}",
                f"{median['third']:.0f}",
                f"{median['end']:.0f}",
            ]
        )
    return table


COLUMNS = ["shards", "MB of tokens", "from", "million tokens/s", "first batch, s"]
COLUMNS += ["MB, a third", "MB, all"]
LEGEND = (
    f"Batches of {MICRO_BATCHES} x {ROWS} rows of {CONTEXT} shuffled tokens, ready for a device, "
    "on two cores: median (slowest-fastest) over "
    f"{STEPS['page cache']} steps, or {STEPS['cold disk']} from files that the kernel was asked to "
    "forget. First batch: from opening the dataset. MB: the process's peak above what it had after "
    "its imports, a third of the way and at the end."
)
