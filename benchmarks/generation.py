"""Times generation beside transformers' `generate`, on the same weights, prompts and device.

    python -m benchmarks.generation                 # the demo and the 1.1B
    python -m benchmarks.generation --models demo   # one of them
    python -m benchmarks.generation --quick         # a tiny model, whose times mean nothing

PyTorch draws random weights and saves them in a temporary folder, from which both sides read them.
The sides take turns (ours, transformers, ours), each in a new process, so that a drifting clock
affects both. At each batch size, one generation warms up and compiles; then it is repeated for some
seconds, and the median is reported. Decoding is greedy and does not stop at eos. All prompts of a
batch have the same length, since PyTorch would have to pad others. The table and its JSON are
written to results/ after each turn. In fp32 the texts must be equal: the exit code is 1 if they are
not, or if a turn failed.

On two CPU cores the demo takes two minutes at most; the 1.1B takes less than ten, 14 GB of memory
and 4.4 GB of disk. The table shows how much memory each process held.
"""

import dataclasses
import datetime
import functools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import running
from benchmarks.kernels.ceilings import copy_speeds
from tinyllama_jax.config import LlamaConfig
from tinyllama_jax.conversion import huggingface
from tinyllama_jax.conversion.tensors import unread_layers
from tinyllama_jax.errors import first_line, require
from tinyllama_jax.inference.generate import stream
from tinyllama_jax.runtime.mesh import make_mesh, on_every_device

# Model -> new tokens of a row; few for the 1.1B, since a CPU reads 4.4 GB for each.
NEW = {"demo": 97, "1b": 17, "tiny": 9}
SECONDS = 5  # time in which a generation is repeated; on a CPU the 1.1B does one at least
# (model, whether on a GPU) -> this project's goal: how many times as fast as transformers.
BARS = {("demo", False): 2.0, ("1b", False): 1.0, ("demo", True): 2.0, ("1b", True): 2.0}


@dataclasses.dataclass(frozen=True)
class Options:
    models: tuple[str, ...] = ("demo", "1b")
    batch: tuple[int, ...] = (1, 16)
    prompt: int = 32
    """Tokens in a prompt."""
    new: int | None = None
    """Tokens that are generated; by default 97, and on a CPU 17 for the 1.1B."""
    dtype: str = "auto"
    """float32 or bfloat16; `auto` is bf16 on a GPU and fp32 on a CPU."""
    rounds: int = 1
    """How many turns transformers has; ours has one more."""
    quick: bool = False
    out: Path | None = None
    """Path of the results, without suffix; by default benchmarks/results/DATE-generation-DEVICE,
    and with --quick nothing is written."""


def save_random(config: LlamaConfig, folder: Path) -> None:
    """Saves a model of transformers with random weights into a folder."""
    import torch

    from benchmarks.step.torch_peer import transformers_model

    torch.manual_seed(0)
    transformers_model(config).save_pretrained(folder, max_shard_size="1TB")


def prompts(config: LlamaConfig, rows: int, length: int) -> list[list[int]]:
    """Random prompts, the same for both sides."""
    generator = np.random.default_rng(rows)
    return generator.integers(3, config.vocab_size, (rows, length)).tolist()


def timed(rows: int, seconds: float, generation) -> dict[str, Any]:
    """Repeats a generation for some seconds, after one that warms up; returns the medians.

    Args:
      rows: rows of its batch.
      seconds: time after which it is not started again.
      generation: returns (seconds until the first new tokens, seconds until all, the new tokens).
    """
    measured, started = [generation()], time.perf_counter()
    while len(measured) == 1 or time.perf_counter() - started < seconds:
        measured.append(generation())
    firsts, wholes, ids = zip(*measured[1:], strict=True)
    return {
        "batch": rows,
        "first_seconds": statistics.median(firsts),
        "seconds": statistics.median(wholes),
        "repeats": len(wholes),
        "process_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "ids": ids[-1],
    }


def theirs(folder: Path, config: LlamaConfig, case: dict[str, Any]) -> list[dict[str, Any]]:
    """A turn of transformers: times generation at each batch size."""
    import torch
    from transformers import AutoModelForCausalLM

    # Asking JAX would make it take most of the device's memory in this process.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, case["dtype"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)

    def run(ids_BT):
        times = []

        def note_the_first(ids, scores):
            if not times:
                ids.tolist()  # waits for a GPU
                times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # no row ends

        options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
        options |= dict(max_new_tokens=case["new"], stopping_criteria=[note_the_first])
        start = time.perf_counter()
        with torch.inference_mode():
            ids = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
        new = ids[:, ids_BT.shape[1] :].tolist()  # waits for a GPU
        return times[0] - start, time.perf_counter() - start, new

    turns = []
    for rows in case["batch"]:
        ids_BT = torch.tensor(prompts(config, rows, case["prompt"]), device=device)
        turns.append(timed(rows, case["repeat_seconds"], lambda ids_BT=ids_BT: run(ids_BT)))
    return turns


