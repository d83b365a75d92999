"""Generation is compared with that of transformers."""

import json

import pytest

from benchmarks import generation


@pytest.mark.torch
def test_generation_is_compared_with_transformers(tmp_path, capsys):
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


@pytest.fixture
def give(monkeypatch):
    """Makes a side give these new tokens instead of generating any, or raise an error."""
    monkeypatch.setattr(generation, "save_random", lambda config, folder: None)

    def call(side, tokens):
        def turn(*_):
            if isinstance(tokens, Exception):
                raise tokens
            return [generation.timed(1, 0, lambda: (1.0, 2.0, [tokens]))]

        monkeypatch.setitem(generation.SIDES, side, turn)

    return call


def test_a_side_that_fails_costs_nothing_of_the_other(give, tmp_path):
    give("ours", [7, 8])
    give("transformers", RuntimeError("CUDA out of memory."))
    options = generation.Options(quick=True, batch=(1,), out=tmp_path / "table")
    assert generation.main(options) == 1
    turns = json.loads((tmp_path / "table.json").read_text())["turns"]
    failures = [turn.get("failure") for turn in turns]
    assert failures == [None, "RuntimeError: CUDA out of memory.", None]
    assert turns[0]["tokens_per_s"] > 0 and "ids" not in turns[0]
    assert "tiny at batch 1 NOT COMPARED" in (tmp_path / "table.md").read_text()


def test_other_texts_in_fp32_are_an_error(give, capsys):
    give("ours", [7, 8])
    give("transformers", [7, 8])
    assert generation.main(generation.Options(quick=True, batch=(1,))) == 0
    give("transformers", [7, 9])
    assert generation.main(generation.Options(quick=True, batch=(1,))) == 1
    assert "The texts differ" in capsys.readouterr().err
