"""The training step is timed beside PyTorch's, one system after another, within a given time."""

import json
import types

import pytest

from benchmarks import running
from benchmarks.running import TINY
from benchmarks.step import training
from support.benchmark_workers import our_spec

OURS, PEER, OTHER = (
    training.System(whose, "bfloat16", 4)
    for whose in (training.OURS, "torch", "torch transformers")
)
NO_MEMORY = "out of memory: CUDA out of memory."


@pytest.fixture
def measure(monkeypatch):
    """Calls `training.measure` with workers that give prepared answers.

    An answer is tokens/s, or the reason of a failure. Returned are the rows, how many of them each
    report had, and what the workers were asked.
    """

    def call(answers, systems, seconds=1000.0):
        reported, specs, answers = [], [], iter(answers)

        def answer(module, spec, seconds, environment=None):
            specs.append(spec)
            speed = next(answers)
            if isinstance(speed, str):
                return {"failure": speed}
            tokens = spec["rows"] * spec["model"]["context"]
            return {"seconds": [tokens / speed], "first_step_seconds": 1.0}

        monkeypatch.setattr(running, "in_own_process", answer)
        monkeypatch.setattr(running, "device_kind", lambda: "cpu")
        options = training.Options(quick=True, seconds=seconds)
        rows = training.measure(systems, "tiny", options, lambda rows: reported.append(len(rows)))
        return rows, reported, specs

    return call


def test_a_training_step_is_timed_and_reported(tmp_path, capsys):
    options = training.Options(steps=2, quick=True, out=tmp_path / "table")
    system = training.System("tinyllama_jax", "float32", 4, {"recompute": "elementwise"})
    row = {"system": system.whose, "name": str(system), "precision": system.precision}
    row |= training.run(our_spec(TINY, 8, **system.options))
    assert len(row["seconds"]) == 2 and len(row["losses"]) == 2 + training.WARMUP
    assert abs(row["losses"][0] - 6.24) < 0.3  # ln 512
    assert row["first_step_seconds"] > row["compile_seconds"] > 0
    training.complete(row, TINY, 8)
    failed = {"system": "torch", "name": "torch", "precision": "float32", "failure": "no torch"}
    training.report([row, failed], "tiny", options)
    result = json.loads((tmp_path / "table.json").read_text())
    assert result["steps"][0]["tokens_per_s"] == 8 * 64 / (sum(row["seconds"]) / 2)
    assert "| torch | float32 | no torch |" in (tmp_path / "table.md").read_text()

    # A GPU's numbers and options are longer; nothing of them is cut in 80 columns.
    row |= {"name": str(training.gpu_systems(("ours",))[0]), "first_step_seconds": 81.4}
    row |= {"tokens_per_s": 123_456, "tokens_per_s_range": [119_999, 124_001]}
    row |= {"mfu_full": 0.581, "mfu_causal": 0.539, "peak_gib": 46.51}
    row |= {"predicted_tokens_per_s": 131_072}
    training.report([row, failed], "1b", options)
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80 and shown.count(running.QUICK) == 2
    numbers = ["1", "123,456", "(119,999-124,001)", "58.1%", "53.9%", "46.5", "131,072", "81", "s"]
    assert numbers in [line.split() for line in shown]
    assert "2: torch, float32: no torch" in shown


def test_a_peer_that_runs_out_of_memory_is_tried_with_half_the_rows(measure):
    answers = [300.0, NO_MEMORY, 200.0, "no such thing", 300.0]
    rows, reported, specs = measure(answers, [OURS, PEER, OTHER, OURS])
    assert [spec["micro_rows"] for spec in specs] == [4, 4, 2, 4, 4]
    assert [spec["rows"] for spec in specs] == [8] * 5 and reported == [1, 2, 3, 4, 5]
    (line,) = training.ratio(rows)
    assert "tinyllama_jax, 4 rows over torch, 2 rows" in line and ": 1.50. " in line
    assert f"NOT beaten: torch, 4 rows ({NO_MEMORY}); torch transformers, 4 rows (no such" in line


def test_a_peer_is_tried_twice_at_most_and_without_peers_there_is_no_ratio(measure):
    rows, _, specs = measure([300.0, NO_MEMORY, NO_MEMORY], [OURS, PEER])
    assert [spec["micro_rows"] for spec in specs] == [4, 4, 2]
    (line,) = training.ratio(rows)
    assert line.startswith("Peers that did not run are NOT beaten") and "over" not in line


def test_ours_is_never_tried_with_fewer_rows_nor_started_again_after_a_failure(measure):
    rows, _, specs = measure([NO_MEMORY, 200.0], [OURS, PEER, OURS])
    assert [spec["whose"] for spec in specs] == ["tinyllama_jax", "torch"]
    assert [row.get("failure") for row in rows] == [NO_MEMORY, None, NO_MEMORY]
    assert training.ratio(rows) == []


def test_a_peer_that_ran_in_another_turn_is_not_called_missing(measure):
    (row,), _, _ = measure([200.0], [PEER])
    assert training.ratio([{**row, "failure": training.NO_TIME}, row]) == []


def test_no_system_starts_that_would_not_end_in_time(measure, monkeypatch, tmp_path):
    rows, _, specs = measure([], [OURS], seconds=training.COLD - 1)
    assert rows[0]["failure"] == training.NO_TIME and not specs
    training.report(rows, "tiny", training.Options(quick=True, out=tmp_path / "table"), last=False)
    assert not list(tmp_path.iterdir()), "the table of an earlier call would be lost"

    # A system that has run is expected to take as long again: 40 s and a margin of a half.
    times = iter([0, 0, 40, 60, 60, 61])
    clock = types.SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr(training, "time", clock)
    rows, _, specs = measure([1.0, 1.0], [OURS, OURS], seconds=120)
    assert len(specs) == 2 and not any("failure" in row for row in rows)
    times = iter([0, 0, 40, 61])
    rows, _, specs = measure([1.0], [OURS, OURS], seconds=120)
    assert len(specs) == 1 and rows[1]["failure"] == training.NO_TIME


def test_a_prediction_that_fails_costs_no_measurement(monkeypatch, capsys):
    def fail(*_):
        raise AttributeError("'NoneType' object has no attribute 'argument_size_in_bytes'")

    monkeypatch.setattr("tinyllama_jax.performance.breakdown.roofline_by_kind", fail)
    result = training.run(our_spec(TINY, 8))
    assert len(result["seconds"]) == 2 and result["predicted_seconds"] is None
    assert "NOT KNOWN: the roofline: AttributeError" in capsys.readouterr().err
