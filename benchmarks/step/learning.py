"""Tests whether our step learns what PyTorch's learns, from equal weights on equal batches.

    python -m benchmarks.step.learning                      # the 120M in bf16, 6 minutes on a GPU
    python -m benchmarks.step.learning --seconds 3600       # the demo's model in fp32, on a CPU
    python -m benchmarks.step.learning --data data/fineweb  # rows of a prepared dataset
    python -m benchmarks.step.learning --quick              # a tiny model, which shows nothing

Two seeds give two sets of initial weights, and both systems train from each of them; all four runs
read the same batches. Their rows are those of `--data`, or, so that no download is needed, the
standard library of this Python with a tokenizer trained on it. A smoothed loss is the mean of the
losses in the last twentieth of the run. The systems learn the same if, in both halves of the run,
they are nowhere farther apart for a seed than the two seeds of either system become. The curve, a
table and all losses are written to results/. The exit code is 1 if they do not learn the same.
"""

import dataclasses
import datetime
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import running
from tinyllama_jax.config import LlamaConfig, OptimizerConfig
from tinyllama_jax.errors import UserError, require
from tinyllama_jax.files import make_folder, written_aside
from tinyllama_jax.performance.flops import PEAK_FLOPS, flops_per_token

SEEDS = (0, 1)
SYSTEMS = ("ours", "torch")
WINDOWS = 20  # parts of a run; a smoothed loss is the mean of one part
SHARE_OF_PEAK = 0.3  # predicts the time: a width of 768 fills a GPU less than the 1.1B's 2,048


@dataclasses.dataclass(frozen=True)
class Options:
    data: Path | None = None
    """Prepared dataset without padding, of no larger vocabulary than the model's."""
    steps: int = 1000
    rows: int = 8
    """Rows of a step: 16,384 tokens, so that an H100 does the four runs in six minutes."""
    seconds: float = 600
    """Time for all runs together; nothing is judged if it does not suffice."""
    quick: bool = False
    out: Path | None = None
    """Path of the results, without suffix; by default
    benchmarks/results/DATE-learning-MODEL-DEVICE."""


