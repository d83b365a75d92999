"""Computes what bounds the attention kernels: instructions for each score in their loops, by unit.

    pip install -e '.[plan]'
    python -m benchmarks.kernels.instructions                     # for an A100 and an H100
    python -m benchmarks.kernels.instructions --search flash_dq   # all its tiles that do not spill

No GPU is needed and nothing is measured. The kernels are compiled for GPUs that are not here,
assembled and disassembled. The instructions in one iteration of a loop are counted, divided by the
scores that it computes (a score belongs to a query and a key), and by the number that a
multiprocessor executes in a clock. Not counted are what a program does outside of its loops,
waiting for memory, and multiprocessors without work. `--search` goes through the tiles that
`--tune` of attention.py would time.
"""

import dataclasses
import importlib
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import triton

from benchmarks import running
from benchmarks.kernels.kernel_resources import (
    KERNELS,
    Resources,
    abstract_on,
    disassemble,
    resources_of_program,
)
from benchmarks.kernels.sass import LANES, Loop, inner_loops
from benchmarks.kernels.tuning import candidates, kernel_call, tuning_case
from tinyllama_jax.errors import require
from tinyllama_jax.model.attention import COMPUTE_CAPABILITY
from tinyllama_jax.model.flash_attention import column_ranges, find_documents
from tinyllama_jax.model.tiles import TILES, Call, Tile, Tiles
from tinyllama_jax.performance.flops import PEAK_FLOPS
from tinyllama_jax.performance.targets import A100_40G, H100, Target

TARGETS = {"A100": A100_40G, "H100": H100}
SCHEDULERS = 4  # in a multiprocessor; each starts an instruction of one warp in a clock

# Chip -> unit -> how much a multiprocessor does in a clock: FLOP of the tensor cores, bytes of
# shared memory, and results of the others. Tensor cores: NVIDIA's white papers, 1,024 and 2,048
# dense bf16 multiply-adds. Shared memory: 32 banks of 4 bytes. The others: CUDA C++ Programming
# Guide, "Arithmetic Instructions", compute capability 8.0 and 9.0.
RATES: dict[str, dict[str, int]] = {
    "A100": {"tensor": 2048, "MUFU": 16, "FP32": 64, "IMAD": 64, "ALU": 64, "shared": 128},
    "H100": {"tensor": 4096, "MUFU": 16, "FP32": 128, "IMAD": 64, "ALU": 64, "shared": 128},
}
# Matrix products for each score; the backward pass counts as 2.5 forward passes.
PRODUCTS = {"flash_forward": 2, "flash_dq": 3, "flash_dkdv": 4}
FORWARD_AND_BACKWARD = 7
# Kernel -> field of Tiles.
FIELDS = {"flash_forward": "forward", "flash_dq": "dq", "flash_dkdv": "dkdv"}

LEGEND = [
    "Counted and computed, not measured: bf16, causal, no documents.",
    "Instructions of a thread for each score: MUFU (exponentials), FMA (fp32, and integers times "
    "integers), ALU (comparisons, selection, conversion to bf16, addresses), uniform (of a whole "
    "warp), other (loads, barriers, waits, branches; products), all.",
    "Clocks of a multiprocessor for 1,000 scores, if a unit alone were waited for; issue: four "
    "warps start an instruction in a clock.",
    "TFLOP/s at the data sheet's clock (and share of its peak) if all units work at once, if "
    "products (tensor cores and shared memory) and the rest take turns, and if each unit waits for "
    "all others.",
    "causal: both loops as often as a row of the context needs them; operations that the mask "
    "hides do not count. Backward: dQ and dK/dV do seven products, and five count.",
    "Shared: bytes that shared memory gives or takes, operands of the tensor cores that lie there "
    "among them; a word that lanes share counts for each lane.",
    "Blocks: how many a multiprocessor can hold at once.",
    "A multiprocessor's throughput: CUDA C++ Programming Guide, Arithmetic Instructions; tensor "
    "cores by NVIDIA's white papers.",
]
HEAD = ["GPU", "head width", "kernel", "loop", "tile", "registers", "blocks"]
HEAD += ["MUFU", "FMA", "ALU", "uniform", "other", "all"]
HEAD += ["tensor, clocks", "MUFU, clocks", "FMA, clocks", "ALU, clocks", "shared, clocks"]
HEAD += ["issue, clocks", "at once, TFLOP/s", "in turns, TFLOP/s", "one by one, TFLOP/s"]


