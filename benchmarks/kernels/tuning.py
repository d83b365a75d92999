"""Searches for the fastest tiles of each kernel on this chip, and writes them into their table."""

import ast
import dataclasses
import datetime
import functools
import importlib
import itertools
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import running
from benchmarks.kernels.attention_systems import Case, Inputs
from tinyllama_jax.errors import UserError, require
from tinyllama_jax.files import write_aside
from tinyllama_jax.model.attention import CHIPS, attention
from tinyllama_jax.model.flash_attention import column_ranges, find_documents
from tinyllama_jax.model.tiles import TILES, Call, Tile, Tiles

KERNELS = ("forward", "dkdv", "dq")  # in the order of Tiles
SHARED_MEMORY = {"A100": 163 * 1024, "H100": 227 * 1024}  # bytes that a program can have
SETS = 3  # sets of random inputs, used in turn
FINALISTS = 5
# A wrong kernel can be the fastest. bf16 rounds to 1e-3 to 1e-2.
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}


def tuning_case(dtype: str, H: int) -> Case:
    """The shape of a model 2,048 wide with 8 query heads for each kv head.

    In fp32 one row is enough to be timed.
    """
    if running.REHEARSED:
        return Case(1, 128, 2, 1, H)
    return Case(4 if dtype == "bfloat16" else 1, 2048, 2048 // H, 256 // H, H)


def candidates(kernel: str, backend: str, chip: str, dtype: str, H: int) -> list[Tile]:
    """Tiles that fit the chip and could be fast."""
    # fp32 has no matrix units here: its operands lie in registers, which larger tiles overflow.
    sizes = (32, 64, 128) if dtype == "bfloat16" else (16, 32, 64)
    fewest = 64 * 64 if dtype == "bfloat16" else 32 * 16  # scores in a tile that keep 8 warps busy
    # How many tiles of scores, and of sums H wide, a program keeps in registers in fp32.
    score_tiles, sums = {"forward": (1, 1), "dkdv": (2, 2), "dq": (2, 1)}[kernel]
    row_inputs = 1 if kernel == "forward" else 2
    tma = (backend, chip, dtype) == ("triton", "H100", "bfloat16")
    present = TILES.get((backend, chip, dtype, H))
    tiles = [getattr(present, kernel)] if present else []  # the tile in use must be beaten
    for rows, columns, warps, stages, *load in itertools.product(
        sizes, sizes, (4, 8), (1, 2, 3, 4), (False, True) if tma else (False,)
    ):
        registers = (score_tiles * rows * columns + sums * rows * H) / (32 * warps)
        shared = jnp.dtype(dtype).itemsize * H * (row_inputs * rows + 2 * stages * columns)
        idle = warps == 8 and rows * columns < fewest
        lopsided = rows < 64 and columns > 64  # reads many keys for few queries
        # A matrix product on Hopper has 64 rows and takes four warps: four more would repeat it.
        twice = (chip, dtype) == ("H100", "bfloat16") and rows < 16 * warps
        fits = registers <= 224 and shared <= SHARED_MEMORY[chip]
        if fits and not (idle or lopsided or twice):
            tiles.append(Tile(rows, columns, warps, stages, *load))
    return list(dict.fromkeys(tiles))


def kernel_call(kernel: str, kernels, call: Call, T: int) -> Callable:
    """A kernel as a function of the arrays that it reads."""
    rows = "keys" if kernel == "dkdv" else "queries"
    tile = getattr(call.tiles, kernel)
    ranges = column_ranges(find_documents(None, T), call, tile, rows)
    return functools.partial(getattr(kernels, kernel), call, ranges, None)


@jax.default_matmul_precision("highest")
def exact(inputs: Inputs) -> dict[str, list[jax.Array]]:
    """The right results of each kernel for the last row, by the reference in fp32."""
    q, k, v, do = (x[-1:].astype(jnp.float32) for x in inputs[:4])

    @jax.jit
    def run(q, k, v, do):
        o, vjp = jax.vjp(functools.partial(attention, backend="reference"), q, k, v)
        return o, *vjp(do)

    o, dq, dk, dv = run(q, k, v, do)
    return {"forward": [o], "dkdv": [dk, dv], "dq": [dq]}


def tune(
    backend: str,
    chip: str,
    dtype: str,
    case: Case,
    choose: Callable[[str], list[Tile]],
    timer: Callable[..., dict],
) -> tuple[Tiles, list[float]]:
    """Finds the fastest tiles of the three kernels, among those that give right results.

    Args:
      backend: `pallas` or `triton`.
      chip: name of the chip in the table of tiles.
      dtype: of the inputs.
      case: shape of the inputs.
      choose: kernel -> its candidates.
      timer: `time_rounds` of attention.py.

    Returns:
      (tiles, their times in ms).

    Raises:
      UserError: no tile of a kernel runs and gives right results.
    """
    kernels = importlib.import_module(f"tinyllama_jax.model.{backend}_kernels")
    interpret = jax.default_backend() == "cpu"
    capability = None if interpret else round(10 * float(jax.devices()[0].compute_capability))
    sets = [case.inputs(seed, dtype) for seed in range(SETS)]
    expected = exact(sets[0])
    sums = jax.ShapeDtypeStruct((case.B, case.N, case.T), jnp.float32)
    abstract = {"forward": sets[0][:3], "dkdv": (*sets[0][:4], sums, sums)}
    abstract["dq"] = abstract["dkdv"]

    def compile(kernel, tile):
        call = Call(Tiles(tile, tile, tile), True, case.H**-0.5, case.T, interpret, capability)
        try:
            run = jax.jit(kernel_call(kernel, kernels, call, case.T))
            return run.lower(*abstract[kernel]).compile()
        except Exception as error:  # the tile does not fit the chip, or its compiler fails
            return error

    start = time.perf_counter()
    asked = [(kernel, tile) for kernel in KERNELS for tile in choose(kernel)]
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(asked, pool.map(lambda x: compile(*x), asked), strict=True))
    failures = Counter(type(x).__name__ for x in compiled.values() if isinstance(x, Exception))
    print(
        f"{backend} {dtype} {case}: {len(asked)} candidates compiled in "
        f"{time.perf_counter() - start:.0f} s, but for {dict(failures) or 'none'}",
        file=sys.stderr,
    )

    winners, times, operands = [], [], [x[:3] for x in sets]
    for kernel in KERNELS:
        runs = {}
        for (of, tile), run in compiled.items():
            if of == kernel and not isinstance(run, Exception):
                if right(run, operands[0], expected[kernel], TOLERANCE[dtype]):
                    call = functools.partial(_on_set, run, operands)
                    runs[tile] = call, jax.block_until_ready
        require(bool(runs), f"No tile of {backend}'s {kernel} runs right at {case} in {dtype}.")
        for rounds, seconds in ((3, 0.005), (9, 0.02)):
            timed = timer(runs, rounds, seconds)
            ms = {tile: x["ms"] for tile, x in timed.items() if isinstance(x, dict)}
            require(bool(ms), f"No tile of {backend}'s {kernel} can be timed at {case}.")
            runs = {tile: runs[tile] for tile in sorted(ms, key=ms.__getitem__)[:FINALISTS]}
        winners.append(min(ms, key=ms.__getitem__))
        times.append(ms[winners[-1]])
        if kernel == "forward":  # the other two kernels read what it gives
            outputs = [compiled[kernel, winners[0]](*x) for x in operands]
            operands = [
                (
                    *x[:4],
                    lse,
                    jnp.einsum("BTNH,BTNH->BNT", o, x[3], preferred_element_type="float32"),
                )
                for x, (o, lse) in zip(sets, outputs, strict=True)
            ]
    return Tiles(*winners), times


