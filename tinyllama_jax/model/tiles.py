"""Tile sizes of the attention kernels; `benchmarks.kernels.attention --tune` rewrites them."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel divides its work among programs (CUDA thread blocks) and loop steps."""

    rows: int
    """Tokens that one program owns: queries in the forward and dQ kernels, keys in dK/dV."""
    columns: int
    """Tokens of the other kind (keys or queries) that a program takes in one loop step."""
    warps: int
    """Warps of 32 threads in a program."""
    stages: int
    """Number of loop steps whose loads from memory are in flight at once."""
    tma: bool = False
    """Load through the tensor memory accelerator of Hopper GPUs. Only the Triton kernels can."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One tile for each of the three kernels."""

    forward: Tile
    dkdv: Tile
    dq: Tile

    def padding(self) -> int:
        """Returns the number of tokens of which the length of a row must be a multiple."""
        # The largest size will do, because all sizes are powers of two.
        sizes = (self.forward, self.dkdv, self.dq)
        return max(max(tile.rows, tile.columns) for tile in sizes)


@dataclasses.dataclass(frozen=True)
class Call:
    """The parameters of one attention call, which all programs of the three kernels share."""

    tiles: Tiles
    causal: bool
    scale: float
    length: int
    """Tokens in a row before it was padded to a multiple of `Tiles.padding()`."""
    interpret: bool
    """Run the kernel in Pallas' interpreter, on a CPU."""
    compute_capability: int | None
    """The CUDA compute capability to compile for, 80 for 8.0. Only the Triton kernels use it."""

    @property
    def scale_log2(self) -> float:
        """The scale that makes scores the exponents of 2, since exp(x) = 2^(x log2 e).

        GPUs have an instruction for powers of 2 and none for powers of e.
        """
        return self.scale * math.log2(math.e)


def _tiles(forward, dkdv, dq) -> Tiles:
    return Tiles(Tile(*forward), Tile(*dkdv), Tile(*dq))


# (backend, chip, dtype, head width) -> tiles of the forward, dK/dV and dQ kernels.
#
# A comment on a row holds the times that the three kernels took on that GPU. A row without a
# comment was never timed on a GPU. It was chosen from the compiled machine code: it spills no
# registers to memory, which a larger tile may do. `benchmarks/instructions.py` compares others.
TILES = {
    ("pallas", "A100", "bfloat16", 32): _tiles((128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
    ("pallas", "A100", "bfloat16", 64): _tiles((128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 4, 2)),
    ("pallas", "A100", "bfloat16", 128): _tiles((128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2)),
    ("pallas", "A100", "float32", 32): _tiles((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 4, 2)),
    ("pallas", "A100", "float32", 64): _tiles((64, 32, 8, 2), (64, 16, 8, 2), (64, 32, 8, 2)),
    ("pallas", "A100", "float32", 128): _tiles((32, 16, 4, 2), (32, 16, 4, 2), (16, 16, 4, 2)),
    ("pallas", "H100", "bfloat16", 32): _tiles((128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
    ("pallas", "H100", "bfloat16", 64): _tiles((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    ("pallas", "H100", "bfloat16", 128): _tiles((128, 128, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
    ("pallas", "H100", "float32", 32): _tiles((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 4, 2)),
    ("pallas", "H100", "float32", 64): _tiles((64, 32, 8, 2), (64, 16, 8, 2), (64, 16, 8, 2)),
    ("pallas", "H100", "float32", 128): _tiles((32, 16, 4, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
    ("triton", "A100", "bfloat16", 32): _tiles((128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("triton", "A100", "bfloat16", 64): _tiles((128, 64, 4, 3), (128, 64, 8, 2), (128, 32, 4, 2)),
    ("triton", "A100", "bfloat16", 128): _tiles((128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2)),
    ("triton", "A100", "float32", 32): _tiles((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    ("triton", "A100", "float32", 64): _tiles((64, 32, 8, 1), (32, 32, 8, 2), (64, 32, 8, 2)),
    ("triton", "A100", "float32", 128): _tiles((64, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)),
    ("triton", "H100", "bfloat16", 32): _tiles((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    ("triton", "H100", "bfloat16", 64): _tiles((128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    ("triton", "H100", "bfloat16", 128): _tiles((128, 128, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
    ("triton", "H100", "float32", 32): _tiles((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    ("triton", "H100", "float32", 64): _tiles((64, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)),
    ("triton", "H100", "float32", 128): _tiles((32, 16, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
}
