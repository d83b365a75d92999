"""The training step on this device: ours by its variants, beside PyTorch's, in one call.

    python benchmarks/training.py                 # on a GPU the 1.1B, on a CPU the demo's model
    python benchmarks/training.py --quick         # a tiny model, which times nothing of worth

Each system trains in a process of its own on the same random tokens, one after the other, and ours
comes again between and after the others, so that a clock that drifts meets both. The time of a
step is from an idle device to an idle device, optimizer included; the median is told. Systems that
the time does not suffice for are named. One table comes last, and lies in results/ with its JSON.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from tinyllama_jax.config import (
    DEMO,
    TINYLLAMA_1B,
    TINYLLAMA_120M,
    Config,
    DataConfig,
    ExecutionConfig,
    LlamaConfig,
    OptimizerConfig,
    UserError,
    make_folder,
    require,
    write_aside,
)
from tinyllama_jax.training.flops import flops_per_token, mfu

REPOSITORY = Path(__file__).parents[1]
TINY = LlamaConfig(
    vocab_size=512,
    layers=2,
    width=64,
    query_heads=4,
    kv_heads=2,
    head_width=16,
    swiglu_width=96,
    context=64,
)
# Name -> (model, rows of a step): 131,072 tokens and more, but for those that a CPU trains.
MODELS = {
    "1b": (TINYLLAMA_1B, 64),
    "120m": (TINYLLAMA_120M, 64),
    "demo": (DEMO, 8),
    "tiny": (TINY, 8),
}
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "torch", "triton", "transformers")
WARMUP = 3
OPTIMIZER = OptimizerConfig(peak_lr=4e-4, end_lr=4e-4, warmup_steps=0)


@dataclasses.dataclass(frozen=True)
class System:
    """One way to compute the step."""

    whose: str
    """`tinyllama_jax`, `torch` (torch_peer.py) or `torch transformers`."""
    precision: str
    micro_rows: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of ExecutionConfig, or arguments of torch_peer's Trainer."""

    def __str__(self):
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"{self.whose}, {self.micro_rows} rows" + (f", {options}" if options else "")


