"""Times the preparation of a corpus beside its alternatives, and then reading datasets.

    python -m benchmarks.data.preparing --tokenizer tokenizer.model

The text is the Python files of this installation and its packages, written once as SlimPajama's
.jsonl.zst and once as StarCoder's .parquet. Three ways take turns, round after round, each time in
new processes that may use the same cores:

- bare: sentencepiece encodes documents that are in memory, in batches, and the lists of ids are
  thrown away. On two cores there are two processes with half of the documents each. Their start is
  not counted.
- original: as in TinyLlama's scripts, a process takes one file after another, encodes document by
  document into a NumPy buffer, and writes the buffer when it is full. Its start is not counted.
- prepare: all that `tinyllama prepare` does, which is listing files, starting processes, reading,
  decompressing, filtering, tokenising, packing, writing, hashing and joining.

Both tables are printed, and written to results/. Reading is measured by reading.py.
"""

import dataclasses
import datetime
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import running
from benchmarks.data import reading
from tinyllama_jax.data.tokenizer import load_tokenizer
from tinyllama_jax.preparation.corpus import prepare_corpus
from tinyllama_jax.preparation.readers import CORPORA, Tally, list_files, read_documents

FILE_BYTES = 2**21  # text in a file
GROUP_BYTES = 2**21  # small, so that this little text has groups for all cores
LARGEST = 200_000  # characters in a document
BATCH = 64  # documents that are encoded by one call
ORIGINAL_BUFFER = 2049 * 1024  # tokens


@dataclasses.dataclass(frozen=True)
class Options:
    tokenizer: Path
    """Tokenizer of Llama 2, or another with no more pieces."""
    megabytes: int = 40
    """Text in each of the two corpora."""
    records: int = 65_536
    """Records of 16 kB in each of the larger datasets that are read."""
    shards: int = 10_000
    """Shards of the dataset that has many."""
    rounds: int = 3
    out: Path = running.RESULTS


def texts(size: int) -> Iterator[str]:
    """Yields the Python files of this installation, up to `size` bytes."""
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if 100 < len(text) < LARGEST:
                yield text
                size -= len(text.encode())
            if size < 0:
                return


def write_corpora(folder: Path, size: int) -> dict[str, int]:
    """Writes both corpora; returns the size of each corpus's files in bytes."""
    parts: list[list[str]] = [[]]
    filled = 0
    for text in texts(size):
        if filled > FILE_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(text)
        filled += len(text)
    for index, part in enumerate(parts):
        meta = {"redpajama_set_name": "RedPajamaC4"}
        rows = "".join(json.dumps({"text": text, "meta": meta}) + "\n" for text in part)
        compressed = pa.compress(rows.encode(), codec="zstd", asbytes=True)
        split = "validation" if index == 0 else "train"
        chunk = folder / f"slimpajama/{split}/chunk{index % 3 + 1}"
        chunk.mkdir(parents=True, exist_ok=True)
        (chunk / f"example_{split}_{index}.jsonl.zst").write_bytes(compressed)
        table = pa.table({"content": part, "max_stars_count": range(len(part))})
        language = folder / "starcoder" / ("python", "python-notebook", "rust")[index % 3]
        language.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, language / f"train-{index:05d}-of-{len(parts):05d}.parquet")
    return {
        name: sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        for name in ("slimpajama", "starcoder")
    }


def documents(name: str, source: Path) -> list[str]:
    """Reads all documents of a corpus into memory."""
    corpus = CORPORA[name]
    files = list_files(corpus, source)[0]
    return [
        text
        for split in files
        for file, _ in files[split]
        for text, _ in read_documents(source, file, corpus, Tally("stop"))
    ]


def bare(name: str, source: Path, tokenizer: Path, part: int, parts: int) -> tuple[float, float]:
    """(seconds, CPU seconds) that sentencepiece takes for every `parts`-th document."""
    processor, mine = load_tokenizer(tokenizer), documents(name, source)[part::parts]
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(mine), BATCH):
        processor.encode(mine[start : start + BATCH], num_threads=1)
    return time.perf_counter() - wall, time.process_time() - cpu


def original(
    name: str, source: Path, tokenizer: Path, part: int, parts: int
) -> tuple[float, float]:
    """(seconds, CPU seconds) that the original's way takes for every `parts`-th file."""
    processor = load_tokenizer(tokenizer)
    files = sorted(path for path in source.rglob("*") if path.is_file())[part::parts]
    buffer, filled = np.zeros(ORIGINAL_BUFFER, np.uint16), 0
    with tempfile.TemporaryDirectory() as out:
        wall, cpu, buffers = time.perf_counter(), time.process_time(), 0
        for path in files:
            for text in _texts_of(path, CORPORA[name].field):
                ids = np.array(processor.encode(text), buffer.dtype)
                while filled + len(ids) > len(buffer):
                    taken = len(buffer) - filled
                    buffer[filled:] = ids[:taken]
                    (Path(out) / f"{buffers:06d}.bin").write_bytes(buffer.tobytes())
                    ids, filled, buffers = ids[taken:], 0, buffers + 1
                buffer[filled : filled + len(ids)] = ids
                filled += len(ids)
        (Path(out) / f"{buffers:06d}.bin").write_bytes(buffer.tobytes())
        return time.perf_counter() - wall, time.process_time() - cpu