def optimizer_of(steps: int) -> OptimizerConfig:
    """The optimizer of the recipe, with a warm-up over the first tenth of the steps."""
    return OptimizerConfig(warmup_steps=steps // 10)


# What workers do.


def run(spec: running.Spec) -> dict[str, Any]:
    """Does the work of a worker: writes the files, or trains with one of the systems."""
    return {"files": make_files, "ours": run_ours, "torch": run_torch}[spec["whose"]](spec)


def make_files(spec: running.Spec) -> dict[str, Any]:
    """Writes rows.npy, and the initial weights of each seed by the names of Hugging Face."""
    import jax
    from safetensors.numpy import save_file

    from tinyllama_jax.conversion import tensors
    from tinyllama_jax.model.llama import init_weights

    config, folder = LlamaConfig(**spec["model"]), Path(spec["folder"])
    if spec["data"]:
        rows_NS = dataset_rows(spec["data"], config, spec["steps"] * spec["rows"])
    else:
        rows_NS = library_rows(config, folder / "tokenizer.model")
    np.save(folder / "rows.npy", rows_NS)
    for seed in SEEDS:
        weights = init_weights(config, jax.random.key(seed))
        save_file(dict(tensors.stream(weights, config, "float32")), folder / f"{seed}.safetensors")
    return {"rows": len(rows_NS)}


def library_rows(config: LlamaConfig, tokenizer: Path) -> np.ndarray:
    """Trains a tokenizer, and returns the training split of the standard library as rows (N, S)."""
    from tinyllama_jax.data.format import RECORD
    from tinyllama_jax.data.tokenizer import load_tokenizer, train_tokenizer
    from tinyllama_jax.preparation.library import standard_library
    from tinyllama_jax.preparation.packing import Packer, pack

    texts = [doc.text for splits in standard_library().values() for doc in splits["train"]]
    train_tokenizer(texts, config.vocab_size, tokenizer)
    documents = load_tokenizer(tokenizer).encode(texts)
    records = np.stack(list(pack(documents, Packer(config.vocab_size))))
    starts = range(0, RECORD, config.context)
    return np.concatenate([records[:, start : start + config.context + 1] for start in starts])


def dataset_rows(folder: str, config: LlamaConfig, count: int) -> np.ndarray:
    """The first rows (N, S) of a dataset's training split, at most `count` of them."""
    from tinyllama_jax.data.format import is_padding
    from tinyllama_jax.data.rows import Rows

    source = Rows(folder, "train", config.context, config.vocab_size)
    rows_NS = source.read(np.arange(min(count, len(source))))
    require(
        not is_padding(rows_NS).any(),
        f"{folder} holds padding, which PyTorch's side would learn: prepare it without --best-fit.",
    )
    return rows_NS


def batches(spec: running.Spec):
    """Yields tokens (A, B, S) for each step: all rows in a random order, then in another one."""
    rows_NS = np.load(Path(spec["folder"]) / "rows.npy")
    rng, needed = np.random.default_rng(0), spec["steps"] * spec["rows"]
    epochs = [rng.permutation(len(rows_NS)) for _ in range(-(-needed // len(rows_NS)))]
    order = np.concatenate(epochs)[:needed].reshape(spec["steps"], -1, spec["micro_rows"])
    for places_AB in order:
        yield rows_NS[places_AB].astype(np.int32)


def run_ours(spec: running.Spec) -> dict[str, Any]:
    """Trains with our step; returns its times and losses."""
    from safetensors.numpy import load_file

    from benchmarks.step import ours
    from tinyllama_jax.conversion import tensors

    config = ours.config_of(spec, optimizer_of(spec["steps"]), spec["steps"])
    read = load_file(Path(spec["folder"]) / f"{spec['seed']}.safetensors").__getitem__
    weights = tensors.unread_tensors(config.model, read)
    return ours.train(config, batches(spec), spec["begun"], weights).result


def run_torch(spec: running.Spec) -> dict[str, Any]:
    """Trains with the PyTorch step; returns its times and losses."""
    import torch
    from safetensors.torch import load_file

    from benchmarks.step.torch_peer import Trainer, load_hf_tensors, timed_steps

    trainer = Trainer(
        LlamaConfig(**spec["model"]),
        device="cuda" if torch.cuda.is_available() else "cpu",
        precision=spec["precision"],
        optimizer=optimizer_of(spec["steps"]),
        steps=spec["steps"],
        **spec["options"],
    )
    load_hf_tensors(trainer.model, load_file(Path(spec["folder"]) / f"{spec['seed']}.safetensors"))
    return timed_steps(trainer, batches(spec), spec["begun"])


# What is concluded from their losses.


Losses = dict[tuple[str, int], list[float]]
"""(system, seed) -> the losses of all steps."""


def window(steps: int) -> int:
    """How many losses are averaged in a smoothed one."""
    return max(steps // WINDOWS, 1)


def smoothed(losses: list[float]) -> np.ndarray:
    """The means of `window` consecutive losses; the first belongs to step number `window`."""
    count = window(len(losses))
    return np.convolve(losses, np.full(count, 1 / count), "valid")


def apart(losses: Losses) -> tuple[np.ndarray, np.ndarray]:
    """How far apart smoothed losses are at each step, between systems and between seeds.

    Returns:
      (systems, seeds): the distance of the two systems, for the seed where it is larger, and the
      distance of the two seeds, for the system where it is smaller.
    """
    curves = {key: smoothed(values) for key, values in losses.items()}
    (ours, peer), (first, second) = SYSTEMS, SEEDS
    systems = [np.abs(curves[ours, seed] - curves[peer, seed]) for seed in SEEDS]
    seeds = [np.abs(curves[system, first] - curves[system, second]) for system in SYSTEMS]
    return np.max(systems, axis=0), np.min(seeds, axis=0)


def judge(losses: Losses) -> list[tuple[float, float]]:
    """The largest distances (between systems, between seeds) in the first and the second half."""
    halves = (np.array_split(distances, 2) for distances in apart(losses))
    return [(float(a.max()), float(b.max())) for a, b in zip(*halves, strict=True)]


def same(halves: list[tuple[float, float]]) -> bool:
    """Whether the systems learn the same; they do not if a loss is NaN."""
    return all(systems <= seeds for systems, seeds in halves)


def rows_of(losses: Losses) -> list[list[str]]:
    """The table: smoothed losses at each tenth of the runs, and how far apart they are there."""
    keys = [(system, seed) for seed in SEEDS for system in SYSTEMS]
    curves = [smoothed(losses[key]) for key in keys] + list(apart(losses))
    steps = len(losses[keys[0]])
    head = ["step", *(f"{system}, seed {seed}" for system, seed in keys)]
    table = [[*head, "systems, apart", "seeds, apart"]]
    for step in sorted({max(steps * tenth // 10, window(steps)) for tenth in range(1, 11)}):
        *means, systems, seeds = (curve[step - window(steps)] for curve in curves)
        shown = (f"{loss:.4f}" for loss in means)
        table.append([f"{step:,}", *shown, f"{systems:.1e}", f"{seeds:.1e}"])
    return table


def draw(losses: Losses, title: str, path: Path) -> None:
    """Draws the curves, and below them how far apart they are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 7), height_ratios=(2, 1), layout="constrained"
    )
    for (system, seed), values in losses.items():
        steps = np.arange(window(len(values)), len(values) + 1)
        # Where both are equal, our line is seen inside the wider line of the other.
        width, strength = (1, 1) if system == SYSTEMS[0] else (5, 0.3)
        label = f"{system}, seed {seed}"
        above.plot(steps, smoothed(values), color=f"C{seed}", lw=width, alpha=strength, label=label)
    for distances, name in zip(apart(losses), ("systems", "seeds"), strict=True):
        below.plot(steps, distances, label=f"{name} apart")
    above.set(title=title, ylabel="smoothed loss, nats a token")
    below.set(xlabel="step", ylabel="nats a token", yscale="log")
    above.legend()
    below.legend()
    make_folder(path.parent)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    plt.close(figure)


# The four runs.


Runs = dict[tuple[str, int], dict[str, Any]]
"""(system, seed) -> what the run measured."""


def measure(options: Options, spec: running.Spec, tell: Callable[[Runs], None]) -> Runs:
    """Makes the four runs; stops after one that fails, whose row has a `failure`.

    Args:
      options: of the command line.
      spec: what all runs share.
      tell: is called with all runs so far after each of them.
    """
    runs, started = {}, time.monotonic()
    temporary = tempfile.TemporaryDirectory(prefix="learning-")
    with temporary as folder, Console(stderr=True).status("rows and weights") as status:
        caches = running.own_caches(f"{folder}/caches")
        spec |= {"folder": folder, "data": str(options.data) if options.data else None}
        # Drawn on the CPU and read by all runs: devices round random numbers in different ways.
        made = running.in_own_process(
            "benchmarks.step.learning",
            spec | {"whose": "files"},
            options.seconds,
            caches | {"JAX_PLATFORMS": "cpu"},
        )
        require("failure" not in made, f"No rows and weights: {made.get('failure')}")
        for seed in SEEDS:
            for system in SYSTEMS:
                status.update(f"{system}, seed {seed}")
                asked = spec | {"whose": system, "seed": seed, "options": spec[system]}
                left = options.seconds - (time.monotonic() - started)
                row = running.in_own_process("benchmarks.step.learning", asked, left, caches)
                runs[system, seed] = row | made
                tell(runs)
                if "failure" in row:
                    return runs
                status.console.print(f"{system}, seed {seed}: {sum(row['seconds']):.0f} s of steps")
    return runs


def legend_of(options: Options, model: str, spec: running.Spec, runs: Runs) -> list[str]:
    """The lines below the table: the verdict, what was trained, and how fast."""
    config, steps = running.MODELS[model], options.steps
    halves = judge({key: row["losses"] for key, row in runs.items()})
    rows = runs[SYSTEMS[0], SEEDS[0]]["rows"]
    text = str(options.data) if options.data else "the standard library of this Python"
    tokens = steps * options.rows * config.context
    optimizer = optimizer_of(steps)
    legend = [
        "Smoothed losses are at most this far apart: "
        + "; ".join(
            f"systems {systems:.1e}, seeds {seeds:.1e} in the {name} half"
            for (systems, seeds), name in zip(halves, ("first", "second"), strict=True)
        )
        + (". It learns the same." if same(halves) else ". IT DOES NOT LEARN THE SAME."),
        f"Model {model}, {spec['precision']}: {config.parameters():,} weights. {steps:,} steps of "
        f"{options.rows} rows of {config.context:,} tokens from {text}: {rows:,} rows, read "
        f"{steps * options.rows / rows:.1f} times. AdamW, warm-up over {optimizer.warmup_steps} "
        f"steps to {optimizer.peak_lr:g}, a cosine down to {optimizer.end_lr:g}.",
        f"A smoothed loss is the mean of the last {window(steps)}, in nats a token. Systems apart: "
        "of the seed where they are farther. Seeds apart: of the system where they are nearer.",
        "Tokens/s, and seconds from the start of the process to the end of the first step: "
        + "; ".join(
            f"{system}, seed {seed}: {tokens / sum(row['seconds']):,.0f}, "
            f"{row['first_step_seconds']:.0f} s"
            for (system, seed), row in runs.items()
        )
        + ".",
    ]
    return legend + [running.QUICK] * options.quick


def main(options: Options) -> int:
    if running.REHEARSED:
        options = dataclasses.replace(options, steps=min(options.steps, 60))
    device = running.device_kind()
    on_gpu = device != "cpu"
    model = "tiny" if options.quick else "120m" if on_gpu else "demo"
    config, steps = running.MODELS[model], options.steps
    precision = "bfloat16" if on_gpu else "float32"
    spec = running.spec_of(model, options.rows, precision, steps)
    spec |= {"ours": {}, "torch": {"compiled": on_gpu}}
    if device in PEAK_FLOPS:
        tokens = len(SEEDS) * len(SYSTEMS) * steps * options.rows * config.context
        work = tokens * flops_per_token(config, causal=False)
        print(
            f"{work:.3g} FLOP in four runs: {work / SHARE_OF_PEAK / PEAK_FLOPS[device]:.0f} s at "
            f"{SHARE_OF_PEAK:.0%} of the peak, and four starts.",
            flush=True,
        )
    title = f"Learning on {device}, {datetime.date.today().isoformat()}"
    out = running.results_path(options, f"learning-{model}", device)

    def keep(runs: Runs, verdict: running.Spec, legend: list[str], table: list[list[str]]) -> None:
        """Writes all that is known so far."""
        named = {f"{system}, seed {seed}": row for (system, seed), row in runs.items()}
        if out is not None:
            running.write_results(out, device, title, legend, table, verdict | {"runs": named})

    missing = [
        "Not all runs are done: nothing is judged. Their losses are in the JSON beside this."
    ]
    runs = measure(options, spec, lambda rows: keep(rows, {}, missing, [["step"]]))
    (system, seed), last = list(runs.items())[-1]
    if "failure" in last:
        reason = f"{system}, seed {seed}: {last['failure']}"
        raise UserError(f"{reason}. Nothing is judged; losses so far are kept.")
    losses = {key: row["losses"] for key, row in runs.items()}
    table, legend = rows_of(losses), legend_of(options, model, spec, runs)
    halves = judge(losses)
    verdict = {"same": same(halves), "apart_in_halves": halves}
    if out is not None:
        picture = f"![Smoothed losses]({out.name}.png)"
        keep(runs, verdict, [*legend, "", picture, ""], table)
        file, named = running.suffixed(out, ".png"), running.marked(title, [])[0]
        running.if_known("the picture", lambda: draw(losses, named, file))
    running.show(title, table, legend)
    return 0 if same(halves) else 1


if __name__ == "__main__":
    running.command(Options, __doc__, main, run)