def ours(folder: Path, config: LlamaConfig, case: dict[str, Any]) -> list[dict[str, Any]]:
    """A turn of ours: times generation at each batch size."""
    opened, unread = huggingface.open_folder(folder)
    assert opened == config
    mesh = make_mesh(devices=jax.devices()[:1])
    weights = on_every_device(unread_layers(unread), mesh, case["dtype"])

    def run(starts):
        start, first, ids = time.perf_counter(), 0.0, [[] for _ in starts]
        for chunk in stream(config, weights, starts, max_tokens=case["new"], eos=None):
            first = first or time.perf_counter() - start
            ids = [a + b for a, b in zip(ids, chunk, strict=True)]
        return first, time.perf_counter() - start, ids

    turns = []
    with jax.set_mesh(mesh):
        for rows in case["batch"]:
            starts = prompts(config, rows, case["prompt"])
            turns.append(timed(rows, case["repeat_seconds"], lambda starts=starts: run(starts)))
    return turns


SIDES = {"ours": ours, "transformers": theirs}


def alone(function, *arguments):
    """Calls a function in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def device(quick: bool) -> dict[str, Any]:
    """Platform and name of the device, and how many bytes/s it copies."""
    speeds = copy_speeds(2**16 if quick else 2**30, 0.001 if quick else 0.5)
    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "copy_bytes_per_s": max(speeds),
    }


def step_bytes(config: LlamaConfig, rows: int, case: dict[str, Any]) -> float:
    """Bytes that a step reads at least.

    These are all weights but the embedding, and the keys and values of the prompt and of half of
    the new tokens, which is their average.
    """
    weights = config.parameters() - config.vocab_size * config.width
    tokens = rows * (case["prompt"] + case["new"] / 2)
    cached = 2 * config.layers * config.kv_heads * config.head_width * tokens
    return (weights + cached) * np.dtype(jax.numpy.dtype(case["dtype"])).itemsize


Turns = list[dict[str, Any]]


def measure(name: str, case: dict[str, Any], rounds: int, run, tell: Callable[[Turns], None]):
    """Measures the turns of a model; there is a row for each turn and batch size.

    Args:
      name: of the model.
      case: dtype, batch sizes, and tokens of prompts and of what is generated.
      rounds: turns of transformers.
      run: calls a function, in this process or in a new one.
      tell: is called with the rows so far after each turn; those of a failed turn have a `failure`.
    """
    config, turns = running.MODELS[name], []
    with tempfile.TemporaryDirectory() as temporary:
        run(save_random, config, Path(temporary))
        for side in ("ours", *("transformers", "ours") * rounds):
            print(f"{name}, {side}", flush=True)
            turn = {"model": name, "side": side} | case
            try:
                turns += [turn | times for times in run(SIDES[side], Path(temporary), config, case)]
            except Exception as error:  # whatever it is, the other side goes on
                failure = f"{type(error).__name__}: {first_line(error)}"[:160]
                turns += [turn | {"batch": rows, "failure": failure} for rows in case["batch"]]
            complete(turns, config, case)
            tell(turns)
    return turns


def complete(turns: Turns, config: LlamaConfig, case: dict[str, Any]) -> None:
    """Adds to the measured turns the numbers that the table shows."""
    done = [turn for turn in turns if "failure" not in turn]
    wanted = {turn["batch"]: turn["ids"] for turn in done if turn["side"] == "transformers"}
    for turn in done:
        rows, new = turn["batch"], case["new"]
        turn["step_seconds"] = (turn["seconds"] - turn["first_seconds"]) / (new - 1)
        turn["tokens_per_s"] = rows * new / turn["seconds"]
        turn["step_bytes"] = step_bytes(config, rows, case)
        if (ids := wanted.get(rows)) is not None:
            same = functools.partial(np.equal, turn["ids"], ids)
            equal = running.if_known("how many tokens are the same", same)
            turn["same_tokens"] = None if equal is None else float(np.mean(equal))


COLUMNS = ("model", "rows", "side", "first, ms", "step, ms", "tokens/s", "GB/s", "share", "same")
COLUMNS += ("held, GB",)


def cells(turn: dict[str, Any], copy: float) -> list[str]:
    """A row of the table; `copy` is how many bytes/s the device copies."""
    start = [turn["model"], str(turn["batch"]), turn["side"]]
    if "failure" in turn:
        return [*start, turn["failure"]]
    speed, first = turn["step_bytes"] / turn["step_seconds"], 1e3 * turn["first_seconds"]
    same = turn.get("same_tokens")
    return [
        *start,
        f"{first:,.{1 if first < 100 else 0}f}",
        f"{1e3 * turn['step_seconds']:,.2f}",
        f"{turn['tokens_per_s']:,.1f}",
        f"{speed / 1e9:,.2f}",
        f"{speed / copy:.0%}",
        "" if same is None else f"{same:.1%}",
        f"{turn['process_peak_bytes'] / 1e9:.2f}",
    ]


def ratios(turns: Turns, on_gpu: bool) -> list[str]:
    """A phrase for each model and batch size: how many times as fast ours is, and the goal."""
    phrases = []
    for name, rows in dict.fromkeys((t["model"], t["batch"]) for t in turns):
        speeds = {side: [] for side in SIDES}
        for turn in turns:
            if (turn["model"], turn["batch"]) == (name, rows) and "failure" not in turn:
                speeds[turn["side"]].append(turn["tokens_per_s"])
        if not all(speeds.values()):
            phrases.append(f"{name} at batch {rows} NOT COMPARED, as one side is missing")
            continue
        medians = {side: statistics.median(each) for side, each in speeds.items()}
        ratio, bar = medians["ours"] / medians["transformers"], BARS.get((name, on_gpu))
        goal = "" if bar is None else f" ({'reached' if ratio >= bar else 'MISSED'}: {bar:.1f})"
        phrases.append(f"{name} at batch {rows} {ratio:.2f}{goal}")
    return phrases


def report(turns: Turns, at_hand: dict[str, Any], options: Options, last: bool = True) -> None:
    """Writes the table, and prints it if it is the last one."""
    turns = sorted(turns, key=lambda turn: turn["batch"])  # stable, so turns keep their order
    first, kind, copy = turns[0], at_hand["device"], at_hand["copy_bytes_per_s"]
    new = ", ".join(f"{model} {n}" for model, n in {t["model"]: t["new"] for t in turns}.items())
    load = "/".join(f"{number:.1f}" for number in os.getloadavg())
    legend = [
        f"{kind}, {os.cpu_count()} cores, load average {load}. {first['dtype']}, greedy; new "
        f"tokens of a row after {first['prompt']}: {new}.",
        "Our tokens/s over transformers', of the whole call (in brackets what is meant to be "
        f"reached): {'; '.join(ratios(turns, at_hand['platform'] != 'cpu'))}.",
        "First: until the first token is there, prompt and all. Step: a later token of all rows. "
        "Tokens/s: of all rows and the whole call.",
        "GB/s: what a step must read (weights, keys, values), over its time. Share: of the "
        f"{copy / 1e9:,.1f} GB/s, read and written, that x + 1 reaches on this device "
        "in memory; the demo fits a cache.",
        "Same: tokens that are transformers'. In bf16 both sides round near ties, and a text that "
        "leaves the other's never comes back. Held: memory of the process so far, at most.",
    ]
    legend += [running.QUICK] * options.quick
    title = f"Generation on {kind}, {datetime.date.today().isoformat()}"
    table = [list(COLUMNS), *(cells(turn, copy) for turn in turns)]
    out = running.results_path(options, "generation", kind)
    if out is not None:
        kept = [{name: x for name, x in turn.items() if name != "ids"} for turn in turns]
        running.write_results(out, kind, title, legend, table, at_hand | {"turns": kept})
    if last:
        running.show(title, table, legend)


def main(options: Options) -> int:
    models = ("tiny",) if options.quick else options.models
    require(set(models) <= NEW.keys(), f"--models is {models}: {', '.join(NEW)} are there.")
    require(
        options.dtype in ("auto", "float32", "bfloat16"),
        f"--dtype is {options.dtype!r}: auto, float32 and bfloat16 are there.",
    )
    # Each side needs the GPU's memory for itself, so this process must not take any.
    run = (lambda function, *arguments: function(*arguments)) if options.quick else alone
    at_hand = run(device, running.is_quick(options))
    dtype, on_gpu = options.dtype, at_hand["platform"] != "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    turns = []

    def tell(new: Turns) -> None:
        report(turns + new, at_hand, options, last=False)

    for name in models:
        new = options.new or (NEW["demo"] if on_gpu else NEW[name])
        if running.REHEARSED:
            new = NEW["tiny"]  # its context ends soon
        case = {"dtype": dtype, "batch": options.batch, "prompt": options.prompt, "new": new}
        case["repeat_seconds"] = 0 if running.is_quick(options) else SECONDS
        turns += measure(name, case, options.rounds, run, tell)
    report(turns, at_hand, options)
    if any("failure" in turn for turn in turns):
        return 1
    same = all(turn.get("same_tokens") == 1 for turn in turns)
    if dtype == "float32" and not same:
        print("The texts differ: these are not the same models.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    running.command(Options, __doc__, main)
