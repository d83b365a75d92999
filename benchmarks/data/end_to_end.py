"""Tests the way from a corpus to a trained model: prepared in every way, verified, and mixed.

    python -m benchmarks.data.end_to_end   # needs the beam extra

The corpora are those of preparing.py, with a tokenizer trained on the beginning of their text.
Every way of preparing must write the same bytes into every file. In the last way the whole process
group is killed at random moments and preparing starts again. Then a small Llama is trained on both
corpora, mixed as TinyLlama mixed them. The table is printed, and written to results/. The exit code
is 1 if anything is wrong.
"""

import dataclasses
import datetime
import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import running
from benchmarks.data.preparing import texts, write_corpora
from tinyllama_jax import cli
from tinyllama_jax.config import DEMO
from tinyllama_jax.data.format import read_manifest
from tinyllama_jax.data.tokenizer import file_sha256, train_tokenizer
from tinyllama_jax.preparation import readers
from tinyllama_jax.preparation.corpus import prepare_corpus

SHARES = {"slimpajama": 0.693584, "starcoder": 0.306416}
# The groups are small: with a larger share, each has a record of validation.
CORPORA = readers.CORPORA | {
    "starcoder": dataclasses.replace(readers.CORPORA["starcoder"], held_out_share=0.02)
}
PIECES = 4096  # vocabulary of the tokenizer
ROW = 2048  # tokens in a row that best fit fills
SPAWN = multiprocessing.get_context("spawn")

CONFIG = """
import dataclasses
from tinyllama_jax.config import *

def get_config():
    sources = tuple(SourceConfig(name, {folder!r} + "/" + name, share)
                    for name, share in {shares!r}.items())
    return Config(
        run_folder={folder!r} + "/run",
        model=dataclasses.replace(DEMO, vocab_size={pieces}, width=64, layers=2),
        data=DataConfig(sources, tokenizer={folder!r} + "/tokenizer.model"),
        steps={steps}, batch_rows=16, micro_batches=2,
        log_every=1, optimizer=OptimizerConfig(peak_lr=3e-3, end_lr=3e-4, warmup_steps=2),
        checkpoint=CheckpointConfig(every={steps}), validation=ValidationConfig(every={steps}),
        sample=SampleConfig(every={steps}, prompts=("The",)),
    )
"""


@dataclasses.dataclass(frozen=True)
class Options:
    megabytes: int = 200
    """Text, half of it in each corpus."""
    group_kilobytes: int = 2000
    """About how much a group of records holds; it is small, so that there are many groups."""
    kills: int = 10
    steps: int = 30
    seed: int = 0
    out: Path = running.RESULTS


@dataclasses.dataclass(frozen=True)
class Task:
    """A corpus that is to be prepared."""

    name: str
    source: Path
    tokenizer: Path
    out: Path
    group_bytes: int

    def run(self, started, **options) -> None:
        """Prepares the corpus in a process group of its own, which can be killed as a whole."""
        os.setsid()
        started.set()
        folders = self.source, self.tokenizer, self.out
        prepare_corpus(
            self.name, CORPORA[self.name], *folders, group_bytes=self.group_bytes, **options
        )


def begin(task: Task, **options):
    """Starts preparing in a new process; returns the process when it is about to prepare."""
    started = SPAWN.Event()
    process = SPAWN.Process(target=functools.partial(task.run, started, **options))
    process.start()
    while not started.wait(0.01) and process.is_alive():
        pass
    return process


def end(*processes) -> None:
    """Waits for processes; ends the program if one failed."""
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit(f"Preparing failed with exit code {process.exitcode}.")


def by_processes(task: Task, processes: int) -> None:
    end(begin(task, processes=processes))


def by_workers(task: Task, workers: int) -> None:
    end(*[begin(task, worker=(index, workers), processes=1) for index in range(workers)])
    # If the last two workers each saw a group of the other missing, the groups are not joined yet.
    end(begin(task))


def by_beam(task: Task) -> None:
    end(begin(task, runner="DirectRunner"))


