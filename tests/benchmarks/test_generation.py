"""Generation is compared with that of transformers."""

import json

import pytest

from benchmarks import generation


@pytest.mark.torch
def test_generation_is_compared_with_transformers(tmp_path, capsys, monkeypatch):
    options = generation.Options(quick=True, batch=(1, 3), out=tmp_path / "table")
    assert generation.main(options) == 0
    assert "NOTHING about any device" in capsys.readouterr().out
    result = json.loads((tmp_path / "table.json").read_text())
    turns = [(turn["batch"], turn["side"]) for turn in result["turns"]]
    assert turns == [(b, s) for b in (1, 3) for s in ("ours", "transformers", "ours")]
    for turn in result["turns"]:
        assert 0 < turn["first_seconds"] < turn["seconds"] and turn["same_tokens"] == 1
        assert turn["tokens_per_s"] == turn["batch"] * turn["new"] / turn["seconds"]
    table = (tmp_path / "table.md").read_text()
    assert table.count("| ours |") == 4 and table.count("100.0%") == 6
    assert "tiny at batch 1 " in table and "tiny at batch 3 " in table

    # A side that fails costs nothing of the other.
    def out_of_memory(*_):
        raise RuntimeError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setitem(generation.SIDES, "transformers", out_of_memory)
        options = generation.Options(quick=True, batch=(1,), out=tmp_path / "half")
        assert generation.main(options) == 1
    turns = json.loads((tmp_path / "half.json").read_text())["turns"]
    assert [turn.get("failure", "") for turn in turns] == [
        "",
        "RuntimeError: CUDA out of memory.",
        "",
    ]
    assert turns[0]["tokens_per_s"] > 0 and "ids" not in turns[0]
    assert "tiny at batch 1 NOT COMPARED" in (tmp_path / "half.md").read_text()

    # Another text ends in exit code 1.
    monkeypatch.setattr(generation, "save_random", lambda config, folder: None)
    for last, side in enumerate(generation.SIDES):
        made = [generation.timed(1, 0, lambda ids=last: (1.0, 2.0, [[7, ids]]))]
        monkeypatch.setitem(generation.SIDES, side, lambda *_, made=made: list(map(dict, made)))
    assert generation.main(generation.Options(quick=True, batch=(1,))) == 1
    assert "The texts differ" in capsys.readouterr().err
