"""Times our attention on this GPU beside cuDNN, tokamax and PyTorch, or searches for our tiles.

    python -m benchmarks.kernels.attention           # a table, and files in benchmarks/results/
    python -m benchmarks.kernels.attention --tune    # rewrites tinyllama_jax/model/tiles.py
    python -m benchmarks.kernels.attention --quick   # tiny shapes, on a CPU too

The systems take turns, round after round in one process, so that a drifting clock affects all of
them alike. In its turn a system makes several calls, queued faster than the device runs them. They
go over several sets of random inputs, so many that the cache has lost a set before it is used
again. The time of a call is that of the turn, from an idle device to an idle device, divided by the
number of calls.
"""

import dataclasses
import math
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks import running
from benchmarks.kernels.attention_systems import OURS, SYSTEMS, Case, Inputs, Run
from benchmarks.kernels.attention_table import (
    COLUMNS,
    LEGEND,
    TOLERANCE,
    Row,
    auto_rows,
    cells,
    compare,
    terminal_table,
)
from tinyllama_jax.errors import require
from tinyllama_jax.files import make_folder
from tinyllama_jax.model.attention import CHIPS, attention, device_chip

SETS = 3  # sets of random inputs
SHAPES = [(8, 2048, 32, 4, 64), (2, 8192, 32, 4, 64), (8, 2048, 16, 4, 128)]
CASES = [Case(*shape, documents) for shape in SHAPES for documents in (False, True)]
QUICK_SHAPE = {"cpu": (2, 64, 4, 2, 32), "gpu": (2, 700, 8, 2, 64)}


@dataclasses.dataclass(frozen=True)
class Options:
    tune: bool = False
    """Time tiles instead, and write the fastest into tinyllama_jax/model/tiles.py."""
    quick: bool = False
    """Tiny shapes and 2 rounds, only to see whether it runs; writes no file without `out`."""
    rounds: int = 7
    """How many turns each system gets."""
    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Systems that are timed; `tune` regards pallas and triton among them."""
    out: Path | None = None
    """Path of the results, without suffix; by default benchmarks/results/DATE-attention-CHIP."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype for which `tune` searches."""
    head_widths: tuple[int, ...] = (32, 64, 128)
    """Head widths for which `tune` searches."""


def time_rounds(runs: dict, rounds: int, seconds: float) -> dict:
    """Times calls of several functions, which take turns.

    Args:
      runs: key -> (call, wait). `call(i)` starts work on input set i, and `wait` waits for what it
        returned.
      rounds: how many turns each function gets.
      seconds: about how long a turn takes.

    Returns:
      key -> times of a call: ms (median), ms_min, ms_max, calls in a turn, and host_ms, the time it
      takes to start a call; or the exception that ended it.
    """
    results, calls, times = {}, {}, {}

    def turn(key, count):
        """Seconds until `count` calls are done, and until they were queued."""
        call, wait = runs[key]
        wait(call(0))
        start = time.perf_counter()
        for i in range(count):
            result = call(i)
        queued = time.perf_counter() - start
        wait(result)
        return time.perf_counter() - start, queued

    for round_number in range(-1, rounds):
        for key in runs:
            if key in results:
                continue
            try:
                if round_number < 0:
                    turn(key, SETS)  # warms up
                    few = 2 * SETS
                    estimate, queued = (x / few for x in turn(key, few))
                    calls[key] = max(SETS, min(200, math.ceil(seconds / estimate)))
                    times[key] = {"calls": calls[key], "host_ms": 1e3 * queued, "turns": []}
                else:
                    ms = 1e3 * turn(key, calls[key])[0] / calls[key]
                    times[key]["turns"].append(ms)
            except Exception as error:  # the other functions go on, whatever it is
                results[key] = error
    for key in runs.keys() - results.keys():
        turns = times[key].pop("turns")
        middle = statistics.median(turns)
        results[key] = {"ms": middle, "ms_min": min(turns), "ms_max": max(turns), **times[key]}
    return results


