"""Machine code is read correctly, and the loops of the attention kernels hold what they should."""

import dataclasses

import pytest

from benchmarks.kernels import instructions
from benchmarks.kernels.kernel_resources import Resources
from benchmarks.kernels.sass import inner_loops
from tinyllama_jax.errors import UserError
from tinyllama_jax.model.tiles import TILES


def listing(*lines: str) -> str:
    """Instructions in the format of the disassembler; `.L_x_0:` is a label."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/         {line} ;"
        for i, line in enumerate(lines)
    )


LOOPS = listing(
    "MUFU.EX2 R9, R9",
    ".L_x_4:",  # the loop around the two others
    "FADD R1, R1, R2",
    ".L_x_1:",
    "LDSM.16.MT88.4 R24, [R3+0x400]",
    "@!PT LDS RZ, [RZ]",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@!P0 MUFU.EX2 R4, R4",
    "@P0 BRA `(.L_x_2)",  # a jump forward is no loop
    "IMAD.WIDE R2, R37, 0x2, R4",
    ".L_x_2:",
    "@!P0 CALL.REL.NOINC `(.L_x_3)",
    "BRA `(.L_x_1)",
    ".L_x_3:",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT",
    "HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR12].tnspB, R88, gsb0",
    "LDS.64 R2, [R4]",
    "@P1 BRA P2, `(.L_x_3)",
    "@P0 BRA `(.L_x_4)",
    ".L_x_5:",  # without tensor cores
    "FADD R1, R1, R2",
    "BRA `(.L_x_5)",
)


def test_inner_loops_with_tensor_cores_are_found():
    first, second = inner_loops(LOOPS)
    assert first.instructions == {
        **{"tensor": 1, "MUFU": 1, "FP32": 0, "IMAD": 1, "ALU": 0, "shared": 1, "uniform": 0},
        "other": 4,
    }
    assert second.names["LDS.64"] == 1 and sum(second.names.values()) == 4


def test_products_and_bytes_are_those_of_a_warp():
    first, second = inner_loops(LOOPS)
    assert first.flop == 2 * 16 * 8 * 16
    assert first.shared_bytes == 4 * 8 * 8 * 2  # four matrices of 8 x 8
    assert second.flop == 2 * 64 * (128 + 64) * 16 / 4
    # Both operands of the first product, the right one of the second; 8 bytes for each lane.
    assert second.shared_bytes == (64 + 128 + 64) * 16 * 2 / 4 + 32 * 8


def test_an_unknown_instruction_is_an_error():
    with pytest.raises(UserError, match="which unit does FROB use"):
        inner_loops(
            listing(".L_x_1:", "HMMA.16816.F32 R4, R8, R12, R4", "FROB R1", "BRA `(.L_x_1)")
        )


def test_bounds_of_units_that_work_at_once_in_turns_and_one_by_one():
    clocks = {"tensor": 60, "shared": 70, "MUFU": 64, "FMA": 20, "ALU": 30, "issue": 65}
    assert instructions.bounds(clocks) == (70, 70 + 65, 60 + 70 + 64 + 20 + 30)


@pytest.mark.parametrize(
    ("registers", "shared_memory", "warps", "blocks"),
    [
        (255, 49_152, 4, 2),  # by registers: 32,768 of 65,536
        (73, 0, 4, 6),  # a thread takes them by eight
        (32, 101_000, 8, 1),  # by shared memory: 1 KiB goes to the system
        (16, 0, 8, 8),  # by threads: 2,048
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared_memory, warps, blocks):
    kernel = Resources(registers, 0, shared_memory, "", b"")
    target = dataclasses.replace(instructions.A100_40G, shared_memory=203_000)
    assert instructions.blocks_of_multiprocessor(kernel, warps, target) == blocks


PRODUCTS = {"flash_forward": 2, "flash_dq": 3, "flash_dkdv": 4}


@pytest.mark.compile
@pytest.mark.parametrize("kernel", ["flash_forward", "flash_dq", "flash_dkdv"])
@pytest.mark.parametrize("chip", ["A100", "H100"])
def test_loops_hold_what_a_score_needs(chip, kernel):
    """A score needs an exponential, a multiply-add before it, and a selection only under a mask."""
    tile = getattr(TILES["pallas", chip, "bfloat16", 64], instructions.FIELDS[kernel])
    counts = instructions.count("pallas", kernel, chip, tile, 64, 2048)
    scores = counts.scores_of_warp / 32  # that a thread computes
    full, masked = counts.loops["full"], counts.loops["masked"]
    assert full.names["FFMA.FTZ"] == scores
    assert (
        scores <= full.names["MUFU.EX2"] <= 1.1 * scores
    )  # the forward kernel also rescales its sums
    assert "FSEL" not in full.names and masked.names["FSEL"] == scores
    assert full.flop == masked.flop == 2 * 64 * counts.scores_of_warp * PRODUCTS[kernel]
