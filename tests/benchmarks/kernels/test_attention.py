"""Attention is compared with that of other libraries where there is no GPU too."""

import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from support.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.kernels.attention", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_quick_comparison_runs_on_a_cpu(tmp_path):
    before = sorted(RESULTS.iterdir())
    shown = run("--quick", "--out", str(tmp_path / "table"))
    assert shown.returncode == 0, shown.stderr
    assert "NOTHING about any GPU" in shown.stdout
    assert sorted(RESULTS.iterdir()) == before
    result = json.loads((tmp_path / "table.json").read_text())
    assert result["device"] == "cpu" and result["versions"]["jax"] == jax.__version__
    assert {"commit", "rows"} <= set(result)

    rows = {(row["system"], row["case"]["documents"]): row for row in result["rows"]}
    assert len(rows) == 16  # 8 systems
    for system in ("pallas", "reference"):
        for documents in (False, True):
            row = rows[system, documents]
            assert row["failure"] is None and row["same_bits"] and row["error"] < 1e-2
            for which in ("forward", "backward"):
                time = row[which]
                assert 0 < time["ms_min"] <= time["ms"] <= time["ms_max"]
                assert time["tflops"] > 0 and time["calls"] > 0
        assert rows[system, True]["backward"]["over_whole"] > 0
    # A system that fails is a row with a reason.
    assert "no tiles for cpu" in rows["triton", False]["failure"]
    assert rows["triton", False]["forward"] is None
    if importlib.util.find_spec("torch"):
        assert rows["torch flash", False]["failure"] is None
        assert rows["pallas", False]["backward"]["best_peer"] == "torch flash"
        assert rows["torch flash", True]["failure"] == "takes no documents"
    table = (tmp_path / "table.md").read_text()
    assert table.count("| pallas |") == 2 and "no tiles for cpu" in table


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [((), "no GPU here"), (("--tune", "--quick"), "no GPU"), (("--systems", "mine"), "'mine'")],
)
def test_what_cannot_be_done_is_said_in_a_sentence(arguments, complaint):
    shown = run(*arguments)
    assert shown.returncode == 2
    assert complaint in shown.stderr and "Traceback" not in shown.stderr
