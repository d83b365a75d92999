"""Generation beside transformers' `generate` in PyTorch: same weights, dtype, prompts and device.

    python benchmarks/generation.py                  # the demo and the 1.1B; a file in results/
    python benchmarks/generation.py --models demo    # one of them

PyTorch draws random weights and saves them (4.4 GB in a temporary folder for the 1.1B model), and
both sides open that folder. They take turns, round after round, each time in a fresh process, which
warms up (we compile there) and is then timed at each batch size. Texts are greedy, never ended by
eos, and compared. Prompts of a batch are equally long: PyTorch would want others padded.
"""

import dataclasses
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from tinyllama_jax.config import DEMO, TINYLLAMA_1B, LlamaConfig
from tinyllama_jax.inference import huggingface
from tinyllama_jax.inference.generate import stream
from tinyllama_jax.runtime.targets import CARDS

MODELS = {"demo": DEMO, "1b": TINYLLAMA_1B}


@dataclasses.dataclass(frozen=True)
class Options:
    models: tuple[Literal["demo", "1b"], ...] = ("demo", "1b")
    batch: tuple[int, ...] = (1, 16)
    prompt: int = 32
    """Tokens of a prompt."""
    new: int = 97
    """Tokens after it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bf16 on a GPU and fp32 on a CPU."""
    rounds: int = 3
    out: Path = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Timed:
    """One generation: seconds until the first new tokens are there, until all are, and they."""

    first: float
    whole: float
    ids: list[list[int]]


def save_random(config: LlamaConfig, folder: Path) -> None:
    """A folder of transformers' own, with the weights that it draws."""
    import torch

    from torch_peer import transformers_model

    torch.manual_seed(0)
    transformers_model(config).save_pretrained(folder, max_shard_size="1TB")


def prompts(config: LlamaConfig, rows: int, length: int) -> list[list[int]]:
    generator = np.random.default_rng(rows)
    return generator.integers(3, config.vocab_size, (rows, length)).tolist()


def theirs(folder: Path, config: LlamaConfig, options: Options, dtype: str) -> list[Timed]:
    """A turn of transformers: a generation for each batch size."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)

    def run(ids_BT, new):
        start = time.perf_counter()
        options = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.inference_mode():
            found = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
        found = found[:, ids_BT.shape[1] :].tolist()  # waits for a GPU
        return time.perf_counter() - start, found

    turns = []
    for rows in options.batch:
        ids_BT = torch.tensor(prompts(config, rows, options.prompt), device=device)
        run(ids_BT, 3)
        first, _ = run(ids_BT, 1)
        turns.append(Timed(first, *run(ids_BT, options.new)))
    return turns


def ours(folder: Path, config: LlamaConfig, options: Options, dtype: str) -> list[Timed]:
    """Our turn: a generation for each batch size."""
    found, weights = huggingface.load(folder)
    assert found == config
    weights = jax.tree.map(lambda w: jax.numpy.asarray(w, dtype), weights)

    turns = []
    for rows in options.batch:
        starts = prompts(config, rows, options.prompt)
        for chunks_of_warm_up in (2, None):
            start, first, ids = time.perf_counter(), 0.0, [[] for _ in starts]
            chunks = stream(config, weights, starts, max_tokens=options.new, eos=None)
            for index, chunk in enumerate(chunks):
                first = first or time.perf_counter() - start
                ids = [a + b for a, b in zip(ids, chunk, strict=True)]
                if index + 1 == chunks_of_warm_up:
                    break
        turns.append(Timed(first, time.perf_counter() - start, ids))
    return turns


SIDES = {"transformers": theirs, "ours": ours}


def alone(function, *arguments):
    """The function's result, from a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def device() -> tuple[str, str]:
    """Platform and device kind, asked elsewhere: a GPU's memory is for the sides."""
    return jax.default_backend(), jax.devices()[0].device_kind


def step_bytes(config: LlamaConfig, rows: int, options: Options, dtype: str) -> float:
    """Bytes that a step reads at least: all weights but the embedding's other rows, and the keys
    and values of half of the new tokens and of the prompt."""
    weights = config.parameters() - config.vocab_size * config.width
    tokens = rows * (options.prompt + options.new / 2)
    cached = 2 * config.layers * config.kv_heads * config.head_width * tokens
    return (weights + cached) * np.dtype(jax.numpy.dtype(dtype)).itemsize


def measure(options: Options, dtype: str, kind: str) -> list[list[str]]:
    """Rows of the table: medians over the rounds."""
    cards = {target.device_kind: target.bandwidth for target in CARDS.values()}
    table = []
    for name in options.models:
        config, turns = MODELS[name], {side: [] for side in SIDES}
        with tempfile.TemporaryDirectory() as temporary:
            alone(save_random, config, Path(temporary))
            for _ in range(options.rounds):
                for side, run in SIDES.items():
                    turns[side].append(alone(run, Path(temporary), config, options, dtype))
        for index, rows in enumerate(options.batch):
            runs = {side: [turn[index] for turn in turns[side]] for side in SIDES}
            pairs = list(zip(*runs.values(), strict=True))
            same = [
                a == b
                for pair in pairs
                for a, b in zip(*(np.ravel(t.ids) for t in pair), strict=True)
            ]
            for side in SIDES:
                speeds = [rows * options.new / t.whole for t in runs[side]]
                steps = [(t.whole - t.first) / (options.new - 1) for t in runs[side]]
                step, cells = statistics.median(steps), [name, str(rows), side]
                cells.append(f"{1e3 * statistics.median(t.first for t in runs[side]):,.1f}")
                cells.append(f"{1e3 * step:,.2f}")
                median = f"{statistics.median(speeds):,.1f}"
                cells.append(f"{median} ({min(speeds):,.1f}-{max(speeds):,.1f})")
                ratio = statistics.median(a.whole / b.whole for a, b in pairs)
                cells.append(f"{ratio:.2f}" if side == "ours" else "")
                speed = step_bytes(config, rows, options, dtype) / step
                share = f" ({speed / cards[kind]:.0%})" if kind in cards else ""
                cells.append(f"{speed / 1e9:,.1f}{share}")
                cells.append(f"{np.mean(same):.0%}" if side == "ours" else "")
                table.append(cells)
    return table


COLUMNS = ("model", "batch", "side", "first token, ms", "step, ms", "tokens/s")
COLUMNS += ("ratio", "GB/s", "same tokens")


def main(options: Options) -> None:
    platform_, kind = alone(device)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if platform_ == "cpu" else "bfloat16"
    rows = measure(options, dtype, kind)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch")]
    versions.append(f"transformers {importlib.metadata.version('transformers')}")
    load = "/".join(f"{number:.1f}" for number in os.getloadavg())
    date = datetime.date.today().isoformat()
    legend = [
        f"{kind}, {os.cpu_count()} cores, load average {load}; Python {platform.python_version()}, "
        f"{', '.join(versions)}. {dtype}, {options.new} new tokens a row after "
        f"{options.prompt}, greedy. Medians of {options.rounds} rounds (slowest-fastest).",
        "First token: until it is there, prompt and all. Step: a later token of all rows. "
        "Tokens/s: of all rows and the whole call. Ratio: transformers' time over ours in the same "
        "round. GB/s: what a step must read, over its time (of the card's bandwidth, where it is "
        "known). Same tokens: ours that are transformers' too.",
    ]
    table = Table(*COLUMNS, title=f"Generation, {date}", caption="\n".join(legend))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    lines = [f"# Generation, {date}", "", *legend, ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"generation-{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
