"""Tests whether training is repeatable bit by bit, and measures what that costs.

    python -m benchmarks.step.repeat               # the 120M on a GPU
    python -m benchmarks.step.repeat --model 1b
    python -m benchmarks.step.repeat --quick       # a tiny model, whose times mean nothing

Four runs of 50 steps train in new processes. The first and the third have what equal bits need:

- the embedding's gradient is added up in order (model/embedding.py); JAX's own gradient adds in an
  order that is left to chance on a GPU;
- programs are kept with the kernels that were measured to be the fastest (runtime/compiler.py);
  otherwise each process measures again, and may choose others.

The second and the fourth run do without. Attention is our own in all of them, since cuDNN's
backward pass adds in any order. All bits of weights and optimizer after the last step are compared,
and all losses. The exit code is 1 if they differ between the first and the third run, or if a run
failed; what the other runs measured is kept then, and compared if both of a pair are there. The
first run compiles its programs, and the third finds them in a cache.
"""

import dataclasses
import datetime
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console

from benchmarks import running
from tinyllama_jax.config import OptimizerConfig
from tinyllama_jax.errors import require

WARMUP = 5
OPTIMIZER = OptimizerConfig(warmup_steps=0)


@dataclasses.dataclass(frozen=True)
class Options:
    model: str = "120m"
    """120m or 1b."""
    steps: int = 50
    rows: int = 8
    seconds: float = 600
    """Time for all runs together."""
    quick: bool = False
    out: Path | None = None
    """Path of the results, without suffix; by default benchmarks/results/DATE-repeat-DEVICE."""


def token_batches(spec: running.Spec) -> Iterator[np.ndarray]:
    """Yields random tokens (A, B, S) for each step, some of them as frequent as words in text."""
    rng, first = np.random.default_rng(0), 3  # no eos: two in a row would be padding
    shape = (1, spec["rows"], spec["model"]["context"] + 1)
    for _ in range(spec["steps"]):
        # The logarithm of a piece's rank is uniform, as by Zipf's law.
        ranks = (spec["model"]["vocab_size"] - first) ** rng.random(shape)
        yield (first - 1 + ranks).astype(np.int32)


def run(spec: running.Spec) -> dict[str, Any]:
    """Trains, and returns the times, losses and hashes of all arrays; this is a worker's work."""
    import jax

    from benchmarks.step import ours
    from tinyllama_jax.runtime.mesh import named_leaves
    from tinyllama_jax.training import gradients

    def in_any_order(table_VD, tokens_BT):
        return table_VD[tokens_BT]

    embedding = gradients.embedding if spec["repeatable"] else in_any_order
    config = ours.config_of(spec, OPTIMIZER, spec["steps"])
    with mock.patch.object(gradients, "embedding", embedding):
        result, state, _ = ours.train(config, token_batches(spec), spec["begun"])
    leaves = named_leaves(jax.device_get(state)).items()
    bits = {name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for name, leaf in leaves}
    return result | {"bits": bits}