@dataclasses.dataclass(frozen=True)
class Options:
    chips: tuple[str, ...] = ("A100", "H100")
    head_widths: tuple[int, ...] = (64, 128)
    backend: Literal["pallas", "triton"] = "pallas"
    context: int = 2048
    search: tuple[str, ...] = ()
    """Kernels for which all candidate tiles are compared, instead of the tiles in use."""
    out: Path | None = None
    """Path of the table, without suffix; by default it is not written."""


def compile_kernel(backend: str, kernel: str, chip: str, tile: Tile, H: int) -> Resources:
    """Compiles a causal kernel in bf16 for a chip that need not be here."""
    kernels = importlib.import_module(f"tinyllama_jax.model.{backend}_kernels")
    case, tiles = tuning_case("bfloat16", H), Tiles(tile, tile, tile)
    call = Call(tiles, True, H**-0.5, case.T, False, COMPUTE_CAPABILITY[chip])

    def lower():
        with abstract_on(chip) as abstract:
            heads = [case.N, case.K, case.K, *([] if kernel == "flash_forward" else [case.N])]
            arrays = [abstract((case.B, case.T, n, H), jnp.bfloat16) for n in heads]
            if kernel != "flash_forward":
                arrays += 2 * [abstract((case.B, case.N, case.T), jnp.float32)]
            return jax.jit(kernel_call(FIELDS[kernel], kernels, call, case.T)).lower(*arrays)

    with tempfile.TemporaryDirectory() as folder:
        return resources_of_program(lower, Path(folder))[kernel]


@dataclasses.dataclass
class Counts:
    """The two loops of a kernel on a chip, and the scores that each of them computes."""

    chip: str
    H: int
    kernel: str
    tile: Tile
    registers: int
    blocks: int
    loops: dict[str, Loop]
    scores: dict[str, int]
    """Loop -> how many scores of a row of the context and a head it computes."""

    @property
    def scores_of_warp(self) -> float:
        """Scores that a warp computes in one iteration of a loop."""
        return self.tile.rows * self.tile.columns / self.tile.warps

    def instructions(self, loop: str) -> dict[str, float]:
        """Unit -> instructions of a thread for each score."""
        counts = self.loops[loop].instructions
        return {unit: LANES * n / self.scores_of_warp for unit, n in counts.items()}

    def clocks(self, loop: str) -> dict[str, float]:
        """Unit -> clocks of a multiprocessor for each score."""
        counts, rates = self.loops[loop], RATES[self.chip]
        clocks = {unit: LANES * counts.instructions[unit] / rates[unit] for unit in rates}
        clocks["tensor"] = counts.flop / rates["tensor"]
        clocks["shared"] = counts.shared_bytes / rates["shared"]
        clocks["FMA"] = clocks.pop("FP32") + clocks.pop("IMAD")
        clocks["issue"] = sum(counts.instructions.values()) / SCHEDULERS
        return {unit: n / self.scores_of_warp for unit, n in clocks.items()}


