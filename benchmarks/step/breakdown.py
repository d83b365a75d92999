"""Shows where the time of our training step goes on this device, beside its roofline.

    python -m benchmarks.step.breakdown           # the 1.1B on a GPU, the demo's model on a CPU
    python -m benchmarks.step.breakdown --quick   # a tiny model, whose times mean nothing

The step and its random tokens are those of training.py in this folder. Some steps after the first
are traced by JAX's profiler, as in `tinyllama train --profile`. A table, a picture and their JSON
are written to results/. With `--keep`, the profiler's own file and the text of the compiled step
are kept as well, for questions that the table does not answer.
"""

import dataclasses
import gzip
import tempfile
from pathlib import Path

import jax
from rich.console import Console

from benchmarks import running
from benchmarks.step import ours
from benchmarks.step.training import OPTIMIZER, ROWS, SCHEDULED, WARMUP, token_batches
from tinyllama_jax.config import AttentionBackend
from tinyllama_jax.data.boundaries import loss_weights
from tinyllama_jax.errors import require
from tinyllama_jax.files import written_aside
from tinyllama_jax.performance.breakdown import Breakdown
from tinyllama_jax.performance.breakdown_table import COLUMNS, cells, draw, legend, render, title
from tinyllama_jax.performance.trace import Profiler
from tinyllama_jax.runtime.allocator import keep_memory
from tinyllama_jax.runtime.compiler import keep_programs
from tinyllama_jax.runtime.mesh import make_mesh, put_batch
from tinyllama_jax.training.step import init_state, make_step


@dataclasses.dataclass(frozen=True)
class Options:
    model: str | None = None
    """1b, 120m or demo; by default the 1.1B on a GPU, and the demo's model on a CPU."""
    steps: int = 4
    """Steps that are traced, after three that warm up."""
    micro_rows: int = 16
    """Rows of a micro-batch, on a GPU."""
    attention: AttentionBackend = "auto"
    keep: Path | None = None
    """Folder for the trace and the compiled step, gzipped; by default they are removed."""
    quick: bool = False
    out: Path | None = None
    """Path of the results, without suffix; by default benchmarks/results/DATE-breakdown-DEVICE."""


def spec_of(model: str, on_gpu: bool, options: Options) -> running.Spec:
    """The step that is traced: the first of the systems of training.py."""
    rows, precision = ROWS[model], "bfloat16" if on_gpu else "float32"
    micro_rows = min(rows, options.micro_rows) if on_gpu else rows // 2
    execution = {"attention": options.attention}
    if on_gpu:
        execution["recompute"] = "elementwise"
    spec = running.spec_of(model, rows, precision, options.steps, micro_rows)
    return spec | {"options": execution}


def measure(spec: running.Spec, folder: Path) -> Breakdown:
    """Trains, and writes a trace of the last steps and the compiled step into a folder."""
    config, mesh = ours.config_of(spec, OPTIMIZER, SCHEDULED), make_mesh(devices=jax.devices()[:1])
    keep_programs(mesh)
    steps = range(WARMUP + 1, WARMUP + spec["steps"] + 1)
    with jax.set_mesh(mesh):
        state, train_step = init_state(config, mesh), make_step(config, mesh)
        profiler, batch = Profiler(steps, 0, folder, config, mesh, print), None
        for step, tokens_ABS in enumerate(token_batches(spec), start=1):
            profiler.before(step, state)
            batch = put_batch(tokens_ABS, mesh, 1), put_batch(loss_weights(tokens_ABS), mesh, 1)
            state, _ = train_step(state, *batch)
        breakdown = profiler.end(train_step, jax.block_until_ready(state), batch)
        assert batch is not None
        (folder / "step.hlo").write_text(train_step.lower(state, *batch).compile().as_text() or "")
    require(breakdown is not None, "There is nothing to report.")
    assert breakdown
    return breakdown


def report(breakdown: Breakdown, model: str, spec: running.Spec, options: Options) -> None:
    """Writes the table and its picture, and prints the table."""
    out = running.results_path(options, f"breakdown-{model}", breakdown.device)
    if out is not None:
        write(breakdown, model, spec, out)
    Console().print(render(breakdown))
    if running.REHEARSED:
        print(running.REHEARSAL)


def write(breakdown: Breakdown, model: str, spec: running.Spec, out: Path) -> None:
    """Writes the table, its JSON and its picture."""
    how = ", ".join(f"{name} {value}" for name, value in spec["options"].items())
    lines = [
        *legend(breakdown),
        f"Model {model}, {spec['rows']} rows a step, {spec['micro_rows']} at a time, {how}.",
        f"![the same as bars]({out.name}.png)",
    ]
    rows = cells(breakdown)
    table = [list(COLUMNS[: len(rows[0])]), *rows]
    facts = breakdown.to_json() | {"spec": spec}
    running.write_results(out, breakdown.device, title(breakdown), lines, table, facts)
    picture = running.suffixed(out, ".png")

    def write_picture() -> None:
        with written_aside(picture) as aside:
            draw(breakdown, aside)

    running.if_known("the picture", write_picture)


def main(options: Options) -> int:
    keep_memory()  # before JAX starts threads
    on_gpu = running.device_kind() != "cpu"
    model = "tiny" if options.quick else options.model or ("1b" if on_gpu else "demo")
    require(model in ROWS, f"--model is {model!r}: {', '.join(ROWS)} are there.")
    require(options.steps > 0, f"--steps is {options.steps}: give at least one.")
    spec = spec_of(model, on_gpu, options)
    with tempfile.TemporaryDirectory() as folder:
        breakdown = measure(spec, Path(folder))
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            for path in (*Path(folder).rglob("*.xplane.pb"), Path(folder, "step.hlo")):
                kept = options.keep / f"breakdown-{model}-{path.name}.gz"
                kept.write_bytes(gzip.compress(path.read_bytes()))
    report(breakdown, model, spec, options)
    return 0


if __name__ == "__main__":
    running.command(Options, __doc__, main)