def _texts_of(path: Path, field: str) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from pq.read_table(path, columns=[field]).column(field).to_pylist()
        return
    with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
        for line in io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8"):  # pyright: ignore[reportArgumentType]
            row = json.loads(line)
            if row["meta"]["redpajama_set_name"] != "RedPajamaGithub":
                yield row[field]


def ours(name: str, source: Path, tokenizer: Path, cores: int) -> tuple[float, float]:
    """(seconds, CPU seconds) that the whole preparation takes on so many cores."""

    def cpu_seconds() -> float:
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(sum(resource.getrusage(one)[:2]) for one in who)

    corpus = CORPORA[name]
    if corpus.held_out_share:
        # The groups are small: with a larger share, each has a record of validation.
        corpus = dataclasses.replace(corpus, held_out_share=0.05)
    with tempfile.TemporaryDirectory() as out:
        wall, cpu = time.perf_counter(), cpu_seconds()
        prepare_corpus(
            name,
            corpus,
            source,
            tokenizer,
            Path(out) / "d",
            processes=cores,
            group_bytes=GROUP_BYTES,
        )
        return time.perf_counter() - wall, cpu_seconds() - cpu


def take_turn(cores: int, jobs: list[tuple[Callable, tuple]]) -> tuple[float, float]:
    """Calls functions in parallel, each in a new process, on so many cores.

    Returns:
      (the longest of their seconds, the sum of their CPU seconds).
    """
    spawn = multiprocessing.get_context("spawn")
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    with ProcessPoolExecutor(len(jobs), spawn, os.sched_setaffinity, (0, allowed)) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in jobs]
        times = [future.result() for future in futures]
    return max(wall for wall, _ in times), sum(cpu for _, cpu in times)


def main(options: Options) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        sizes = write_corpora(folder, options.megabytes * 10**6)
        processor = load_tokenizer(options.tokenizer)
        held = documents("slimpajama", folder / "slimpajama")
        raw = sum(len(text.encode()) for text in held)
        parts = [
            np.concatenate(processor.encode(held[start : start + BATCH], return_type="numpy"))
            for start in range(0, len(held), BATCH)
        ]
        count, stream = len(held), np.concatenate(parts).astype(np.uint16)
        del held, parts
        prepared = measure(options, folder, len(stream) + count)
        read = reading.measure(folder, stream, options.rounds, options.records, options.shards)
    finally:
        shutil.rmtree(folder)
    files = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
    text = f"{count:,} documents, {raw / 1e6:.0f} MB, {len(stream) + count:,} tokens; {files}."
    report(options.out, options.rounds, text, prepared, read)


def measure(options: Options, folder: Path, tokens: int) -> list[list[str]]:
    """Times all ways in turns; returns the rows of the table, with medians over the rounds."""
    cases = [(name, cores) for name in ("slimpajama", "starcoder") for cores in (1, 2)]
    cases = [case for case in cases if case[1] <= len(os.sched_getaffinity(0))]
    times: dict[tuple, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for name, cores in cases:
            common = (name, folder / name, options.tokenizer.absolute())
            for function in (bare, original):
                parts = [(function, (*common, part, cores)) for part in range(cores)]
                times.setdefault((name, cores, function), []).append(take_turn(cores, parts))
            turn = take_turn(cores, [(ours, (*common, cores))])
            times.setdefault((name, cores, ours), []).append(turn)

    def ratio(above: tuple, below: tuple, which: int = 0) -> str:
        pairs = zip(times[above], times[below], strict=True)
        return f"{statistics.median(a[which] / b[which] for a, b in pairs):.2f}"

    rows = []
    for name, cores in cases:
        row = [name, str(cores)]
        for function in (bare, original, ours):
            speeds = [tokens / seconds / 1e6 for seconds, _ in times[name, cores, function]]
            median, low, high = statistics.median(speeds), min(speeds), max(speeds)
            row.append(f"{median:.2f} ({low:.2f}-{high:.2f})")
        mine = (name, cores, ours)
        row += [ratio((name, cores, bare), mine), ratio((name, cores, bare), mine, 1)]
        row += [ratio((name, cores, original), mine), ratio((name, 1, ours), mine)]
        rows.append(row)
    return rows


COLUMNS = ["files", "cores", "bare", "original", "prepare"]
COLUMNS += ["/ bare", "/ bare, CPU", "/ original", "/ one core"]


def report(out: Path, rounds: int, text: str, prepared: list, read: list) -> None:
    """Prints both tables, and writes them to a file with the date in its name."""
    names = ("sentencepiece", "array-record", "pyarrow", "grain")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    load = "/".join(f"{number:.1f}" for number in os.getloadavg())
    date = datetime.date.today().isoformat()
    machine = (
        f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores; load average at "
        f"the end {load}, in which this is about 2: other work was there if it is above the cores."
    )
    speeds = (
        f"{text} Million tokens/s by the clock: median (slowest-fastest) of {rounds} rounds. /: "
        "how many times as fast prepare is as another in the same round, their median; by CPU "
        "seconds, which other work on the machine disturbs less."
    )
    lines = [f"# Preparing and reading data, {date}", "", machine]
    for title, columns, rows, legend in (
        ("Preparing", COLUMNS, prepared, speeds),
        ("Reading", reading.COLUMNS, read, f"{reading.LEGEND} {rounds} rounds."),
    ):
        table = Table(*columns, title=f"{title}, {date}", caption=legend)
        lines += ["", f"## {title}", "", legend, ""]
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for row in rows:
            table.add_row(*row)
            lines.append(f"| {' | '.join(row)} |")
        Console().print(table)
    print(machine)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"data-{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
