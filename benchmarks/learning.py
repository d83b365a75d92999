"""Does it learn the same? Ours and PyTorch's from equal weights on equal batches, for 1,000 steps.

    python benchmarks/learning.py                     # on a GPU the 120M in bf16, in six minutes
    python benchmarks/learning.py --seconds 3600      # on a CPU the demo's model in fp32
    python benchmarks/learning.py --data data/fineweb # rows of a prepared dataset
    python benchmarks/learning.py --quick             # a tiny model, which says nothing

Two seeds make two starting weights, and each system trains from both; all four runs read the same
batches. Rows are the standard library of this Python in pieces of a tokenizer trained on it, so no
download is needed, or those of `--data`. A smoothed loss is the mean of the last losses, a
twentieth of the run. The verdict: the systems, which start alike, are nowhere farther apart than
the two seeds of either come to be in the same half of the run. Curve, table and all losses go to
results/; exit code 1 says that it learns something else.
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

import running
from tinyllama_jax.config import LlamaConfig, OptimizerConfig
from tinyllama_jax.errors import UserError, require
from tinyllama_jax.files import make_folder, written_aside
from tinyllama_jax.performance.flops import PEAK_FLOPS, flops_per_token

SEEDS = (0, 1)
SYSTEMS = ("ours", "torch")
WINDOWS = 20  # in a run; a smoothed loss is the mean of one
SHARE_OF_PEAK = 0.3  # to foretell the time: a width of 768 fills a GPU less than the 1.1B's 2,048


@dataclasses.dataclass(frozen=True)
class Options:
    data: Path | None = None
    """A prepared dataset without padding, whose pieces are no more than the model's."""
    steps: int = 1000
    rows: int = 8
    """Of a step: 16,384 tokens, so that four runs and their starts take an H100 six minutes."""
    seconds: float = 600
    """For all runs together; none of them is judged where it does not suffice."""
    quick: bool = False
    out: Path | None = None
    """Where the results go, without suffix; benchmarks/results/DATE-learning-MODEL-DEVICE
    by default."""