def killed(task: Task, kills: int, groups: int, rng: random.Random) -> None:
    """Prepares, killed several times: after random numbers of groups, while others are written."""
    for done in sorted(rng.uniform(0, 0.8) * groups for _ in range(kills)):
        before, process = unfinished_shards(task), begin(task, processes=2)
        while process.is_alive() and (
            done_groups(task) < done or unfinished_shards(task) <= before
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        if not process.is_alive():
            sys.exit(f"It was done before the last of {kills} kills: give more --megabytes.")
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    end(begin(task))


def done_groups(task: Task) -> int:
    return len(list((task.out.with_name(f"{task.name}.partial") / "groups").glob("[0-9]*.json")))


def unfinished_shards(task: Task) -> set[str]:
    """Names of shards that are being written; the number of the process is in them."""
    return {path.name for path in task.out.with_name(f"{task.name}.partial").glob(".*-*")}


def hashes(folder: Path) -> dict[str, str]:
    """File -> its sha256, for all files in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}


def prepare(options: Options, folder: Path, name: str) -> list[list[str]]:
    """Prepares a corpus in every way; returns the rows of the table.

    The dataset that the last way wrote stays in `folder/name`.
    """
    rows, expected, groups = [], {}, 0
    rng = random.Random(f"{options.seed} {name}")
    ways: dict[str, Callable[[Task], None]] = {
        "2 processes": lambda task: by_processes(task, 2),
        "1 process": lambda task: by_processes(task, 1),
        "3 workers at once": lambda task: by_workers(task, 3),
        "Beam's DirectRunner": by_beam,
        f"killed {options.kills} times": lambda task: killed(task, options.kills, groups, rng),
    }
    for way, function in ways.items():
        out = folder / name
        shutil.rmtree(out, ignore_errors=True)
        source, tokenizer = folder / "corpora" / name, folder / "tokenizer.model"
        task = Task(name, source, tokenizer, out, options.group_kilobytes * 1000)
        start = time.perf_counter()
        function(task)
        seconds = time.perf_counter() - start
        written = hashes(out)
        expected = expected or written
        leftovers = [path.name for path in folder.glob(f"{name}.*")]
        same = written == expected and not leftovers
        whole = cli.main(["verify", str(out)]) == 0
        splits = read_manifest(out)["splits"].values()
        groups = 1 + max(shard["group"] for split in splits for shard in split["shards"])
        counts = sum(len(split["shards"]) for split in splits), sum(s["tokens"] for s in splits)
        checks = ("yes" if good else "NO" for good in (same, whole))
        rows.append([name, way, f"{seconds:.1f}", *(f"{count:,}" for count in counts), *checks])
    return rows


def fill_rate(options: Options, folder: Path, name: str) -> str:
    """A sentence on how full best fit makes the rows of a corpus."""
    source, tokenizer = folder / "corpora" / name, folder / "tokenizer.model"
    manifest = prepare_corpus(
        name, CORPORA[name], source, tokenizer, folder / "packed" / name, best_fit=ROW
    )
    assert manifest
    facts = manifest["splits"]["train"]
    return (
        f"{name} by best fit: rows of {ROW} tokens filled to {facts['fill_rate']:.2%}, "
        f"{facts['cut_documents']:,} of {facts['documents']:,} documents cut."
    )


def train(options: Options, folder: Path) -> str:
    """Trains on the mixture by the command line; returns a sentence on the result."""
    text = CONFIG.format(folder=str(folder), shares=SHARES, pieces=PIECES, steps=options.steps)
    (folder / "config.py").write_text(text)
    code = cli.main(["train", str(folder / "config.py")])
    written = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [metrics for metrics in map(json.loads, written) if "train/loss" in metrics]
    last = steps[-1]
    rows = options.steps * 16
    for name, share in SHARES.items():
        taken = last[f"data/{name}/tokens"] / DEMO.context
        if abs(taken - share * rows) > 1:
            sys.exit(f"{taken} of {rows} rows are of {name}, not {share}.")
    losses = [metrics["train/loss"] for metrics in steps]
    if code or not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        sys.exit(f"Training ended with exit code {code}, losses {losses}.")
    return (
        f"{len(losses)} steps on the mixture: loss {losses[0]:.3f} to {losses[-1]:.3f}; "
        + ", ".join(f"{name} {last[f'data/{name}/tokens']:,} tokens" for name in SHARES)
    )


COLUMNS = ("corpus", "way", "seconds", "shards", "tokens", "same bytes", "verified")


def main(options: Options) -> int:
    """Returns the exit code: 1 if a way left other bytes, or a dataset that is not whole."""
    # As this process ends, Python would warn of what the killed ones left in shared memory.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    folder = Path(tempfile.mkdtemp())
    try:
        sizes = write_corpora(folder / "corpora", options.megabytes * 10**6 // 2)
        beginning = texts(min(2, options.megabytes) * 10**6)
        train_tokenizer(beginning, PIECES, folder / "tokenizer.model")
        rows = [row for name in SHARES for row in prepare(options, folder, name)]
        lines_below = [
            train(options, folder),
            *(fill_rate(options, folder, name) for name in SHARES),
        ]
    finally:
        shutil.rmtree(folder)
    load = "/".join(f"{number:.1f}" for number in os.getloadavg())
    lines_below.append(f"Load average {load} on {os.cpu_count()} cores.")
    files = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
    date = datetime.date.today().isoformat()
    title = f"{options.megabytes} MB of text all the way, {date}: {files}"
    table = Table(*COLUMNS, title=title, caption="\n".join(lines_below), caption_justify="left")
    lines = [
        f"# {title}",
        "",
        *lines_below,
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        table.add_row(*row)
        lines.append(f"| {' | '.join(row)} |")
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"corpus-{date}.md").write_text("\n".join(lines) + "\n")
    return int(any("NO" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
