"""Times the training step on this device: ours in its variants, and PyTorch's beside it.

    python -m benchmarks.step.training                      # the 1.1B on a GPU, the demo on a CPU
    python -m benchmarks.step.training --systems variants   # our step with each faster option
    python -m benchmarks.step.training --quick              # a tiny model, whose times mean nothing

Systems train one after another, each in a new process, all on the same random tokens. Ours runs
again between and after the others, so that a drifting clock affects both sides. A step is timed
from an idle device to an idle device, with its optimizer update, and the median is reported. After
each system the table and its JSON are written to results/; the table is printed at the end. A
system for which no time was left is named in it.

A peer that runs out of memory is tried once more with half the rows at a time, so that it is
compared at what it can do. Ours is not: `tinyllama plan` predicts how many rows fit, and a run with
fewer would hide a wrong prediction. The exit code is 1 if one of our systems failed.
"""

import contextlib
import dataclasses
import datetime
import statistics
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from rich.console import Console

from benchmarks import running
from benchmarks.running import MODELS, NO_TIME
from tinyllama_jax.config import LlamaConfig, OptimizerConfig
from tinyllama_jax.errors import require
from tinyllama_jax.performance.flops import flops_per_token, mfu

# Rows of a step: at least 131,072 tokens, but fewer for the models that a CPU trains.
ROWS = {"1b": 64, "120m": 64, "demo": 8, "tiny": 8}
WARMUP = 3
OPTIMIZER = OptimizerConfig(peak_lr=4e-4, end_lr=4e-4, warmup_steps=0)
SCHEDULED = 10_000  # steps of the learning rate schedule, which is constant
OURS = "tinyllama_jax"
COLD = 100  # seconds that a system with its compilation is expected to take on an H100


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
    """Options of XLA, besides those of runtime/compiler.py."""
    without: tuple[str, ...] = ()
    """Modules of model/ that run without their kernels: `norm`, `loss`."""

    def __str__(self):
        named = [f"{name} {value!s:.12}" for name, value in (self.options | self.flags).items()]
        options = ", ".join([*named, *(f"without {name}'s kernels" for name in self.without)])
        return f"{self.whose}, {self.micro_rows} rows" + (f", {options}" if options else "")


Part = Literal["ours", "peer", "peers", "variants"]
WHOLE: tuple[Part, ...] = ("ours", "peer", "ours", "peers", "ours")


