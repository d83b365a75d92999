"""The training step on this device: ours by its variants, beside PyTorch's, in one call.

    python benchmarks/training.py                 # on a GPU the 1.1B, on a CPU the demo's model
    python benchmarks/training.py --variants      # ours alone, by all that may make it faster
    python benchmarks/training.py --quick         # a tiny model, which times nothing of worth

Each system trains in a process of its own on the same random tokens, one after the other, and ours
comes again between and after the others, so that a clock that drifts meets both. The time of a
step is from an idle device to an idle device, optimizer included; the median is told. Systems that
the time does not suffice for are named. One table comes last, and lies in results/ with its JSON.
"""

import dataclasses
import datetime
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

import running
from running import MODELS
from tinyllama_jax.config import LlamaConfig, OptimizerConfig, require
from tinyllama_jax.training.flops import flops_per_token, mfu

# Rows of a step: 131,072 tokens and more, but for those that a CPU trains.
ROWS = {"1b": 64, "120m": 64, "demo": 8, "tiny": 8}
WARMUP = 3
OPTIMIZER = OptimizerConfig(peak_lr=4e-4, end_lr=4e-4, warmup_steps=0)
SCHEDULED = 10_000  # steps of a schedule that is constant


@dataclasses.dataclass(frozen=True)
class System:
    """One way to compute the step."""

    whose: str
    """`tinyllama_jax`, `torch` (torch_peer.py) or `torch transformers`."""
    precision: str
    micro_rows: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of ExecutionConfig, or arguments of torch_peer's Trainer."""
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of XLA, besides those of runtime/compiler.py."""

    def __str__(self):
        said = (self.options | self.flags).items()
        options = ", ".join(f"{name} {value!s:.12}" for name, value in said)
        return f"{self.whose}, {self.micro_rows} rows" + (f", {options}" if options else "")


def gpu_systems(rows: int = 16, variants: bool = False) -> list[System]:
    """In the order in which they run: ours first, between the peers or its variants, and last."""

    def ours(micro_rows: int = rows, flags: dict[str, Any] | None = None, **options) -> System:
        defaults = {"recompute": "elementwise", "unroll_layers": True, "attention": "pallas"}
        return System("tinyllama_jax", "bfloat16", micro_rows, defaults | options, flags or {})

    def peer(attention: str, whose: str = "torch") -> System:
        return System(whose, "bfloat16", rows, {"attention": attention})

    if variants:
        return [
            ours(),
            ours(attention="cudnn"),
            ours(2 * rows),
            ours(recompute="nothing", attention="cudnn"),
            ours(flags={"xla_gpu_enable_triton_gemm": False}),
            ours(),
            ours(attention="triton"),
            ours(unroll_layers=False),
            ours(),
        ]
    return [
        ours(attention="cudnn"),  # what `auto` takes on an H100
        peer("cudnn"),
        ours(),
        peer("flash"),
        peer("auto", "torch transformers"),
        ours(attention="cudnn"),
    ]


def cpu_systems(rows: int) -> list[System]:
    # As configs/demo.py: half the rows at a time. PyTorch is faster with all of them.
    ours = System("tinyllama_jax", "float32", rows // 2, {"unroll_layers": True})
    eager = System("torch", "float32", rows, {"compiled": False})
    compiled = System("torch", "float32", rows, {"compiled": True})
    return [ours, eager, compiled, ours, eager, compiled, ours]


@dataclasses.dataclass(frozen=True)
class Options:
    model: str | None = None
    """1b, 120m or demo; by default the 1.1B on a GPU, the demo's on a CPU."""
    steps: int = 9
    """Timed; three more warm up."""
    micro_rows: int = 16
    """Of a GPU."""
    seconds: float = 420
    """No system begins after this long."""
    variants: bool = False
    quick: bool = False
    out: Path | None = None
    """Where the results go, without suffix; benchmarks/results/DATE-training-DEVICE by default, and
    DATE-variants-DEVICE."""


