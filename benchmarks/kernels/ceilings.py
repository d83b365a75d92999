"""Measures the ceilings of a step: this device's speed on the 1.1B's products, and on copying.

    python -m benchmarks.kernels.ceilings
    python -m benchmarks.kernels.ceilings --quick   # tiny products, whose times mean nothing

The table and its JSON are written to results/ after each product.
"""

import dataclasses
import datetime
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import running
from tinyllama_jax.config import TINYLLAMA_1B
from tinyllama_jax.performance.flops import PEAK_FLOPS

ROUNDS = 5
SETS = 3  # sets of operands, used in turn: more than a cache holds


@dataclasses.dataclass(frozen=True)
class Options:
    tokens: tuple[int, ...] = (16_384, 32_768)
    """Rows of the products, which are the tokens of a micro-batch."""
    seconds: float = 0.3
    """Time of a round."""
    quick: bool = False
    out: Path | None = None
    """Path of the results, without suffix; by default benchmarks/results/DATE-ceilings-DEVICE."""


def products() -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each product of the 1.1B; q|k|v are one product, as in the step."""
    model = TINYLLAMA_1B
    heads = model.query_heads + 2 * model.kv_heads
    return {
        "q|k|v": (model.width, heads * model.head_width),
        "output": (model.query_heads * model.head_width, model.width),
        "gate, up": (model.width, model.swiglu_width),
        "down": (model.swiglu_width, model.width),
        "head": (model.width, model.vocab_size),
    }


def seconds_of(run, operands, seconds: float) -> list[float]:
    """The time of a call in seconds, in each round."""
    jax.block_until_ready([run(*x) for x in operands])
    start = time.perf_counter()
    jax.block_until_ready([run(*x) for x in operands])
    each = (time.perf_counter() - start) / len(operands)
    calls, times = max(SETS, int(seconds / each)), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for index in range(calls):
            result = run(*operands[index % len(operands)])
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return times


def copy_speeds(size: int, seconds: float) -> list[float]:
    """The speeds of x + 1 over `size` bytes in all rounds, sorted, in bytes/s read and written."""
    # In place: on a CPU a new array needs new pages, and getting them takes longer than copying.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(add(add(jnp.zeros(size // 4, jnp.float32))))
    start = time.perf_counter()
    x = jax.block_until_ready(add(x))
    calls = max(SETS, int(seconds / (time.perf_counter() - start)))
    speeds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            x = add(x)
        jax.block_until_ready(x)
        speeds.append(2 * size * calls / (time.perf_counter() - start))
    return sorted(speeds)


def report(rows: list[list[str]], kind: str, options: Options, last: bool = True) -> None:
    """Writes the table, and prints it if it is the last one."""
    title = f"Ceilings of {kind}, bf16, {datetime.date.today().isoformat()}"
    table = [["what", "median (slowest-fastest)", "of peak"], *rows]
    legend = [running.QUICK] * options.quick
    out = running.results_path(options, "ceilings", kind)
    if out is not None:
        running.write_results(out, kind, title, legend, table, {"rows": rows})
    if last:
        running.show(title, table, legend)


def main(options: Options) -> int:
    kind, quick, rows = jax.devices()[0].device_kind, running.is_quick(options), []
    peak = PEAK_FLOPS.get(kind)
    multiply = jax.jit(jnp.matmul)
    for M in (64,) if quick else options.tokens:
        for name, (K, N) in products().items():
            if quick:
                K, N = K // 32, N // 32
            keys = jax.random.split(jax.random.key(0), 2 * SETS)
            operands = [
                (
                    jax.random.normal(keys[2 * i], (M, K), jnp.bfloat16),
                    jax.random.normal(keys[2 * i + 1], (K, N), jnp.bfloat16),
                )
                for i in range(SETS)
            ]
            times = seconds_of(multiply, operands, options.seconds)
            speeds = sorted(2 * M * K * N / s / 1e12 for s in times)
            share = f"{statistics.median(speeds) * 1e12 / peak:.1%}" if peak else ""
            middle = f"{statistics.median(speeds):.4g} ({speeds[0]:.4g}-{speeds[-1]:.4g})"
            rows.append([f"{name}: {M} x {K} x {N}", f"{middle} TFLOP/s", share])
            report(rows, kind, options, last=False)
    size = 2**16 if quick else 2**30
    speeds = [speed / 1e12 for speed in copy_speeds(size, options.seconds)]
    middle = f"{statistics.median(speeds):.4g} ({speeds[0]:.4g}-{speeds[-1]:.4g})"
    rows.append([f"x + 1 over {size / 2**30:g} GiB", f"{middle} TB/s", ""])
    report(rows, kind, options)
    return 0


if __name__ == "__main__":
    running.command(Options, __doc__, main)
