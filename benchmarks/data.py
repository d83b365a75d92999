"""Preparing a corpus beside bare sentencepiece on the same text and cores.

    python benchmarks/data.py --tokenizer tokenizer.model    # a table, and a file in results/

The text is the Python files of this installation and its packages, written once as SlimPajama's
.jsonl.zst and once as StarCoder's .parquet. The contenders take turns, round after round, each
time in a fresh process that may use the same cores. Bare sentencepiece gets documents that are in
memory, in batches, and gives lists of ids that are thrown away; on two cores it runs in two
processes, half of the documents each, and its start is not counted. Preparing is all of
`tinyllama prepare`: listing, starting processes, reading, decompressing, filters, tokenising,
packing, writing, hashing and joining.
"""

import dataclasses
import datetime
import importlib.metadata
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

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from rich.console import Console
from rich.table import Table

from tinyllama_jax.data.corpus import prepare_corpus
from tinyllama_jax.data.readers import CORPORA, Tally, list_files, read_documents
from tinyllama_jax.data.tokenizer import load_tokenizer

FILE_BYTES = 2**21  # of text
GROUP_BYTES = 2**21  # small, so that this little text has groups for all cores
LARGEST = 200_000  # characters of a document
BATCH = 64  # documents


@dataclasses.dataclass(frozen=True)
class Options:
    tokenizer: Path
    megabytes: int = 100
    """Of text, in each of the two corpora."""
    rounds: int = 3
    out: Path = Path(__file__).parent / "results"


def texts(size: int) -> Iterator[str]:
    """Python files of this installation, up to `size` bytes."""
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if 100 < len(text) < LARGEST:
                yield text
                size -= len(text.encode())
            if size < 0:
                return


def write_corpora(folder: Path, size: int) -> dict[str, int]:
    """Writes both corpora; returns the bytes of each one's files."""
    parts: list[list[str]] = [[]]
    filled = 0
    for text in texts(size):
        if filled > FILE_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(text)
        filled += len(text)
    for split in ("train", "validation"):
        (folder / "slimpajama" / split / "chunk1").mkdir(parents=True)
    (folder / "starcoder" / "python").mkdir(parents=True)
    for index, part in enumerate(parts):
        meta = {"redpajama_set_name": "RedPajamaC4"}
        rows = "".join(json.dumps({"text": text, "meta": meta}) + "\n" for text in part)
        compressed = pa.compress(rows.encode(), codec="zstd", asbytes=True)
        split = "validation" if index == 0 else "train"
        file = folder / f"slimpajama/{split}/chunk1/part_{index:04d}.jsonl.zst"
        file.write_bytes(compressed)
        table = pa.table({"content": part, "max_stars_count": range(len(part))})
        pq.write_table(table, folder / f"starcoder/python/part-{index:04d}.parquet")
    return {
        name: sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        for name in ("slimpajama", "starcoder")
    }


def documents(name: str, source: Path) -> list[str]:
    """All documents of a corpus, in memory."""
    corpus = CORPORA[name]
    files = list_files(corpus, source)[0]
    return [
        text
        for split in files
        for file, _ in files[split]
        for text, _ in read_documents(source, file, corpus, Tally("stop"))
    ]


def bare(name: str, source: Path, tokenizer: Path, part: int, parts: int) -> tuple[float, float]:
    """(seconds, CPU seconds) of bare sentencepiece on every `parts`-th document."""
    processor, mine = load_tokenizer(tokenizer), documents(name, source)[part::parts]
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(mine), BATCH):
        processor.encode(mine[start : start + BATCH], num_threads=1)
    return time.perf_counter() - wall, time.process_time() - cpu


def ours(name: str, source: Path, tokenizer: Path, cores: int) -> tuple[float, float]:
    """(seconds, CPU seconds) of the whole preparation."""

    def cpu_seconds() -> float:
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(sum(resource.getrusage(one)[:2]) for one in who)

    corpus = CORPORA[name]
    if corpus.held_out_share:
        # Small groups need a larger share for a record of validation.
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
    """(longest seconds, sum of CPU seconds) of functions, each in a fresh process on `cores`."""
    spawn = multiprocessing.get_context("spawn")
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    with ProcessPoolExecutor(len(jobs), spawn, os.sched_setaffinity, (0, allowed)) as pool:
        found = [pool.submit(function, *arguments) for function, arguments in jobs]
        times = [future.result() for future in found]
    return max(wall for wall, _ in times), sum(cpu for _, cpu in times)


def main(options: Options) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        sizes = write_corpora(folder, options.megabytes * 10**6)
        processor = load_tokenizer(options.tokenizer)
        held = documents("slimpajama", folder / "slimpajama")
        raw = sum(len(text.encode()) for text in held)
        tokens = len(held)
        for start in range(0, len(held), BATCH):
            tokens += sum(map(len, processor.encode(held[start : start + BATCH])))
        count = len(held)
        del held
        rows = measure(options, folder, tokens)
    finally:
        shutil.rmtree(folder)
    sizes = {name: f"{size / 1e6:.0f} MB" for name, size in sizes.items()}
    report(options, rows, f"{count:,} documents, {raw / 1e6:.0f} MB, {tokens:,} tokens", sizes)


def measure(options: Options, folder: Path, tokens: int) -> list[list[str]]:
    """Rows of the table: medians over the rounds."""
    cases = [(name, cores) for name in ("slimpajama", "starcoder") for cores in (1, 2)]
    cases = [case for case in cases if case[1] <= len(os.sched_getaffinity(0))]
    times: dict[tuple, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for name, cores in cases:
            common = (name, folder / name, options.tokenizer.absolute())
            halves = [(bare, (*common, part, cores)) for part in range(cores)]
            times.setdefault((name, cores, "bare"), []).append(take_turn(cores, halves))
            turn = take_turn(cores, [(ours, (*common, cores))])
            times.setdefault((name, cores, "ours"), []).append(turn)
    rows = []
    for name, cores in cases:
        pairs = list(zip(times[name, cores, "bare"], times[name, cores, "ours"], strict=True))
        row = [name, str(cores)]
        for which in (0, 1):
            speeds = [tokens / pair[which][0] for pair in pairs]
            median, low, high = statistics.median(speeds), min(speeds), max(speeds)
            row.append(f"{median:,.0f} ({low:,.0f}-{high:,.0f})")
        row.append(f"{statistics.median(b[0] / o[0] for b, o in pairs):.2f}")
        row.append(f"{statistics.median(b[1] / o[1] for b, o in pairs):.2f}")
        rows.append(row)
    return rows


def report(options: Options, rows: list[list[str]], text: str, sizes: dict[str, str]) -> None:
    """Shows the table and writes it, dated, into the results."""
    names = ("sentencepiece", "array-record", "pyarrow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    load = "/".join(f"{number:.1f}" for number in os.getloadavg())
    columns = ["files", "cores", "bare, tokens/s", "prepare, tokens/s", "ratio", "ratio of CPU"]
    legend = [
        f"{text}; {', '.join(f'{name} {size}' for name, size in sizes.items())}. Python "
        f"{platform.python_version()}, {versions}, {os.cpu_count()} cores, load average {load}.",
        f"Tokens/s: median (slowest-fastest) of {options.rounds} rounds, by the clock. Ratio: "
        "median of prepare over bare in the same round; of CPU: by CPU seconds, which other work "
        "on the machine disturbs less: there was some where the load average is above the cores.",
    ]
    date = datetime.date.today().isoformat()
    table = Table(*columns, title=f"Preparing data, {date}", caption="\n".join(legend))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = [f"# Preparing data, {date}", "", *legend, ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"data-{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
