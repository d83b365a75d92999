"""Where the time of our training step goes on this device, beside its roofline.

    python benchmarks/breakdown.py            # on a GPU the 1.1B, on a CPU the demo's model
    python benchmarks/breakdown.py --quick    # a tiny model, which times nothing of worth

The step is that of benchmarks/training.py, on the same random tokens; some steps after the first
are traced by JAX's profiler, as `tinyllama train --profile` does. A table and a picture lie in
results/ with their JSON. With `--keep` the profiler's own file and the text of the compiled step
stay too, for questions that the table does not answer.
"""

import dataclasses
import gzip
import tempfile
from pathlib import Path

import jax
from rich.console import Console

import ours
import running
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
from training import OPTIMIZER, ROWS, SCHEDULED, WARMUP, token_batches


@dataclasses.dataclass(frozen=True)
class Options:
    model: str | None = None
    """1b, 120m or demo; by default the 1.1B on a GPU, the demo's on a CPU."""
    steps: int = 4
    """Traced; three more warm up."""
    micro_rows: int = 16
    """Of a GPU."""
    attention: AttentionBackend = "auto"
    keep: Path | None = None
    """A folder for the trace and the compiled step, each gzipped; by default they are removed."""
    quick: bool = False
    out: Path | None = None
    """Where the results go, without suffix; benchmarks/results/DATE-breakdown-DEVICE by default."""


def spec_of(model: str, on_gpu: bool, options: Options) -> running.Spec:
    """What is trained: the first of the systems of benchmarks/training.py."""
    rows, precision = ROWS[model], "bfloat16" if on_gpu else "float32"
    micro_rows = min(rows, options.micro_rows) if on_gpu else rows // 2
    execution = {"attention": options.attention, "unroll_layers": True}
    if on_gpu:
        execution["recompute"] = "elementwise"
    spec = running.spec_of(model, rows, precision, options.steps, micro_rows)
    return spec | {"options": execution}


def measure(spec: running.Spec, folder: Path) -> Breakdown:
    """Trains, and traces the last steps into a folder, where the compiled step goes too."""
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
        found = profiler.end(train_step, jax.block_until_ready(state), batch)
        assert batch is not None
        (folder / "step.hlo").write_text(train_step.lower(state, *batch).compile().as_text() or "")
    require(found is not None, "There is nothing to report.")
    assert found
    return found


def report(found: Breakdown, model: str, spec: running.Spec, options: Options) -> None:
    """Writes the table and its picture, and prints the table."""
    out = running.results_path(options, f"breakdown-{model}", found.device)
    if out is not None:
        keep(found, model, spec, out)
    Console().print(render(found))
    if running.REHEARSED:
        print(running.REHEARSAL)


def keep(found: Breakdown, model: str, spec: running.Spec, out: Path) -> None:
    how = ", ".join(f"{name} {value}" for name, value in spec["options"].items())
    lines = [
        *legend(found),
        f"Model {model}, {spec['rows']} rows a step, {spec['micro_rows']} at a time, {how}.",
        f"![the same as bars]({out.name}.png)",
    ]
    rows = cells(found)
    table = [list(COLUMNS[: len(rows[0])]), *rows]
    facts = found.to_json() | {"spec": spec}
    running.write_results(out, found.device, title(found), lines, table, facts)
    picture = running.suffixed(out, ".png")

    def picture_it() -> None:
        with written_aside(picture) as aside:
            draw(found, aside)

    running.if_known("the picture", picture_it)


def main(options: Options) -> int:
    keep_memory()  # before JAX starts threads
    on_gpu = running.device_kind() != "cpu"
    model = "tiny" if options.quick else options.model or ("1b" if on_gpu else "demo")
    require(model in ROWS, f"--model is {model!r}: {', '.join(ROWS)} are there.")
    require(options.steps > 0, f"--steps is {options.steps}: give at least one.")
    spec = spec_of(model, on_gpu, options)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(spec, Path(folder))
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            for path in (*Path(folder).rglob("*.xplane.pb"), Path(folder, "step.hlo")):
                kept = options.keep / f"breakdown-{model}-{path.name}.gz"
                kept.write_bytes(gzip.compress(path.read_bytes()))
    report(found, model, spec, options)
    return 0


if __name__ == "__main__":
    running.command(Options, __doc__, main)
