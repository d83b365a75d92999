"""Is it repeatable? Runs of 50 steps in processes of their own, and what equal bits cost.

    python benchmarks/repeat.py                # on a GPU the 120M
    python benchmarks/repeat.py --model 1b
    python benchmarks/repeat.py --quick        # a tiny model, which times nothing of worth

Two runs have what equal bits need, and two in turn with them have not:

- the embedding's gradient is added up in order (model/embedding.py); else by JAX's own, whose order
  on a GPU is left to chance;
- programs are kept with the kernels that were measured to be the fastest (runtime/compiler.py);
  else each process measures anew.

Attention is ours in all of them: cuDNN's backward pass adds in any order. Compared are all bits of
weights and optimizer after the last step, and all losses; exit code 1 says that they differ. The
first run starts cold, and the third finds its programs.
"""

import dataclasses
import datetime
import hashlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console

import running
from tinyllama_jax.config import OptimizerConfig, require

WARMUP = 5
OPTIMIZER = OptimizerConfig(warmup_steps=0)


@dataclasses.dataclass(frozen=True)
class Options:
    model: str = "120m"
    """Or 1b."""
    steps: int = 50
    rows: int = 8
    seconds: float = 600
    """For all runs together."""
    quick: bool = False
    out: Path | None = None
    """Where the results go, without suffix; benchmarks/results/DATE-repeat-DEVICE by default."""


def token_batches(spec: running.Spec) -> Iterator[np.ndarray]:
    """Random tokens (A, B, S) of each step, of which some are as frequent as in text."""
    rng, first = np.random.default_rng(0), 3  # no eos: two in a row would be padding
    shape = (1, spec["rows"], spec["model"]["context"] + 1)
    for _ in range(spec["steps"]):
        # The logarithm of a piece's rank is uniform, as by Zipf's law.
        ranks = (spec["model"]["vocab_size"] - first) ** rng.random(shape)
        yield (first - 1 + ranks).astype(np.int32)


def run(spec: running.Spec) -> dict[str, Any]:
    """What a process of its own does."""
    import jax

    import ours
    from tinyllama_jax.model import llama
    from tinyllama_jax.runtime.mesh import named_leaves

    def in_any_order(table_VD, tokens_BT):
        return table_VD[tokens_BT]

    embedding = llama.embedding if spec["repeatable"] else in_any_order
    config = ours.config_of(spec, OPTIMIZER, spec["steps"])
    with mock.patch.object(llama, "embedding", embedding):
        found, state, _ = ours.train(config, token_batches(spec), spec["begun"])
    leaves = named_leaves(jax.device_get(state)).items()
    bits = {name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for name, leaf in leaves}
    return found | {"bits": bits}


def differences(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Where two runs differ, in words; empty where all bits are equal."""
    steps = [
        step
        for step, pair in enumerate(zip(a["losses"], b["losses"], strict=True), start=1)
        if np.float64(pair[0]).tobytes() != np.float64(pair[1]).tobytes()
    ]
    arrays = [name for name, digest in a["bits"].items() if b["bits"][name] != digest]
    told = [f"the loss from step {steps[0]} on"] if steps else []
    if arrays:
        told.append(f"{len(arrays)} of {len(a['bits'])} arrays, {arrays[0]} among them")
    return " and ".join(told)


def measure(options: Options, model: str, on_gpu: bool) -> list[dict[str, Any]]:
    """What four runs found: with what equal bits need, without, with, without."""
    spec = running.spec_of(model, options.rows, "bfloat16" if on_gpu else "float32", options.steps)
    attention = {"attention": "pallas"} if on_gpu and not options.quick else {}
    spec["options"] = {"unroll_layers": True, "recompute": "elementwise"} | attention
    found, started = [], time.monotonic()
    temporary = tempfile.TemporaryDirectory(prefix="repeat-")
    with temporary as folder, Console(stderr=True).status("") as status:
        for number in range(4):
            repeatable = number % 2 == 0
            caches = running.own_caches(f"{folder}/kept" if repeatable else f"{folder}/{number}")
            status.update(f"run {number + 1} of 4")
            asked = spec | {"repeatable": repeatable}
            left = options.seconds - (time.monotonic() - started)
            row = running.in_own_process(__file__, asked, max(left, 0), caches)
            require("failure" not in row, f"Run {number + 1} of 4 failed: {row.get('failure')}")
            found.append({"repeatable": repeatable} | row)
    return found


def main(options: Options) -> int:
    device = running.device_kind()
    model, on_gpu = "tiny" if options.quick else options.model, device != "cpu"
    require(on_gpu or options.quick, "There is no GPU here: --quick trains a tiny model on a CPU.")
    require(model in running.MODELS, f"--model is {model!r}: give 120m or 1b.")
    require(options.steps > WARMUP, f"--steps is {options.steps}: give more than {WARMUP}.")
    found = measure(options, model, on_gpu)
    first, free, second, free_again = found
    table = [
        ["run", "in order, kept", "ms a step, (fastest-slowest)", "first step, after", "compiled"]
    ]
    medians = []
    for number, row in enumerate(found, start=1):
        times = [1e3 * seconds for seconds in row["seconds"][WARMUP:]]
        medians.append(statistics.median(times))
        spread = f"{medians[-1]:.2f} ({min(times):.2f}-{max(times):.2f})"
        starts = [f"{row[f'{name}_seconds']:.1f} s" for name in ("first_step", "compile")]
        table.append([str(number), "yes" if row["repeatable"] else "no", spread, *starts])

    differ, without = differences(first, second), differences(free, free_again)
    cost = (medians[0] + medians[2]) / (medians[1] + medians[3]) - 1
    noise = abs(medians[0] / medians[2] - 1)
    config = running.MODELS[model]
    title = f"Repeating {options.steps} steps on {device}, {datetime.date.today().isoformat()}"
    legend = [
        f"Runs 1 and 3: {'THEY DIFFER in ' + differ if differ else 'the same bits'}. "
        f"Runs 2 and 4, without what that needs: {without or 'the same bits'}.",
        f"It costs {cost:+.2%} of a step; runs 1 and 3 are {noise:.2%} apart.",
        f"Model {model}: {config.parameters():,} weights, {options.rows} rows of "
        f"{config.context:,} tokens. Median of the steps after {WARMUP}. The first step is over "
        "that long after the start of the process; in the time beside it, which is a part, the "
        "step was compiled or found.",
    ]
    legend += [running.QUICK] * options.quick
    running.show(title, table, legend)
    out = running.results_path(options, f"repeat-{model}", device)
    if out is not None:
        facts = {"same_bits": not differ, "cost": cost, "runs": found}
        running.write_results(out, device, title, legend, table, facts)
    return 1 if differ else 0


if __name__ == "__main__":
    running.command(Options, __doc__, main, run)
