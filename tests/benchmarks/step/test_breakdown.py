"""The time of a step is broken down, and its trace is kept."""

import gzip
import json

import jax
import pytest

from benchmarks.step import breakdown


def test_a_breakdown_of_the_step_is_measured_and_written(tmp_path, capsys, monkeypatch):
    end, ready = breakdown.Profiler.end, []

    def noted_end(self, step, state, batch):
        ready.append(all(leaf.is_ready() for leaf in jax.tree.leaves(state)))
        return end(self, step, state, batch)

    monkeypatch.setattr(breakdown.Profiler, "end", noted_end)
    kept = tmp_path / "kept"
    breakdown.main(breakdown.Options(steps=2, keep=kept, quick=True, out=tmp_path / "table"))
    assert ready == [True] and "matrix products" in capsys.readouterr().out
    result = json.loads((tmp_path / "table.json").read_text())
    seconds = {row["kind"]: row["seconds"] for row in result["rows"]}
    assert seconds["matmul"] > 0 and seconds["optimizer"] > 0
    assert sum(seconds.values()) == pytest.approx(result["step_seconds"])
    assert result["spec"]["micro_rows"] == 4 and result["versions"]["jax"] == jax.__version__
    assert "| matrix products |" in (tmp_path / "table.md").read_text()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"table.json", "table.md", "table.png", "kept"}
    step, trace = sorted(kept.iterdir(), key=lambda path: ".xplane." in path.name)
    assert gzip.decompress(step.read_bytes()).startswith(b"HloModule jit_step")
    assert b"dot" in gzip.decompress(trace.read_bytes())
