"""The search for tiles takes the fastest that are right, and writes them into the table."""

import dataclasses
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.kernels import tuning
from support.paths import ROOT
from tinyllama_jax.model import pallas_kernels
from tinyllama_jax.model.tiles import TILES, Tile, Tiles

TABLE = ROOT / "tinyllama_jax" / "model" / "tiles.py"
DATED = re.compile(r"    # \d{4}-.*")
CHOICES = [Tile(32, 32, 4, 1), Tile(16, 32, 4, 2)]
CASE = tuning.Case(1, 64, 2, 1, 32)


def fewer_rows_are_faster(runs, rounds, seconds):
    """A timer by which all tiles run, and those of fewer rows are faster."""
    for call, wait in runs.values():
        wait(call(0))
    return {tile: {"ms": tile.rows / 32} for tile in runs}


def numbers(table: dict) -> dict:
    """A table of tiles as plain tuples, since a copy of the module has its own classes."""
    return {row: dataclasses.astuple(tiles) for row, tiles in table.items()}


def numbers_in(path: Path) -> dict:
    """The table in a copy of tiles.py."""
    return numbers(runpy.run_path(str(path))["TILES"])


def assert_formatted(path: Path) -> None:
    """Checks a file with ruff, if it is installed."""
    if ruff := shutil.which("ruff", path=Path(sys.executable).parent):
        subprocess.run([ruff, "format", "--check", "--line-length=100", path], check=True)


def test_tuning_finds_the_fastest_and_writes_it_over_its_row(tmp_path, monkeypatch):
    path = tmp_path / "tiles.py"
    shutil.copy(TABLE, path)
    monkeypatch.setattr(tuning, "tuning_case", lambda dtype, H: CASE)
    monkeypatch.setattr(tuning, "candidates", lambda *_: CHOICES)
    for _ in range(2):  # the second time over the row that the first one wrote
        tuning.tune_table(path, ["pallas"], "A100", "bfloat16", [32], fewer_rows_are_faster)

    winner = Tiles(*[CHOICES[1]] * 3)
    assert numbers_in(path) == numbers(TILES | {("pallas", "A100", "bfloat16", 32): winner})
    comments = DATED.findall(path.read_text())
    assert len(comments) == 1 + len(DATED.findall(TABLE.read_text()))
    assert f"jax {jax.__version__}, {CASE}: 0.500, 0.500, 0.500 ms" in path.read_text()
    assert_formatted(path)


def test_a_new_row_is_written_as_ruff_formats_it(tmp_path):
    path, row = tmp_path / "tiles.py", ("pallas", "B200", "bfloat16", 128)
    tiles = Tiles(*[Tile(128, 128, 8, 3, True)] * 3)  # too long for one line
    path.write_text(tuning.rewrite(TABLE.read_text(), row, tiles, "x"))
    assert numbers_in(path) == numbers(TILES | {row: tiles})
    assert_formatted(path)


def test_a_kernel_that_is_wrong_never_wins_however_fast_it_is(monkeypatch):
    right = pallas_kernels.dq

    def dq(call, *arrays):
        return right(call, *arrays) * (2 if call.tiles.dq.rows == 16 else 1)

    monkeypatch.setattr(pallas_kernels, "dq", dq)
    tiles, times = tuning.tune(
        "pallas", "A100", "float32", CASE, lambda _: CHOICES, fewer_rows_are_faster
    )
    assert tiles == Tiles(CHOICES[1], CHOICES[1], CHOICES[0])
    assert times == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("row", TILES, ids=str)
def test_candidates_hold_the_tiles_in_use_and_no_others_that_could_not_be_fast(row):
    _, chip, dtype, H = row
    for kernel in tuning.KERNELS:
        tiles = tuning.candidates(kernel, *row)
        assert getattr(TILES[row], kernel) in tiles
        assert 15 < len(tiles) < 120
        if (chip, dtype) == ("H100", "bfloat16"):  # two groups of warps would compute the same
            assert not [t for t in tiles if t.rows == 64 and t.warps == 8]
        if H == 128:  # more than the registers of 4 warps hold
            assert not [t for t in tiles if t.rows == t.columns == 128 and t.warps == 4]
