"""Which tiles are fastest on this chip, kernel by kernel, and the table that keeps them."""

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

import running
from systems import Case, Inputs
from tinyllama_jax.errors import UserError, require
from tinyllama_jax.files import write_aside
from tinyllama_jax.model.attention import CHIPS, attention
from tinyllama_jax.model.flash_attention import column_ranges, find_documents
from tinyllama_jax.model.tiles import TILES, Call, Tile, Tiles

KERNELS = ("forward", "dkdv", "dq")  # in the order of Tiles
SHARED_MEMORY = {"A100": 163 * 1024, "H100": 227 * 1024}  # of a program
SETS = 3  # of inputs, to rotate among
FINALISTS = 5
# A wrong kernel can be the fastest. bf16 rounds to 1e-3 to 1e-2.
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}


def tuning_case(dtype: str, H: int) -> Case:
    """A model 2,048 wide with 8 query heads a kv head; fp32 is slow enough with one row."""
    if running.REHEARSED:
        return Case(1, 128, 2, 1, H)
    return Case(4 if dtype == "bfloat16" else 1, 2048, 2048 // H, 256 // H, H)


def candidates(kernel: str, backend: str, chip: str, dtype: str, H: int) -> list[Tile]:
    """Tiles that fit the chip and could be fast."""
    # fp32 has no matrix units here: its operands lie in registers, which larger tiles overflow.
    sizes = (32, 64, 128) if dtype == "bfloat16" else (16, 32, 64)
    fewest = 64 * 64 if dtype == "bfloat16" else 32 * 16  # scores that keep 8 warps busy
    # What a program keeps in registers in fp32: tiles of scores, and sums of H wide rows.
    score_tiles, sums = {"forward": (1, 1), "dkdv": (2, 2), "dq": (2, 1)}[kernel]
    row_inputs = 1 if kernel == "forward" else 2
    tma = (backend, chip, dtype) == ("triton", "H100", "bfloat16")
    present = TILES.get((backend, chip, dtype, H))
    found = [getattr(present, kernel)] if present else []  # defends its place
    for rows, columns, warps, stages, *load in itertools.product(
        sizes, sizes, (4, 8), (1, 2, 3, 4), (False, True) if tma else (False,)
    ):
        registers = (score_tiles * rows * columns + sums * rows * H) / (32 * warps)
        shared = jnp.dtype(dtype).itemsize * H * (row_inputs * rows + 2 * stages * columns)
        idle = warps == 8 and rows * columns < fewest
        lopsided = rows < 64 and columns > 64  # reads much for little
        # Hopper's products are of 64 rows and four warps: a second four would compute the same.
        twice = (chip, dtype) == ("H100", "bfloat16") and rows < 16 * warps
        fits = registers <= 224 and shared <= SHARED_MEMORY[chip]
        if fits and not (idle or lopsided or twice):
            found.append(Tile(rows, columns, warps, stages, *load))
    return list(dict.fromkeys(found))


def kernel_call(kernel: str, kernels, call: Call, T: int) -> Callable:
    """One kernel alone, as a function of the arrays that it reads."""
    rows = "keys" if kernel == "dkdv" else "queries"
    tile = getattr(call.tiles, kernel)
    ranges = column_ranges(find_documents(None, T), call, tile, rows)
    return functools.partial(getattr(kernels, kernel), call, ranges, None)


@jax.default_matmul_precision("highest")
def exact(inputs: Inputs) -> dict[str, list[jax.Array]]:
    """What each kernel should give for the last row, by the reference in fp32."""
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
    """The fastest tiles of the three kernels, and their times in ms.

    Args:
      choose: kernel -> its candidates.
      timer: `time_rounds` of attention.py.
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
        except Exception as error:  # does not fit the chip, or its compiler
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
            found = timer(runs, rounds, seconds)
            found = {tile: x["ms"] for tile, x in found.items() if isinstance(x, dict)}
            require(bool(found), f"No tile of {backend}'s {kernel} can be timed at {case}.")
            runs = {tile: runs[tile] for tile in sorted(found, key=found.__getitem__)[:FINALISTS]}
        winners.append(min(found, key=found.__getitem__))
        times.append(found[winners[-1]])
        if kernel == "forward":  # what the other two read
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
    """Whether the last row is what it should be; NaN is not."""
    try:
        found = jax.tree.leaves(run(*operands))
    except Exception:  # starts that the chip refuses
        return False
    return all(
        float(jnp.linalg.norm(x[-1:].astype(jnp.float32) - y) / jnp.linalg.norm(y)) < tolerance
        for x, y in zip(found, expected, strict=False)
    )


def rewrite(source: str, row: tuple, tiles: Tiles, comment: str) -> str:
    """tiles.py with one row of TILES replaced, or added, under a comment of one line."""
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
        if re.match(r" +# \d{4}-\d\d-\d\d, ", lines[start - 1]):  # of an earlier time
            start -= 1
    cut = ", ".join(
        str(tuple(x for x in dataclasses.astuple(tile) if x is not False))
        for tile in (getattr(tiles, kernel) for kernel in KERNELS)
    )
    name = str(row).replace("'", '"')
    new = [f"    # {comment}", f"    {name}: _tiles({cut}),"]
    if len(new[1]) > 100:  # as ruff breaks it
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
    """Tunes row after row of the table in `path`, and writes each as soon as it is known.

    Returns:
      1 if a row has no tile that runs, else 0: the exit code.
    """
    code = 0
    require(
        chip in CHIPS.values(),
        f"There are no rows for {chip} in {path}: it has {', '.join(set(CHIPS.values()))}.",
    )
    for backend, H in itertools.product(backends, head_widths):
        case = tuning_case(dtype, H)

        def choose(kernel, backend=backend, H=H):
            found = candidates(kernel, backend, chip, dtype, H)
            return found[len(found) // 2 :][:2] if quick else found

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
