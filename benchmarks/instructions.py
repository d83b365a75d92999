"""What bounds the attention kernels on paper: instructions a score in their loops, unit by unit.

    pip install -e '.[plan]'
    python benchmarks/instructions.py                     # on an A100 and an H100
    python benchmarks/instructions.py --search flash_dq   # all tiles that --tune of attention.py
                                                          # would try and that spill nothing

No GPU is needed and nothing is measured. The kernels are compiled for absent GPUs, assembled and
disassembled; the instructions of a loop's turn are counted, over the scores of its turn (a score is
a query beside a key), and divided by how many a multiprocessor can do in a clock. What a program
does before and after its loops, waiting for memory, and multiprocessors without work do not count.
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

import running
from kernel_resources import KERNELS, Resources, abstract_on, disassemble, resources_of_program
from sass import LANES, Loop, inner_loops
from tinyllama_jax.errors import require
from tinyllama_jax.model.attention import COMPUTE_CAPABILITY
from tinyllama_jax.model.flash_attention import column_ranges, find_documents
from tinyllama_jax.model.tiles import TILES, Call, Tile, Tiles
from tinyllama_jax.performance.flops import PEAK_FLOPS
from tinyllama_jax.performance.targets import A100_40G, H100, Target
from tuning import candidates, kernel_call, tuning_case

TARGETS = {"A100": A100_40G, "H100": H100}
SCHEDULERS = 4  # of a multiprocessor; each starts an instruction of one warp in a clock

# Chip -> unit -> how much a multiprocessor does in a clock: FLOP of the tensor cores, bytes of
# shared memory, and results of the others. Tensor cores: NVIDIA's white papers, 1,024 and 2,048
# dense bf16 multiply-adds. Shared memory: 32 banks of 4 bytes. The others: CUDA C++ Programming
# Guide, "Arithmetic Instructions", compute capability 8.0 and 9.0.
RATES: dict[str, dict[str, int]] = {
    "A100": {"tensor": 2048, "MUFU": 16, "FP32": 64, "IMAD": 64, "ALU": 64, "shared": 128},
    "H100": {"tensor": 4096, "MUFU": 16, "FP32": 128, "IMAD": 64, "ALU": 64, "shared": 128},
}
# Matrix products of a score; the backward pass counts as 2.5 forward ones.
PRODUCTS = {"flash_forward": 2, "flash_dq": 3, "flash_dkdv": 4}
FORWARD_AND_BACKWARD = 7
FIELDS = {"flash_forward": "forward", "flash_dq": "dq", "flash_dkdv": "dkdv"}  # of Tiles

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
    """Kernels of which all candidates for a tile are compared, instead of the tiles in use."""
    out: Path | None = None
    """Where the table goes, without suffix; nowhere by default."""


def compile_kernel(backend: str, kernel: str, chip: str, tile: Tile, H: int) -> Resources:
    """One kernel in bf16, causal, compiled for a chip that need not be here."""
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
    """A kernel's two loops on a chip, and how often the rows of a context need them."""

    chip: str
    H: int
    kernel: str
    tile: Tile
    registers: int
    blocks: int
    loops: dict[str, Loop]
    scores: dict[str, int]
    """Of a row of the context and a head, by loop."""

    @property
    def scores_of_warp(self) -> float:
        """In a turn of a loop."""
        return self.tile.rows * self.tile.columns / self.tile.warps

    def instructions(self, loop: str) -> dict[str, float]:
        """Of a thread for a score, by unit."""
        found = self.loops[loop].instructions
        return {unit: LANES * n / self.scores_of_warp for unit, n in found.items()}

    def clocks(self, loop: str) -> dict[str, float]:
        """Of a multiprocessor for a score, by unit."""
        found, rates = self.loops[loop], RATES[self.chip]
        of = {unit: LANES * found.instructions[unit] / rates[unit] for unit in rates}
        of["tensor"] = found.flop / rates["tensor"]
        of["shared"] = found.shared_bytes / rates["shared"]
        of["FMA"] = of.pop("FP32") + of.pop("IMAD")
        of["issue"] = sum(found.instructions.values()) / SCHEDULERS
        return {unit: clocks / self.scores_of_warp for unit, clocks in of.items()}


def count(backend: str, kernel: str, chip: str, tile: Tile, H: int, context: int) -> Counts | None:
    """A kernel with a tile, read from its machine code; None where it spills or cannot be compiled.

    Raises:
      UserError: its loops are not what they should be.
    """
    try:
        found = compile_kernel(backend, kernel, chip, tile, H)
    except jax.errors.JaxRuntimeError:  # more shared memory than there is
        return None
    if found.spills:
        return None
    loops = inner_loops(disassemble(found.machine_code))
    needed = 2 * H * PRODUCTS[kernel] * tile.rows * tile.columns // tile.warps
    # More, where two groups of warps both compute the scores of their rows.
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
        *(chip, H, kernel, tile, found.registers),
        blocks_of_multiprocessor(found, tile.warps, TARGETS[chip]),
        {"full": full, "masked": masked},
        {"full": size * full_tiles, "masked": size * masked_tiles},
    )


