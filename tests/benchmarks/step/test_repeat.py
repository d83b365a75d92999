"""Two runs are compared bit by bit."""

import json
import re
import time

from benchmarks.step import repeat
from support.benchmark_workers import work_in_this_process


def test_a_difference_between_two_runs_is_found(tmp_path, monkeypatch, capsys):
    specs, kept = [], []

    def run(spec):
        specs.append(spec)
        if spec["repeatable"]:
            kept.append(repeat.run(spec))
        return kept[-1]

    work_in_this_process(monkeypatch, run)
    options = repeat.Options(steps=6, rows=2, quick=True, out=tmp_path / "table")
    assert repeat.main(options) == 0
    assert [spec["repeatable"] for spec in specs] == [True, False, True, False]
    result = json.loads((tmp_path / "table.json").read_text())
    assert result["same_bits"] and "weights.embedding_VD" in result["runs"][0]["bits"]

    # In bf16 JAX's own gradient of the embedding rounds more often than ours.
    begun = {"precision": "bfloat16", "begun": time.time()}
    ordered, other = (repeat.run(spec | begun) for spec in specs[:2])
    results = iter([ordered, other, other, other])
    work_in_this_process(monkeypatch, lambda spec: next(results))
    assert repeat.main(options) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Runs 1 and 3: THEY DIFFER in the loss from step [2-6] on and", shown), shown
    assert "without what that needs: the same bits" in shown


def test_a_run_that_fails_leaves_what_the_others_measured(tmp_path, monkeypatch, capsys):
    done = {"seconds": [0.1] * 8, "losses": [2.0] * 8, "bits": {"a": "1"}}
    done |= {"first_step_seconds": 3.0, "compile_seconds": 1.0}
    failed = {"failure": "not done within 9 s"}
    options = repeat.Options(steps=8, quick=True, out=tmp_path / "table")
    for answers, compared in (
        ([done, failed, done, failed], ["Runs 1 and 3: the same bits.", "is not known"]),
        ([done, done, failed, done], ["Runs 1 and 3: NOT COMPARED", "costs +0.00% of a step."]),
        ([failed] * 4, ["Runs 1 and 3: NOT COMPARED", "is not known"]),
    ):
        results = iter(answers)
        work_in_this_process(monkeypatch, lambda spec, results=results: next(results))
        assert repeat.main(options) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert all(words in shown for words in compared), shown
        result = json.loads((tmp_path / "table.json").read_text())
        assert len(result["runs"]) == 4 and result["runs"][0]["repeatable"]
        assert result["same_bits"] == (answers[0] == answers[2] == done)
        assert "not done within 9 s" in (tmp_path / "table.md").read_text()