def count(backend: str, kernel: str, chip: str, tile: Tile, H: int, context: int) -> Counts | None:
    """Counts a kernel's instructions in its machine code; None if it spills or does not compile.

    Raises:
      UserError: the machine code does not have the two loops that are expected.
    """
    try:
        compiled = compile_kernel(backend, kernel, chip, tile, H)
    except jax.errors.JaxRuntimeError:  # it needs more shared memory than there is
        return None
    if compiled.spills:
        return None
    loops = inner_loops(disassemble(compiled.machine_code))
    needed = 2 * H * PRODUCTS[kernel] * tile.rows * tile.columns // tile.warps
    # It is more if two groups of warps compute the same scores.
    require(
        len(loops) == 2 and all(loop.flop >= needed for loop in loops),
        f"{kernel} with {tile}: loops of {[loop.flop for loop in loops]} FLOP a warp, not two of "
        f"{needed} or more.",
    )
    full, masked = sorted(loops, key=lambda loop: loop.instructions["ALU"])
    call = Call(Tiles(tile, tile, tile), True, 1.0, context, False, None)
    rows = "keys" if kernel == "flash_dkdv" else "queries"
    start, full_start, full_stop, stop = np.moveaxis(
        np.asarray(column_ranges(find_documents(None, context), call, tile, rows)), -1, 0
    )
    full_tiles = int(np.sum(full_stop - full_start))
    masked_tiles = int(np.sum(stop - start)) - full_tiles
    size = tile.rows * tile.columns
    return Counts(
        *(chip, H, kernel, tile, compiled.registers),
        blocks_of_multiprocessor(compiled, tile.warps, TARGETS[chip]),
        {"full": full, "masked": masked},
        {"full": size * full_tiles, "masked": size * masked_tiles},
    )