def differences(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Describes where two runs differ; empty if all bits are equal."""
    steps = [
        step
        for step, pair in enumerate(zip(a["losses"], b["losses"], strict=True), start=1)
        if np.float64(pair[0]).tobytes() != np.float64(pair[1]).tobytes()
    ]
    arrays = [name for name, digest in a["bits"].items() if b["bits"][name] != digest]
    parts = [f"the loss from step {steps[0]} on"] if steps else []
    if arrays:
        parts.append(f"{len(arrays)} of {len(a['bits'])} arrays, {arrays[0]} among them")
    return " and ".join(parts)


Runs = list[dict[str, Any]]


def measure(options: Options, model: str, on_gpu: bool, tell: Callable[[Runs], None]) -> Runs:
    """Makes the four runs; a run that fails has a `failure`.

    Args:
      options: of the command line.
      model: name of the model.
      on_gpu: whether there is a GPU.
      tell: is called with all runs so far after each of them.
    """
    spec = running.spec_of(model, options.rows, "bfloat16" if on_gpu else "float32", options.steps)
    attention = {"attention": "pallas"} if on_gpu and not options.quick else {}
    spec["options"] = {"recompute": "elementwise"} | attention
    runs, started = [], time.monotonic()
    temporary = tempfile.TemporaryDirectory(prefix="repeat-")
    with temporary as folder, Console(stderr=True).status("") as status:
        for number in range(4):
            repeatable = number % 2 == 0
            caches = running.own_caches(f"{folder}/kept" if repeatable else f"{folder}/{number}")
            status.update(f"run {number + 1} of 4")
            asked = spec | {"repeatable": repeatable}
            left = options.seconds - (time.monotonic() - started)
            row = running.in_own_process("benchmarks.step.repeat", asked, left, caches)
            runs.append({"repeatable": repeatable} | row)
            tell(runs)
    return runs


def compared(runs: Runs, pair: tuple[int, int]) -> str:
    """A sentence that compares two runs, given by their numbers, which start at 1."""
    names = f"Runs {pair[0]} and {pair[1]}{'' if pair[0] % 2 else ', without what that needs'}"
    rows = [runs[number - 1] for number in pair if number <= len(runs)]
    if len(rows) < 2 or any("failure" in row for row in rows):
        return f"{names}: NOT COMPARED, one of them is missing."
    differ = differences(*rows)
    return f"{names}: {'THEY DIFFER in ' + differ if differ else 'the same bits'}."


def same_bits(runs: Runs) -> bool:
    """Whether the first and the third run ended with the same bits."""
    rows = [row for row in runs if row["repeatable"] and "failure" not in row]
    return len(rows) == 2 and not differences(*rows)


def cost(runs: Runs) -> str:
    """A sentence on what equal bits cost, by the runs that did not fail."""
    medians = {True: [], False: []}
    for row in runs:
        if "failure" not in row:
            medians[row["repeatable"]].append(statistics.median(row["seconds"][WARMUP:]))
    if not all(medians.values()):
        return "What it costs is not known: no run is there to compare with."
    kept, free = (statistics.mean(medians[repeatable]) for repeatable in (True, False))
    line = f"It costs {kept / free - 1:+.2%} of a step"
    if len(medians[True]) == 2:
        first, second = medians[True]
        line += f"; runs 1 and 3 are {abs(first / second - 1):.2%} apart"
    return line + "."


def report(runs: Runs, model: str, options: Options, last: bool = True) -> None:
    """Writes the table, and prints it if it is the last one."""
    table = [
        ["run", "in order, kept", "ms a step, (fastest-slowest)", "first step, after", "compiled"]
    ]
    for number, row in enumerate(runs, start=1):
        start = [str(number), "yes" if row["repeatable"] else "no"]
        if "failure" in row:
            table.append([*start, row["failure"]])
            continue
        times = [1e3 * seconds for seconds in row["seconds"][WARMUP:]]
        spread = f"{statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
        starts = [f"{row[f'{name}_seconds']:.1f} s" for name in ("first_step", "compile")]
        table.append([*start, spread, *starts])
    config, device = running.MODELS[model], running.device_kind()
    title = f"Repeating {options.steps} steps on {device}, {datetime.date.today().isoformat()}"
    legend = [
        f"{compared(runs, (1, 3))} {compared(runs, (2, 4))}",
        cost(runs),
        f"Model {model}: {config.parameters():,} weights, {options.rows} rows of "
        f"{config.context:,} tokens. Median of the steps after {WARMUP}. The first step is over "
        "that long after the start of the process; in the time beside it, which is a part, the "
        "step was compiled or found.",
    ]
    legend += [running.QUICK] * options.quick
    out = running.results_path(options, f"repeat-{model}", device)
    if out is not None:
        facts = {"same_bits": same_bits(runs), "runs": runs}
        running.write_results(out, device, title, legend, table, facts)
    if last:
        running.show(title, table, legend)


def main(options: Options) -> int:
    model, on_gpu = "tiny" if options.quick else options.model, running.device_kind() != "cpu"
    require(on_gpu or options.quick, "There is no GPU here: --quick trains a tiny model on a CPU.")
    require(model in running.MODELS, f"--model is {model!r}: give 120m or 1b.")
    require(options.steps > WARMUP, f"--steps is {options.steps}: give more than {WARMUP}.")
    runs = measure(options, model, on_gpu, lambda runs: report(runs, model, options, last=False))
    report(runs, model, options)
    return 0 if same_bits(runs) and not any("failure" in row for row in runs) else 1


if __name__ == "__main__":
    running.command(Options, __doc__, main, run)
