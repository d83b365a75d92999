"""Whether two systems learn the same is judged by their losses."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.running import TINY
from benchmarks.step import learning
from support.benchmark_workers import work_in_this_process
from tinyllama_jax.data.tokenizer import load_tokenizer
from tinyllama_jax.preparation.documents import Document


@pytest.mark.torch
def test_it_learns_the_same_unless_it_begins_with_other_weights(
    data, one_thread, tmp_path, monkeypatch, capsys
):
    runs = {}

    def run(spec):
        key = spec["whose"], spec.get("seed")
        if key not in runs or spec["whose"] == "files":
            runs[key] = learning.run(spec)
        return runs[key]

    work_in_this_process(monkeypatch, run)
    source = Path(data.sources[0].path)
    options = learning.Options(data=source, steps=12, rows=4, quick=True, out=tmp_path / "table")
    assert learning.main(options) == 0
    result = json.loads((tmp_path / "table.json").read_text())
    assert result["same"] and len(result["runs"]) == 4
    for systems, seeds in result["apart_in_halves"]:
        assert systems < 1e-3 < 1e-2 < seeds
    losses = result["runs"]["ours, seed 1"]["losses"]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.1
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert "It learns the same." in table and f"| {losses[-1]:.4f} |" in table
    assert table.count("\n| ") == 11 and "(table.png)" in table

    # The second of our runs begins with the weights of the first: no seeds are apart.
    runs["ours", 1] = runs["ours", 0]
    assert learning.main(options) == 1
    assert "DOES NOT LEARN THE SAME" in " ".join(capsys.readouterr().out.split())
    runs["ours", 1] = {**runs["ours", 1], "losses": [math.nan] * 12}
    assert learning.main(options) == 1


def test_rows_of_the_library_are_its_documents_in_order(tmp_path, monkeypatch):
    documents = [Document("a", "the cat sat on the mat\n" * 2000), Document("b", "a dog\n" * 3000)]
    library = {"prose": {"train": documents[:1]}, "code": {"train": documents[1:]}}
    monkeypatch.setattr("tinyllama_jax.preparation.library.standard_library", lambda: library)
    config = dataclasses.replace(TINY, vocab_size=280)
    rows_NS = learning.library_rows(config, tmp_path / "tokenizer.model")
    assert rows_NS.shape[1] == config.context + 1 and len(rows_NS) % 128 == 0
    ids = load_tokenizer(tmp_path / "tokenizer.model").encode(documents[0].text)
    np.testing.assert_array_equal(rows_NS[0], ids[: config.context + 1])


def test_batches_hold_every_row_once_an_epoch_in_another_order(tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(30)[:, None] * np.ones(5, np.int32))
    spec = {"folder": str(tmp_path), "steps": 10, "rows": 6, "micro_rows": 3}
    steps_NABS = np.stack(list(learning.batches(spec)))
    assert steps_NABS.shape == (10, 2, 3, 5)
    for epoch in np.split(steps_NABS[..., 0], 2):
        assert sorted(epoch.ravel()) == list(range(30))
    assert (steps_NABS[:5] != steps_NABS[5:]).any()