def optimizer_of(steps: int) -> OptimizerConfig:
    """The recipe's, with a warm-up over the first tenth."""
    return OptimizerConfig(warmup_steps=steps // 10)


# What processes of their own do.


def run(spec: running.Spec) -> dict[str, Any]:
    return {"files": make_files, "ours": run_ours, "torch": run_torch}[spec["whose"]](spec)


def make_files(spec: running.Spec) -> dict[str, Any]:
    """Writes rows.npy and the weights of each seed, by Hugging Face's names, into the folder."""
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
    """The training split of both embedded sources as rows (N, S); trains the tokenizer first."""
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
    """The first rows (N, S) of a dataset's training split, `count` at most."""
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
    """Tokens (A, B, S) of each step: all rows in a random order, then again in another one."""
    rows_NS = np.load(Path(spec["folder"]) / "rows.npy")
    rng, needed = np.random.default_rng(0), spec["steps"] * spec["rows"]
    epochs = [rng.permutation(len(rows_NS)) for _ in range(-(-needed // len(rows_NS)))]
    order = np.concatenate(epochs)[:needed].reshape(spec["steps"], -1, spec["micro_rows"])
    for places_AB in order:
        yield rows_NS[places_AB].astype(np.int32)


def run_ours(spec: running.Spec) -> dict[str, Any]:
    from safetensors.numpy import load_file

    import ours
    from tinyllama_jax.conversion import tensors

    config = ours.config_of(spec, optimizer_of(spec["steps"]), spec["steps"])
    read = load_file(Path(spec["folder"]) / f"{spec['seed']}.safetensors").__getitem__
    weights = tensors.unread_tensors(config.model, read)
    return ours.train(config, batches(spec), spec["begun"], weights).found


def run_torch(spec: running.Spec) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    from torch_peer import Trainer, load_hf_tensors, timed_steps

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


# What is made of their losses.


Losses = dict[tuple[str, int], list[float]]
"""Of each step, by system and seed."""


def window(steps: int) -> int:
    """How many losses a smoothed one is the mean of."""
    return max(steps // WINDOWS, 1)


def smoothed(losses: list[float]) -> np.ndarray:
    """The mean of each `window` losses in a row; the first is of step `window`."""
    count = window(len(losses))
    return np.convolve(losses, np.full(count, 1 / count), "valid")


def apart(losses: Losses) -> tuple[np.ndarray, np.ndarray]:
    """How far smoothed losses are apart: systems, of the seed where they are farther; and seeds, of
    the system where they are nearer."""
    curves = {key: smoothed(found) for key, found in losses.items()}
    (ours, peer), (first, second) = SYSTEMS, SEEDS
    systems = [np.abs(curves[ours, seed] - curves[peer, seed]) for seed in SEEDS]
    seeds = [np.abs(curves[system, first] - curves[system, second]) for system in SYSTEMS]
    return np.max(systems, axis=0), np.min(seeds, axis=0)


def judge(losses: Losses) -> list[tuple[float, float]]:
    """The largest distances (of systems, of seeds) in the first and in the second half."""
    halves = (np.array_split(distances, 2) for distances in apart(losses))
    return [(float(a.max()), float(b.max())) for a, b in zip(*halves, strict=True)]


def same(halves: list[tuple[float, float]]) -> bool:
    """Whether the systems learn the same; not where a loss is no number."""
    return all(systems <= seeds for systems, seeds in halves)


def rows_of(losses: Losses) -> list[list[str]]:
    """The smoothed losses at each tenth of the runs, and how far apart they are there."""
    keys = [(system, seed) for seed in SEEDS for system in SYSTEMS]
    curves = [smoothed(losses[key]) for key in keys] + list(apart(losses))
    steps = len(losses[keys[0]])
    head = ["step", *(f"{system}, seed {seed}" for system, seed in keys)]
    table = [[*head, "systems, apart", "seeds, apart"]]
    for step in sorted({max(steps * tenth // 10, window(steps)) for tenth in range(1, 11)}):
        *found, systems, seeds = (curve[step - window(steps)] for curve in curves)
        losses_told = (f"{loss:.4f}" for loss in found)
        table.append([f"{step:,}", *losses_told, f"{systems:.1e}", f"{seeds:.1e}"])
    return table


def draw(losses: Losses, title: str, path: Path) -> None:
    """The curves, and below them how far apart they are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 7), height_ratios=(2, 1), layout="constrained"
    )
    for (system, seed), found in losses.items():
        steps = np.arange(window(len(found)), len(found) + 1)
        # Where they are equal, ours is seen inside the other's wider line.
        width, strength = (1, 1) if system == SYSTEMS[0] else (5, 0.3)
        label = f"{system}, seed {seed}"
        above.plot(steps, smoothed(found), color=f"C{seed}", lw=width, alpha=strength, label=label)
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
"""What each run found, by system and seed."""


def measure(options: Options, spec: running.Spec, tell: Callable[[Runs], None]) -> Runs:
    """All runs; one with a `failure` is the last. `tell` gets those so far."""
    found, started = {}, time.monotonic()
    temporary = tempfile.TemporaryDirectory(prefix="learning-")
    with temporary as folder, Console(stderr=True).status("rows and weights") as status:
        caches = running.own_caches(f"{folder}/caches")
        spec |= {"folder": folder, "data": str(options.data) if options.data else None}
        # Drawn on the CPU and read by all, since devices round what they draw in their own way.
        made = running.in_own_process(
            __file__,
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
                row = running.in_own_process(__file__, asked, left, caches)
                found[system, seed] = row | made
                tell(found)
                if "failure" in row:
                    return found
                status.console.print(f"{system}, seed {seed}: {sum(row['seconds']):.0f} s of steps")
    return found


def legend_of(options: Options, model: str, spec: running.Spec, found: Runs) -> list[str]:
    config, steps = running.MODELS[model], options.steps
    halves = judge({key: row["losses"] for key, row in found.items()})
    rows = found[SYSTEMS[0], SEEDS[0]]["rows"]
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
            for (system, seed), row in found.items()
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
    spec |= {"ours": {"unroll_layers": True}, "torch": {"compiled": on_gpu}}
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

    def keep(found: Runs, verdict: running.Spec, legend: list[str], table: list[list[str]]) -> None:
        runs = {f"{system}, seed {seed}": row for (system, seed), row in found.items()}
        if out is not None:
            running.write_results(out, device, title, legend, table, verdict | {"runs": runs})

    missing = [
        "Not all runs are done: nothing is judged. Their losses are in the JSON beside this."
    ]
    found = measure(options, spec, lambda rows: keep(rows, {}, missing, [["step"]]))
    (system, seed), last = list(found.items())[-1]
    if "failure" in last:
        told = f"{system}, seed {seed}: {last['failure']}"
        raise UserError(f"{told}. Nothing is judged; losses so far are kept.")
    losses = {key: row["losses"] for key, row in found.items()}
    table, legend = rows_of(losses), legend_of(options, model, spec, found)
    halves = judge(losses)
    verdict = {"same": same(halves), "apart_in_halves": halves}
    if out is not None:
        picture = f"![Smoothed losses]({out.name}.png)"
        keep(found, verdict, [*legend, "", picture, ""], table)
        file, named = running.suffixed(out, ".png"), running.marked(title, [])[0]
        running.if_known("the picture", lambda: draw(losses, named, file))
    running.show(title, table, legend)
    return 0 if same(halves) else 1


if __name__ == "__main__":
    running.command(Options, __doc__, main, run)
