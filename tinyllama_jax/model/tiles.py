"""Tile sizes of the attention kernels; `benchmarks.kernels.attention --tune` rewrites them."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work."""

    rows: int
    """Tokens that a program owns: queries in the forward and dQ kernels, keys in dK/dV."""
    columns: int
    """Tokens on the other side that it takes in one step of its loop."""
    warps: int
    stages: int
    """Steps of the loop whose loads are in flight at once."""
    tma: bool = False
    """Triton alone: load through the tensor memory accelerator, which Hopper has."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    dkdv: Tile
    dq: Tile

    def padding(self) -> int:
        """Row lengths must be multiples of this."""
        sizes = (self.forward, self.dkdv, self.dq)
        return max(max(tile.rows, tile.columns) for tile in sizes)


@dataclasses.dataclass(frozen=True)
class Call:
    """What is the same for every program of the three kernels."""

    tiles: Tiles
    causal: bool
    scale: float
    length: int
    """Tokens of a row before it was padded to a multiple of the tiles."""
    interpret: bool
    compute_capability: int | None
    """Triton alone: what to compile for, 80 for 8.0."""

    @property
    def scale_log2(self) -> float:
        """The scale of scores whose softmax is taken in powers of 2: exp(x) = 2^(x log2 e)."""
        return self.scale * math.log2(math.e)


def _tiles(forward, dkdv, dq) -> Tiles:
    return Tiles(Tile(*forward), Tile(*dkdv), Tile(*dq))


# (backend, chip, dtype, head width) -> tiles of the forward, dK/dV and dQ kernels. The comment is
# what the three took on a card; rows without one compile without spills and await their card.
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