def gpu_systems(parts: tuple[Part, ...], rows: int = 16) -> list[System]:
    """The systems of all parts, in the order in which they run.

    `ours` is what `auto` chooses on an H100, `peer` is the fastest PyTorch step by published
    results, `peers` are all others to compare with, and `variants` vary ours.
    """

    def ours(micro_rows: int = rows, flags=None, without=(), **options) -> System:
        defaults = {"recompute": "elementwise", "attention": "cudnn"}
        return System(OURS, "bfloat16", micro_rows, defaults | options, flags or {}, without)

    def peer(attention: str, whose: str = "torch") -> System:
        return System(whose, "bfloat16", rows, {"attention": attention})

    systems = {
        "ours": [ours()],
        "peer": [peer("cudnn")],
        "peers": [peer("auto", "torch transformers"), ours(attention="pallas"), peer("flash")],
        "variants": [
            ours(),
            ours(3 * rows // 2),
            ours(without=("norm",)),
            ours(without=("loss",)),
            ours(flags={"xla_gpu_enable_triton_gemm": True}),
            ours(),
            ours(attention="pallas"),
            ours(recompute="nothing"),
            ours(attention="triton"),
            ours(),
        ],
    }
    return [system for part in parts for system in systems[part]]


def cpu_systems(rows: int) -> list[System]:
    """Ours, and PyTorch's eager and compiled, in the order in which they run."""
    # Half the rows at a time, as in configs/demo.py. PyTorch is faster with all of them.
    ours = System(OURS, "float32", rows // 2)
    eager = System("torch", "float32", rows, {"compiled": False})
    compiled = System("torch", "float32", rows, {"compiled": True})
    return [ours, eager, compiled, ours, eager, compiled, ours]


@dataclasses.dataclass(frozen=True)
class Options:
    model: str | None = None
    """1b, 120m or demo; by default the 1.1B on a GPU, and the demo's model on a CPU."""
    steps: int = 9
    """Steps that are timed, after three that warm up."""
    micro_rows: int = 16
    """Rows of a micro-batch, on a GPU."""
    seconds: float = 420
    """Time for all systems together; none starts that would hardly end in it."""
    systems: tuple[Part, ...] = WHOLE
    """Groups of systems that run on a GPU, in this order."""
    caches: Path | None = None
    """Folder that keeps compiled programs for later calls; by default they are removed."""
    quick: bool = False
    out: Path | None = None
    """Path of the results, without suffix; by default benchmarks/results/DATE-NAME-MODEL-DEVICE,
    where NAME is training, peers or variants."""


def token_batches(spec: dict[str, Any]):
    """Yields random tokens (A, B, S) for each step, the same for all systems."""
    import numpy as np

    rng = np.random.default_rng(0)
    micro_batches = spec["rows"] // spec["micro_rows"]
    shape = (micro_batches, spec["micro_rows"], spec["model"]["context"] + 1)
    for _ in range(WARMUP + spec["steps"]):
        # No eos: two in a row would be padding for us, and a target for PyTorch.
        yield rng.integers(3, spec["model"]["vocab_size"], shape, np.int32)


def run_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains with our step; returns its times and losses, and the roofline if it is asked for."""
    from benchmarks.step import ours
    from tinyllama_jax.performance.breakdown import roofline_by_kind
    from tinyllama_jax.runtime import compiler

    config = ours.config_of(spec, OPTIMIZER, SCHEDULED)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(compiler.SINGLE_GPU_OPTIONS, spec["flags"]))
        for module in spec["without"]:
            name = f"tinyllama_jax.model.{module}.has_kernels"
            stack.enter_context(mock.patch(name, lambda: False))
        result, _, program = ours.train(config, token_batches(spec), spec["begun"])
    result["seconds"] = result["seconds"][WARMUP:]
    tokens = spec["rows"] * config.model.context

    def roofline() -> float:
        return sum(roofline_by_kind(program, config, tokens, running.device_kind()).values())

    if spec["predict"]:
        result["predicted_seconds"] = running.if_known("the roofline", roofline) or None
    return result


def run_torch(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains with the PyTorch step; returns its times and losses."""
    import torch

    from benchmarks.step.torch_peer import Trainer, timed_steps

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
    result = timed_steps(trainer, token_batches(spec), spec["begun"])
    result["seconds"] = result["seconds"][WARMUP:]
    return result


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains with the system that the spec names; this is the work of a worker."""
    return run_ours(spec) if spec["whose"] == OURS else run_torch(spec)


def measure(
    systems: list[System],
    model: str,
    options: Options,
    tell: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Measures all systems in their order, and returns a row for each turn.

    Args:
      systems: what is measured; a system may come several times.
      model: name of the model.
      options: of the command line.
      tell: is called with all rows so far after each turn.
    """
    started, rows_so_far, queue = time.monotonic(), [], deque(systems)
    predicted, took, failed = {}, {}, {}  # by system, from its earlier turns
    with contextlib.ExitStack() as stack:
        # A system that runs again finds its programs compiled: only its first start is cold.
        folder = options.caches or stack.enter_context(tempfile.TemporaryDirectory("-caches"))
        caches = running.own_caches(str(Path(folder).absolute()))
        status = stack.enter_context(Console(stderr=True).status(""))
        while queue:
            system = queue.popleft()
            name, micro_rows = str(system), system.micro_rows
            rows = -(-ROWS[model] // micro_rows) * micro_rows  # rounded up to whole micro-batches
            spec = running.spec_of(model, rows, system.precision, options.steps, micro_rows)
            settings = {
                "options": system.options,
                "flags": system.flags,
                "without": system.without,
            }
            spec |= settings | {"whose": system.whose, "predict": name not in predicted}
            row = {"system": system.whose, "name": name, "precision": system.precision}
            row |= settings | {"micro_rows": micro_rows, "rows": rows}
            status.update(name)
            begun = time.monotonic()
            left = options.seconds - (begun - started)
            if name in failed:  # it would fail again, after another costly start
                row["failure"] = failed[name]
            elif left < took.get(name, COLD):
                row["failure"] = NO_TIME
            else:
                row |= running.in_own_process("benchmarks.step.training", spec, left, caches)
            if "failure" not in row:
                took[name] = 1.5 * (time.monotonic() - begun)
                # The turn that compiles predicts: a program that comes from a cache may not know
                # its memory.
                row.setdefault("predicted_seconds", predicted.get(name))
                predicted[name] = row["predicted_seconds"]
                complete(row, MODELS[model], rows)
            elif row["failure"] != NO_TIME:
                failed[name] = row["failure"]
                if short_of_memory(row) and system.whose != OURS and system in systems:
                    queue.appendleft(dataclasses.replace(system, micro_rows=micro_rows // 2))
            rows_so_far.append(row)
            tell(rows_so_far)
    return rows_so_far


def short_of_memory(row: dict[str, Any]) -> bool:
    """Whether a system ran out of memory, and might do with fewer rows."""
    return row.get("failure", "").startswith(running.OUT_OF_MEMORY) and row["micro_rows"] > 1


def complete(row: dict[str, Any], config: LlamaConfig, rows: int) -> None:
    """Adds to a measured row the numbers that the table shows."""
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
    """A row of the table; a failure takes the place of the numbers."""
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
    """Prints the table in 80 columns: systems are numbered in it, and named below it."""
    table, names = [["", *COLUMNS[2:]]], []
    for number, row in enumerate(rows, start=1):
        name, precision, *numbers = cells(row)
        failed = "failure" in row
        names.append(f"{number}: {name}, {precision}" + (f": {row['failure']}" if failed else ""))
        table.append([str(number), *([] if failed else numbers)])
    running.show(title, table, [*names, "", *legend])


def fastest(rows: list[dict[str, Any]], mine: bool) -> tuple[str, float]:
    """(name, tokens/s) of our fastest system, or the fastest peer, by the median of its turns."""
    turns = defaultdict(list)
    for row in rows:
        if (row["system"] == OURS) == mine:
            turns[row["name"]].append(row["tokens_per_s"])
    medians = {name: statistics.median(speeds) for name, speeds in turns.items()}
    return max(medians.items(), key=lambda item: item[1], default=("", 0.0))


def ratio(rows: list[dict[str, Any]]) -> list[str]:
    """At most one line: how ours compares with the peers, and which peers did not run."""
    done = [row for row in rows if "failure" not in row]
    (ours, our_speed), (peer, peer_speed) = (fastest(done, mine) for mine in (True, False))
    line = ""
    if ours and peer:
        line = (
            f"{ours} over {peer}, each side's fastest by the median of its turns: "
            f"{our_speed / peer_speed:.2f}."
        )
    missing = {row["name"]: row["failure"] for row in rows if "failure" in row}
    for row in done:
        missing.pop(row["name"], None)  # it ran in another turn
    theirs = {row["name"] for row in rows if row["system"] != OURS}
    not_run = [f"{name} ({why})" for name, why in missing.items() if name in theirs]
    if not_run:
        line += f" Peers that did not run are NOT beaten: {'; '.join(not_run)}."
    return [line.strip()] * bool(line)


def report(rows: list[dict[str, Any]], model: str, options: Options, last: bool = True) -> None:
    """Writes the table, and prints it if it is the last one."""
    config, device = MODELS[model], running.device_kind()
    formula = [f"{flops_per_token(config, causal=causal) / 1e9:.4g}" for causal in (False, True)]
    legend = [
        f"Model {model}: {config.parameters():,} weights, rows of {config.context} tokens.",
        f"Tokens/s: median (slowest-fastest) of {options.steps} steps after {WARMUP}, optimizer "
        "included, in the order in which they ran.",
        f"Of peak: {formula[0]} GFLOP a token with full attention (6 N' + 12 L N H T), "
        f"{formula[1]} causally (6 N' + 6 L N H T), over the data sheet's bf16 peak.",
        "Predicted: the roofline of the compiled program (performance/roofline.py).",
        "First step: from the start of the process; a system that ran before finds its programs "
        "compiled, but for ours on a CPU.",
        *ratio(rows),
    ]
    if options.quick:
        legend.append(running.QUICK)
    title = f"The training step on {device}, {datetime.date.today().isoformat()}"
    part = options.systems[0]
    name = part if part in ("peers", "variants") else "training"
    out = running.results_path(options, f"{name}-{model}", device)
    # If there was time for no system, the table of an earlier call stays.
    if out is not None and any(row.get("failure") != NO_TIME for row in rows):
        table = [list(COLUMNS), *map(cells, rows)]
        running.write_results(out, device, title, legend, table, {"steps": rows})
    if last:
        show(rows, title, legend)


def main(options: Options) -> int:
    on_gpu = running.device_kind() != "cpu"
    model = "tiny" if options.quick else options.model or ("1b" if on_gpu else "demo")
    require(model in MODELS, f"--model is {model!r}: {', '.join(MODELS)} are there.")
    rows = 4 if options.quick else options.micro_rows if on_gpu else ROWS[model]
    require(
        on_gpu or options.systems == WHOLE, "--systems are those of a GPU, and there is none here."
    )
    systems = gpu_systems(options.systems, rows) if on_gpu else cpu_systems(rows)
    measured = measure(
        systems, model, options, lambda rows: report(rows, model, options, last=False)
    )
    report(measured, model, options)
    ours = [row.get("failure", NO_TIME) for row in measured if row["system"] == OURS]
    return 1 if any(why != NO_TIME for why in ours) else 0


if __name__ == "__main__":
    running.command(Options, __doc__, main, run)