def gpu_systems(rows: int = 16) -> list[System]:
    """In the order in which they run: ours first, between and last, then its other variants."""

    def ours(micro_rows: int = rows, **options) -> System:
        defaults = {"recompute": "elementwise", "unroll_layers": True, "attention": "pallas"}
        return System("tinyllama_jax", "bfloat16", micro_rows, defaults | options)

    def peer(attention: str, whose: str = "torch") -> System:
        return System(whose, "bfloat16", rows, {"attention": attention})

    return [
        ours(),
        peer("cudnn"),
        ours(),
        peer("flash"),
        peer("auto", "torch transformers"),
        ours(),
        ours(recompute="nothing", attention="cudnn"),
        ours(2 * rows),
        ours(attention="triton"),
        ours(unroll_layers=False),
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
    quick: bool = False
    out: Path | None = None
    """Where the results go, without suffix; benchmarks/results/DATE-training-DEVICE by default."""


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
    """Trains as `tinyllama train` does, on one device."""
    start = time.perf_counter()
    import jax

    from tinyllama_jax.data.boundaries import loss_weights
    from tinyllama_jax.runtime.mesh import make_mesh, put_batch
    from tinyllama_jax.runtime.targets import CARDS
    from tinyllama_jax.training import roofline
    from tinyllama_jax.training.program import read_program
    from tinyllama_jax.training.step import init_state, make_step

    config = Config(
        run_folder="",
        model=LlamaConfig(**spec["model"]),
        data=DataConfig(),
        steps=10_000,
        batch_rows=spec["rows"],
        micro_batches=spec["rows"] // spec["micro_rows"],
        compute_dtype=spec["precision"],
        optimizer=OPTIMIZER,
        execution=ExecutionConfig(**spec["options"]),
    )
    mesh, seconds, losses = make_mesh(devices=jax.devices()[:1]), [], []
    device, program, compile_seconds = jax.devices()[0], None, 0.0
    with jax.set_mesh(mesh):
        state, step = init_state(config, mesh), make_step(config, mesh)
        for tokens in token_batches(spec):
            batch = put_batch(tokens, mesh, 1), put_batch(loss_weights(tokens), mesh, 1)
            jax.block_until_ready((state, batch))
            if program is None:
                before = time.perf_counter()
                program = step.lower(state, *batch).compile()
                compile_seconds = time.perf_counter() - before
            before = time.perf_counter()
            state, metrics = program(state, *batch)
            losses.append(float(jax.block_until_ready((state, metrics))[1]["train/loss"]))
            seconds.append(time.perf_counter() - before)
            if len(seconds) == 1:
                first = time.perf_counter() - start
    stats = device.memory_stats() or {}
    found = {
        "seconds": seconds[WARMUP:],
        "losses": losses,
        "first_step_seconds": first,
        "compile_seconds": compile_seconds,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }
    target = next((card for card in CARDS.values() if card.device_kind == device.device_kind), None)
    if target and program:
        tokens_of_step = spec["rows"] * config.model.context
        work = roofline.work_of_program(read_program(program), config, tokens_of_step)
        found["predicted_seconds"] = roofline.seconds(work, target)
    return found


def run_torch(spec: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    import torch

    from torch_peer import Trainer, timed_steps

    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(
        LlamaConfig(**spec["model"]),
        device=device,
        precision=spec["precision"],
        whose="transformers" if spec["whose"].endswith("transformers") else "ours",
        optimizer=OPTIMIZER,
        **spec["options"],
    )
    begun = time.perf_counter() - start
    found = timed_steps(trainer, token_batches(spec), WARMUP)
    found["first_step_seconds"] += begun
    return found


def in_own_process(spec: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the system found, or `failure`: one line."""
    command = [sys.executable, __file__, "--worker", json.dumps(spec)]
    # JAX would take most of the memory at once, and say nothing of how much it needs.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        shown = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"not done within {seconds:.0f} s"}
    if shown.returncode:
        lines = [line for line in shown.stderr.splitlines() if line.strip()]
        return {"failure": (lines or [f"exit code {shown.returncode}"])[-1][:160]}
    return json.loads(shown.stdout.splitlines()[-1])


def measure(systems: list[System], model: str, options: Options) -> list[dict[str, Any]]:
    """A row for each system, in the order in which they ran."""
    config, rows = MODELS[model]
    if not options.quick:
        rows = max(rows, *(system.micro_rows for system in systems))
    started, found = time.monotonic(), []
    with Console(stderr=True).status("") as status:
        for system in systems:
            left = options.seconds - (time.monotonic() - started)
            spec = dataclasses.asdict(system) | {
                "model": dataclasses.asdict(config),
                "rows": rows,
                "steps": options.steps,
            }
            row = {"system": system.whose, "name": str(system), "precision": system.precision}
            row |= {"micro_rows": system.micro_rows, "options": system.options}
            status.update(str(system))
            if left < 0:
                row["failure"] = "no time left"
            else:
                row |= in_own_process(spec, left + 90)
            if "failure" not in row:
                complete(row, config, rows)
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
            config, row["tokens_per_s"], row.get("device", device_kind()), causal=causal
        )
    row["peak_gib"] = row["peak_bytes"] / 2**30 if row.get("peak_bytes") else None
    if "predicted_seconds" in row:
        row["predicted_tokens_per_s"] = tokens / row["predicted_seconds"]


def device_kind() -> str:
    """By name, without starting a framework in this process, which would hold memory."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "cpu"


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


def report(rows: list[dict[str, Any]], model: str, options: Options) -> None:
    config, device = MODELS[model][0], device_kind()
    done = [row for row in rows if "failure" not in row]
    formula = [f"{flops_per_token(config, causal=causal) / 1e9:.4g}" for causal in (False, True)]
    legend = [
        f"Model {model}: {config.parameters():,} weights, rows of {config.context} tokens.",
        f"Tokens/s: median (slowest-fastest) of {options.steps} steps after {WARMUP}, optimizer "
        "included, in the order in which they ran.",
        f"Of peak: {formula[0]} GFLOP a token with full attention (6 N' + 12 L N H T), "
        f"{formula[1]} causally (6 N' + 6 L N H T), over the data sheet's bf16 peak.",
        "Predicted: the roofline of the compiled program (training/roofline.py).",
        "First step: from the start of the process.",
    ]
    ours = [r["tokens_per_s"] for r in done if r["system"] == "tinyllama_jax"]
    peers = [r["tokens_per_s"] for r in done if r["system"] != "tinyllama_jax"]
    if ours and peers:
        legend.append(f"The fastest of ours over the fastest peer: {max(ours) / max(peers):.2f}.")
    if options.quick:
        legend.append("Quick: these numbers say NOTHING about any device.")
    date = datetime.date.today().isoformat()
    title = f"The training step on {device}, {date}"
    table = Table(*COLUMNS, title=title, caption="\n".join(legend), caption_justify="left")
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)

    out = options.out
    if out is None and not options.quick:
        name = f"{date}-training-{model}-{device.replace(' ', '-')}"
        out = REPOSITORY / "benchmarks" / "results" / name
    if out is None:
        return
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    facts = {"device": device, "versions": versions(), "commit": commit, "steps": rows}
    make_folder(out.parent)
    write_aside(out.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    lines = [f"# {title}", "", *legend, f"Commit {commit}, {known}.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        found = cells(row)
        lines.append(f"| {' | '.join(found + [''] * (len(COLUMNS) - len(found)))} |")
    write_aside(out.with_suffix(".md"), "\n".join(lines) + "\n")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main(options: Options) -> None:
    on_gpu = device_kind() != "cpu"
    model = "tiny" if options.quick else options.model or ("1b" if on_gpu else "demo")
    require(model in MODELS, f"--model is {model!r}: {', '.join(MODELS)} are there.")
    rows = 4 if options.quick else options.micro_rows if on_gpu else MODELS[model][1]
    systems = gpu_systems(rows) if on_gpu else cpu_systems(rows)
    report(measure(systems, model, options), model, options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        spec = json.loads(sys.argv[2])
        run = run_ours if spec["whose"] == "tinyllama_jax" else run_torch
        print(json.dumps(run(spec)))
        sys.exit()
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        print(f"benchmarks/training.py: {error}", file=sys.stderr)
        sys.exit(2)