def blocks_of_multiprocessor(kernel: Resources, warps: int, target: Target) -> int:
    """How many blocks of a kernel fit on a multiprocessor.

    A warp takes registers in units of 256, and a block takes 1 KiB of shared memory more than it
    asks for (CUDA C++ Programming Guide, "Compute Capabilities").
    """
    registers = warps * math.ceil(kernel.registers * LANES / 256) * 256
    by_memory = target.shared_memory // (kernel.shared_memory + 1024)
    return min(65536 // registers, by_memory, 2048 // (LANES * warps), 32)


def bounds(clocks: Mapping[str, float]) -> tuple[float, float, float]:
    """Clocks if all units work at once, if products alternate with the rest, and if no two overlap.

    Tensor cores read shared memory while they work, so the slower of the two counts for products.
    """
    products = max(clocks["tensor"], clocks["shared"])
    softmax = max(clocks[unit] for unit in ("MUFU", "FMA", "ALU", "issue"))
    alone = sum(clocks[unit] for unit in clocks if unit != "issue")
    return max(products, softmax), products + softmax, alone


def causal_bounds(counts: list[Counts]) -> list[float]:
    """Clocks of kernels that run one after another, for a row of the context and a head."""
    return [
        sum(
            n * bounds(kernel.clocks(loop))[i]
            for kernel in counts
            for loop, n in kernel.scores.items()
        )
        for i in range(3)
    ]


def speeds(chip: str, flop: float, clocks: list[float] | tuple[float, ...]) -> list[str]:
    """TFLOP/s, and the share of the peak in brackets, for each number of clocks."""
    peak = PEAK_FLOPS[TARGETS[chip].device_kind] / 1e12
    shares = [flop / (n * RATES[chip]["tensor"]) for n in clocks]
    return [f"{peak * share:.0f} ({100 * share:.0f} %)" for share in shares]


def show_tile(tile: Tile) -> str:
    stages = f"{tile.stages} stages" if tile.stages > 1 else "1 stage"
    return f"{tile.rows} x {tile.columns}, {tile.warps} warps, {stages}{' tma' * tile.tma}"


def rows_of(counts: Counts, context: int) -> list[list[str]]:
    """The rows of a kernel in the table: one for each of its two loops, and one for the whole."""
    start = [counts.chip, str(counts.H), counts.kernel]
    details = [show_tile(counts.tile), str(counts.registers), str(counts.blocks)]
    rows = []
    for loop in counts.loops:
        of, clocks = counts.instructions(loop), counts.clocks(loop)
        units = [of["MUFU"], of["FP32"] + of["IMAD"], of["ALU"], of["uniform"]]
        units += [sum(of.values()) - sum(units), sum(of.values())]
        order = ("tensor", "MUFU", "FMA", "ALU", "shared", "issue")
        rows.append([*start, loop, *details, *(f"{n:.2f}" for n in units)])
        rows[-1] += [f"{1000 * clocks[unit]:.0f}" for unit in order]
        flop = 2 * counts.H * PRODUCTS[counts.kernel]
        rows[-1] += speeds(counts.chip, flop, bounds(clocks))
    rows.append(causal_row(start, [counts], PRODUCTS[counts.kernel], context))
    return rows


def causal_row(start: list[str], counts: list[Counts], products: int, context: int) -> list[str]:
    """The row of one or several kernels over a whole context."""
    flop = 2 * counts[0].H * products * context**2 / 2
    shown = speeds(counts[0].chip, flop, causal_bounds(counts))
    return [*start, "causal", *[""] * (len(HEAD) - len(start) - 4), *shown]


def table_of_tiles_in_use(options: Options) -> tuple[list[list[str]], list[Counts]]:
    """The table without its headings, and the counts it shows."""
    table, all_counts = [], []
    for chip in options.chips:
        for H in options.head_widths:
            tiles = TILES[options.backend, chip, "bfloat16", H]
            kernels = []
            for kernel in KERNELS:
                tile = getattr(tiles, FIELDS[kernel])
                counts = count(options.backend, kernel, chip, tile, H, options.context)
                require(counts is not None, f"{kernel} with {tile} spills, or does not compile.")
                table += rows_of(counts, options.context)
                kernels.append(counts)
            for name, part, products in (
                ("backward", kernels[1:], FORWARD_AND_BACKWARD - PRODUCTS["flash_forward"]),
                ("forward and backward", kernels, FORWARD_AND_BACKWARD),
            ):
                start = [chip, str(H), name]
                table.append(causal_row(start, part, products, options.context))
            all_counts += kernels
    return table, all_counts


def table_of_candidates(options: Options) -> tuple[list[list[str]], list[Counts]]:
    """All candidates that compile and do not spill; the best if products alternate come first."""
    table, all_counts = [], []
    for chip in options.chips:
        for H in options.head_widths:
            for kernel in options.search:
                tiles = candidates(FIELDS[kernel], options.backend, chip, "bfloat16", H)
                asked = [
                    (options.backend, kernel, chip, tile, H, options.context) for tile in tiles
                ]
                counted = [counts for x in asked if (counts := count(*x)) is not None]
                counted.sort(key=lambda counts: causal_bounds([counts])[1])
                all_counts += counted
                for counts in counted:
                    full, _, causal = rows_of(counts, options.context)
                    table.append([*full[:-3], *causal[-3:]])
    return table, all_counts


def main(options: Options) -> int:
    for chip in options.chips:
        require(chip in TARGETS, f"There is no chip {chip!r}: give {' or '.join(TARGETS)}.")
    for kernel in options.search:
        require(kernel in KERNELS, f"There is no kernel {kernel!r}: give {', '.join(KERNELS)}.")
    jax.config.update("jax_platforms", "cpu")  # a CUDA plugin that finds no GPU would fail
    make = table_of_candidates if options.search else table_of_tiles_in_use
    table, counts = make(options)
    table = [HEAD, *table]
    assembler = f"Assembled by ptxas {triton.knobs.nvidia.ptxas.version}; {options.backend}."
    title = f"Instructions of the attention kernels a score, context {options.context}"
    running.show(title, table, [*LEGEND, assembler])
    if options.out is not None:
        facts: dict[str, Any] = {"counts": [dataclasses.asdict(x) for x in counts]}
        device = " and ".join(TARGETS[chip].device_kind for chip in options.chips)
        running.write_results(options.out, device, title, [*LEGEND, assembler], table, facts)
    return 0


if __name__ == "__main__":
    running.command(Options, __doc__, main)