def _on_set(run, operands, i):
    return run(*operands[i % len(operands)])


def right(run: Callable, operands: Sequence, expected: list[jax.Array], tolerance: float) -> bool:
    """Whether the last row is right; a NaN is not."""
    try:
        results = jax.tree.leaves(run(*operands))
    except Exception:  # the chip refuses to start it
        return False
    return all(
        float(jnp.linalg.norm(x[-1:].astype(jnp.float32) - y) / jnp.linalg.norm(y)) < tolerance
        for x, y in zip(results, expected, strict=False)
    )


def rewrite(source: str, row: tuple, tiles: Tiles, comment: str) -> str:
    """The text of tiles.py with one row of TILES replaced or added, under a comment of one line."""
    lines = source.splitlines()
    table = next(
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TILES"
    )
    rows = {
        ast.literal_eval(key): (key, value)
        for key, value in zip(table.keys, table.values, strict=True)
    }
    start = stop = table.end_lineno - 1  # the closing brace
    if row in rows:
        key, value = rows[row]
        start, stop = key.lineno - 1, value.end_lineno
        if re.match(r" +# \d{4}-\d\d-\d\d, ", lines[start - 1]):  # the comment of an earlier search
            start -= 1
    cut = ", ".join(
        str(tuple(x for x in dataclasses.astuple(tile) if x is not False))
        for tile in (getattr(tiles, kernel) for kernel in KERNELS)
    )
    name = str(row).replace("'", '"')
    new = [f"    # {comment}", f"    {name}: _tiles({cut}),"]
    if len(new[1]) > 100:  # broken as ruff formats it
        new[1:] = [f"    {name}: _tiles(", f"        {cut}", "    ),"]
    lines[start:stop] = new
    return "\n".join(lines) + "\n"


def tune_table(
    path: Path,
    backends: Sequence[str],
    chip: str,
    dtype: str,
    head_widths: Sequence[int],
    timer: Callable[..., dict],
    quick: bool = False,
) -> int:
    """Searches for the tiles of row after row, and writes each into the table in `path` at once.

    Returns:
      The exit code: 1 if there is a row for which no tile runs, else 0.
    """
    code = 0
    require(
        chip in CHIPS.values(),
        f"There are no rows for {chip} in {path}: it has {', '.join(set(CHIPS.values()))}.",
    )
    for backend, H in itertools.product(backends, head_widths):
        case = tuning_case(dtype, H)

        def choose(kernel, backend=backend, H=H):
            tiles = candidates(kernel, backend, chip, dtype, H)
            return tiles[len(tiles) // 2 :][:2] if quick else tiles

        try:
            tiles, times = tune(backend, chip, dtype, case, choose, timer)
        except ImportError as error:
            print(f"{backend} cannot be tuned here ({error}).", file=sys.stderr)
            continue
        except UserError as error:
            print(error, file=sys.stderr)
            code = 1
            continue
        device = jax.devices()[0].device_kind.removeprefix("NVIDIA ")
        shown = ", ".join(f"{ms:.3f}" for ms in times)
        comment = f"{datetime.date.today()}, {device}, jax {jax.__version__}, {case}: {shown} ms"
        row = (backend, chip, dtype, H)
        write_aside(path, rewrite(path.read_text(), row, tiles, comment))
        print(f"{row}: {tiles}\n  {comment}")
    return code