def token_batches(spec: dict[str, Any]):
    """Random tokens (A, B, S) of each step, the same for all systems."""
    import numpy as np

    rng = np.random.default_rng(0)
    micro_batches = spec["rows"] // spec["micro_rows"]
    shape = (micro_batches, spec["micro_rows"], spec["model"]["context"] + 1)
    for _ in range(WARMUP + spec["steps"]):
        # No eos: two in a row would be padding here, and a target there.
        yield rng.integers(3, spec["model"]["vocab_size"], shape, np.int32)


def run_ours(spec: dict[str, Any]) -> dict[str, Any]:
    import ours
    from tinyllama_jax.runtime import compiler
    from tinyllama_jax.training.breakdown import roofline_by_kind

    config = ours.config_of(spec, OPTIMIZER, SCHEDULED)
    with mock.patch.dict(compiler.GPU_OPTIONS, spec["flags"]):
        found, _, program = ours.train(config, token_batches(spec), spec["begun"])
    found["seconds"] = found["seconds"][WARMUP:]
    tokens = spec["rows"] * config.model.context
    if spec["predict"]:
        least = roofline_by_kind(program, config, tokens, running.device_kind())
        found["predicted_seconds"] = sum(least.values()) or None
    return found


def run_torch(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from torch_peer import Trainer, timed_steps

    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(
        LlamaConfig(**spec["model"]),
        device=device,
        precision=spec["precision"],
        whose="transformers" if spec["whose"].endswith("transformers") else "ours",
        optimizer=OPTIMIZER,
        steps=SCHEDULED,
        **spec["options"],
    )
    found = timed_steps(trainer, token_batches(spec), spec["begun"])
    found["seconds"] = found["seconds"][WARMUP:]
    return found


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own does."""
    return run_ours(spec) if spec["whose"] == "tinyllama_jax" else run_torch(spec)


def measure(systems: list[System], model: str, options: Options) -> list[dict[str, Any]]:
    """A row for each system, in the order in which they ran."""
    rows = ROWS[model]
    if not options.quick:
        rows = max(rows, *(system.micro_rows for system in systems))
    started, found, predicted = time.monotonic(), [], {}
    # Whoever comes again finds what it compiled: only its first start was a cold one.
    caches = tempfile.TemporaryDirectory(prefix="caches-")
    with caches as folder, Console(stderr=True).status("") as status:
        for system in systems:
            left = options.seconds - (time.monotonic() - started)
            spec = running.spec_of(model, rows, system.precision, options.steps, system.micro_rows)
            spec |= {"whose": system.whose, "options": system.options, "flags": system.flags}
            spec["predict"] = str(system) not in predicted
            row = {"system": system.whose, "name": str(system), "precision": system.precision}
            row |= {"micro_rows": system.micro_rows, "options": system.options}
            row["flags"] = system.flags
            status.update(str(system))
            if left < 0:
                row["failure"] = "no time left"
            else:
                row |= running.in_own_process(__file__, spec, left + 90, running.own_caches(folder))
            if "failure" not in row:
                # Read off the program that was compiled: one from a cache need not tell its memory.
                row.setdefault("predicted_seconds", predicted.get(str(system)))
                predicted[str(system)] = row["predicted_seconds"]
                complete(row, MODELS[model], rows)
            found.append(row)
    return found


def complete(row: dict[str, Any], config: LlamaConfig, rows: int) -> None:
    """Adds what the table shows to what was measured."""
    tokens = rows * config.context
    middle = statistics.median(row["seconds"])
    row["tokens_per_s"] = tokens / middle
    row["tokens_per_s_range"] = [tokens / max(row["seconds"]), tokens / min(row["seconds"])]
    for name, causal in (("mfu_full", False), ("mfu_causal", True)):
        row[name] = mfu(
            config, row["tokens_per_s"], row.get("device", running.device_kind()), causal=causal
        )
    row["peak_gib"] = row["peak_bytes"] / 2**30 if row.get("peak_bytes") else None
    if row.get("predicted_seconds"):
        row["predicted_tokens_per_s"] = tokens / row["predicted_seconds"]


COLUMNS = ("system", "precision", "tokens/s", "of peak, full", "causal", "GiB", "predicted")
COLUMNS += ("first step",)


def cells(row: dict[str, Any]) -> list[str]:
    if "failure" in row:
        return [row["name"], row["precision"], row["failure"]]

    def share(value):
        return "" if value is None else f"{value:.1%}"

    low, high = row["tokens_per_s_range"]
    predicted = row.get("predicted_tokens_per_s")
    return [
        row["name"],
        row["precision"],
        f"{row['tokens_per_s']:,.0f} ({low:,.0f}-{high:,.0f})",
        share(row["mfu_full"]),
        share(row["mfu_causal"]),
        "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
        "" if predicted is None else f"{predicted:,.0f}",
        f"{row['first_step_seconds']:.0f} s",
    ]


def show(rows: list[dict[str, Any]], title: str, legend: list[str]) -> None:
    """The table in 80 columns: systems have numbers in it, and their names below."""
    table, names = [["", *COLUMNS[2:]]], []
    for number, row in enumerate(rows, start=1):
        name, precision, *numbers = cells(row)
        failed = "failure" in row
        names.append(f"{number}: {name}, {precision}" + (f": {row['failure']}" if failed else ""))
        table.append([str(number), *([] if failed else numbers)])
    running.show(title, table, [*names, "", *legend])


def fastest(rows: list[dict[str, Any]], mine: bool) -> tuple[str, float]:
    """(name, tokens/s) of the fastest of ours, or of the peers, by the median of its turns."""
    turns = defaultdict(list)
    for row in rows:
        if (row["system"] == "tinyllama_jax") == mine:
            turns[row["name"]].append(row["tokens_per_s"])
    medians = {name: statistics.median(speeds) for name, speeds in turns.items()}
    return max(medians.items(), key=lambda item: item[1], default=("", 0.0))


def report(rows: list[dict[str, Any]], model: str, options: Options) -> None:
    config, device = MODELS[model], running.device_kind()
    done = [row for row in rows if "failure" not in row]
    formula = [f"{flops_per_token(config, causal=causal) / 1e9:.4g}" for causal in (False, True)]
    legend = [
        f"Model {model}: {config.parameters():,} weights, rows of {config.context} tokens.",
        f"Tokens/s: median (slowest-fastest) of {options.steps} steps after {WARMUP}, optimizer "
        "included, in the order in which they ran.",
        f"Of peak: {formula[0]} GFLOP a token with full attention (6 N' + 12 L N H T), "
        f"{formula[1]} causally (6 N' + 6 L N H T), over the data sheet's bf16 peak.",
        "Predicted: the roofline of the compiled program (training/roofline.py).",
        "First step: from the start of the process; a system that ran before finds its programs "
        "compiled, but for ours on a CPU.",
    ]
    (ours, our_speed), (peer, peer_speed) = (fastest(done, mine) for mine in (True, False))
    if ours and peer:
        legend.append(
            f"{ours} over {peer}, each side's fastest by the median of its turns: "
            f"{our_speed / peer_speed:.2f}."
        )
    if options.quick:
        legend.append(running.QUICK)
    title = f"The training step on {device}, {datetime.date.today().isoformat()}"
    show(rows, title, legend)

    name = "variants" if options.variants else "training"
    out = running.results_path(options, f"{name}-{model}", device)
    if out is not None:
        table = [list(COLUMNS), *map(cells, rows)]
        running.write_results(out, device, title, legend, table, {"steps": rows})


def main(options: Options) -> int:
    on_gpu = running.device_kind() != "cpu"
    model = "tiny" if options.quick else options.model or ("1b" if on_gpu else "demo")
    require(model in MODELS, f"--model is {model!r}: {', '.join(MODELS)} are there.")
    rows = 4 if options.quick else options.micro_rows if on_gpu else ROWS[model]
    require(on_gpu or not options.variants, "--variants are those of a GPU, and there is none.")
    systems = gpu_systems(rows, options.variants) if on_gpu else cpu_systems(rows)
    report(measure(systems, model, options), model, options)
    return 0


if __name__ == "__main__":
    running.command(Options, __doc__, main, run)