def one_line(error: Exception) -> str:
    """The reason of a failure, short enough for a table."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0].strip() if lines else ""
    known = (ValueError, RuntimeError, NotImplementedError)  # raised with a sentence that explains
    return (text if text and type(error) in known else f"{type(error).__name__}: {text}")[:110]


@jax.default_matmul_precision("highest")
def expected(inputs: Inputs, G: int) -> tuple[jax.Array, ...]:
    """o, dq, dk and dv of the last row and kv head, by the reference in fp32.

    G is the number of query heads for each kv head.
    """
    q, k, v, do = (
        x[-1:, :, -heads:].astype(jnp.float32)
        for x, heads in zip(inputs[:4], (G, 1, 1, G), strict=True)
    )
    segments = None if inputs.segments_BT is None else inputs.segments_BT[-1:]

    def attend(q, k, v):
        return attention(q, k, v, segment_ids=segments, backend="reference")

    @jax.jit
    def run(q, k, v, do):
        o, vjp = jax.vjp(attend, q, k, v)
        return o, *vjp(do)

    return run(q, k, v, do)


def check(run: Run, row: Row, exact: tuple[jax.Array, ...]) -> None:
    """Checks at full size what will be timed, and fills in its error and whether two runs agree."""

    def results():
        return [run.to_jax(x) for x in (run.forward(0), *run.backward(0))]

    first, second = results(), results()
    row.same_bits = all(bool(jnp.array_equal(x, y)) for x, y in zip(first, second, strict=True))
    errors = []
    for x, y in zip(first, exact, strict=True):
        difference = x[-1:, :, -y.shape[2] :].astype(jnp.float32) - y
        errors.append(float(jnp.linalg.norm(difference) / jnp.linalg.norm(y)))
    row.error = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
    if not row.error < TOLERANCE:
        row.failure = f"wrong: differs from the reference by {row.error:.2g}"


def measure(case: Case, names: list[str], rounds: int, seconds: float) -> list[Row]:
    """Compiles, checks and times all systems in one case; one that fails has its reason."""
    sets = jax.block_until_ready([case.inputs(seed) for seed in range(SETS)])
    exact = expected(sets[0], case.N // case.K)
    rows = {name: Row(case, name) for name in names}

    def compile(name):
        try:
            system = SYSTEMS[name]()
            system.compile(sets[0])
            return system
        except Exception as error:
            rows[name].failure = one_line(error)

    # Compilers run in parallel, in threads; on the device one system runs at a time.
    with ThreadPoolExecutor() as pool:
        systems = dict(zip(names, pool.map(compile, names), strict=True))
    runs = {}
    for name, row in rows.items():
        if row.failure is None:
            try:
                run = systems[name].prepare(sets)
                check(run, row, exact)
            except Exception as error:
                row.failure = one_line(error)
            else:
                if row.failure is None:
                    runs[name, "forward"] = run.forward, run.wait
                    runs[name, "backward"] = run.backward, run.wait
    flops = case.flops(SETS)
    for (name, which), timed in time_rounds(runs, rounds, seconds).items():
        if isinstance(timed, Exception):
            rows[name].failure = f"{which}: {one_line(timed)}"
            continue
        operations = flops if which == "forward" else 2.5 * flops
        setattr(rows[name], which, {**timed, "tflops": operations / timed["ms"] / 1e9})
    return list(rows.values())


def benchmark(names: list[str], options: Options) -> None:
    """Measures all cases and prints the table.

    It is written after each case too, since the next one may bring the process down.
    """
    console = Console(width=None if sys.stdout.isatty() else 190)
    kind, quick = jax.devices()[0].device_kind, running.is_quick(options)
    chip = next((name for name in CHIPS if name in kind), kind)
    out = running.results_path(options, "attention", chip)
    on_cpu = jax.default_backend() != "gpu"
    shape = QUICK_SHAPE["cpu" if on_cpu else "gpu"]
    quick_cases = [Case(*shape, documents, mean_document=16) for documents in (False, True)]
    title = f"Attention on {kind}, jax {jax.__version__}"
    if on_cpu:
        title += ": a CPU and interpreted kernels, whose times say NOTHING about any GPU"
    rows = []
    for case in quick_cases if quick else CASES:
        print(f"{case}{' with documents' if case.documents else ''} ...", file=sys.stderr)
        rounds, seconds = (2, 0.001) if quick else (options.rounds, 0.03)
        rows += measure(case, names, rounds, seconds)
        compare(rows)
        if out is not None:
            table = [list(COLUMNS), *map(cells, rows)]
            facts = {"rows": [dataclasses.asdict(row) for row in rows]}
            running.write_results(out, kind, title, LEGEND.splitlines(), table, facts)
    console.print(terminal_table(rows, title))
    if not on_cpu and (lines := auto_rows(rows, device_chip())):
        console.print("By these times, rows for AUTO in tinyllama_jax/model/attention.py:")
        print("\n".join(lines))
    if out is not None:
        console.print(f"Written: {running.suffixed(out, '.json')} and .md")


def main(options: Options) -> int:
    for name in options.systems:
        require(name in SYSTEMS, f"There is no system {name!r}: choose of {', '.join(SYSTEMS)}.")
    on_gpu = running.REHEARSED or jax.default_backend() == "gpu"
    require(
        on_gpu or (options.quick and not options.tune),
        "There is no GPU here: on a CPU only --quick runs, whose times mean nothing.",
    )
    if not options.tune:
        benchmark(list(options.systems), options)
        return 0
    from benchmarks.kernels.tuning import tune_table

    backends = [name for name in options.systems if name in OURS]
    chip, table = device_chip(), running.REPOSITORY / "tinyllama_jax" / "model" / "tiles.py"
    if running.REHEARSED:  # Triton's kernels are not interpreted, and tiles.py stays as it is
        chip, backends = "H100", ["pallas"]
        make_folder(running.RESULTS)
        table = Path(shutil.copy(table, running.RESULTS / "REHEARSED-tiles.py"))
    quick, widths = running.is_quick(options), options.head_widths
    return tune_table(table, backends, chip, options.dtype, widths, time_rounds, quick)


if __name__ == "__main__":
    running.command(Options, __doc__, main)