def blocks_of_multiprocessor(found: Resources, warps: int, target: Target) -> int:
    """How many fit (CUDA C++ Programming Guide, "Compute Capabilities"): a warp takes registers by
    256, and a block 1 KiB of shared memory more than it asks for."""
    registers = warps * math.ceil(found.registers * LANES / 256) * 256
    by_memory = target.shared_memory // (found.shared_memory + 1024)
    return min(65536 // registers, by_memory, 2048 // (LANES * warps), 32)


def bounds(clocks: Mapping[str, float]) -> tuple[float, float, float]:
    """Clocks if all units work at once, if products take turns with the rest, and if each unit
    waits for all others. Tensor cores are fed from shared memory while they work."""
    products = max(clocks["tensor"], clocks["shared"])
    softmax = max(clocks[unit] for unit in ("MUFU", "FMA", "ALU", "issue"))
    alone = sum(clocks[unit] for unit in clocks if unit != "issue")
    return max(products, softmax), products + softmax, alone


def causal_bounds(counts: list[Counts]) -> list[float]:
    """Clocks of kernels after each other, for a row of the context and a head."""
    return [
        sum(
            n * bounds(kernel.clocks(loop))[i]
            for kernel in counts
            for loop, n in kernel.scores.items()
        )
        for i in range(3)
    ]


def speeds(chip: str, flop: float, clocks: list[float] | tuple[float, ...]) -> list[str]:
    """TFLOP/s and the share of the peak, for each number of clocks."""
    peak = PEAK_FLOPS[TARGETS[chip].device_kind] / 1e12
    shares = [flop / (n * RATES[chip]["tensor"]) for n in clocks]
    return [f"{peak * share:.0f} ({100 * share:.0f} %)" for share in shares]


def show_tile(tile: Tile) -> str:
    stages = f"{tile.stages} stages" if tile.stages > 1 else "1 stage"
    return f"{tile.rows} x {tile.columns}, {tile.warps} warps, {stages}{' tma' * tile.tma}"


def rows_of(counts: Counts, context: int) -> list[list[str]]:
    """Of the table: its two loops, and the kernel."""
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
    flop = 2 * counts[0].H * products * context**2 / 2
    shown = speeds(counts[0].chip, flop, causal_bounds(counts))
    return [*start, "causal", *[""] * (len(HEAD) - len(start) - 4), *shown]


def table_of_tiles_in_use(options: Options) -> tuple[list[list[str]], list[Counts]]:
    table, all_counts = [], []
    for chip in options.chips:
        for H in options.head_widths:
            tiles = TILES[options.backend, chip, "bfloat16", H]
            found = []
            for kernel in KERNELS:
                tile = getattr(tiles, FIELDS[kernel])
                counts = count(options.backend, kernel, chip, tile, H, options.context)
                require(counts is not None, f"{kernel} with {tile} spills, or does not compile.")
                table += rows_of(counts, options.context)
                found.append(counts)
            for name, kernels, products in (
                ("backward", found[1:], FORWARD_AND_BACKWARD - PRODUCTS["flash_forward"]),
                ("forward and backward", found, FORWARD_AND_BACKWARD),
            ):
                start = [chip, str(H), name]
                table.append(causal_row(start, kernels, products, options.context))
            all_counts += found
    return table, all_counts


def table_of_candidates(options: Options) -> tuple[list[list[str]], list[Counts]]:
    """The best by turns first."""
    table, all_counts = [], []
    for chip in options.chips:
        for H in options.head_widths:
            for kernel in options.search:
                tiles = candidates(FIELDS[kernel], options.backend, chip, "bfloat16", H)
                asked = [
                    (options.backend, kernel, chip, tile, H, options.context) for tile in tiles
                ]
                found = [counts for x in asked if (counts := count(*x)) is not None]
                found.sort(key=lambda counts: causal_bounds([counts])[1])
                all_counts += found
                for counts in found:
                    full, _, causal = rows_of(counts, options.context)
                    table.append([*full[:-3], *causal[-3:]])
    return table, all_counts


def main(options: Options) -> int:
    for chip in options.chips:
        require(chip in TARGETS, f"There is no chip {chip!r}: give {' or '.join(TARGETS)}.")
    for kernel in options.search:
        require(kernel in KERNELS, f"There is no kernel {kernel!r}: give {', '.join(KERNELS)}.")
    jax.config.update("jax_platforms", "cpu")  # a CUDA plugin that finds no GPU would end here
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
