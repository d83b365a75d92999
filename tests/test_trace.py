"""The profiler over some steps of a run."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

from test_loop import losses, stop_at
from tinyllama_jax.config import BatchStageConfig, UserError
from tinyllama_jax.training import loop
from tinyllama_jax.training.trace import parse_steps


def test_a_traced_run_says_where_its_steps_went_and_is_the_same_run(
    config, mesh, monkeypatch, capsys
):
    """Steps 5 to 8; validation and a checkpoint after step 6 are no part of them."""
    evaluate, pauses = loop.evaluate.evaluate, iter([4])

    def slow_at_first(*args):
        time.sleep(next(pauses, 0))
        return evaluate(*args)

    monkeypatch.setattr(loop.evaluate, "evaluate", slow_at_first)
    assert loop.run(config, mesh, "5:9")
    folder = Path(config.run_folder) / "profile"
    found = json.loads((folder / "breakdown.json").read_text())
    assert (found["first_step"], found["steps"], found["device"]) == (5, 4, "cpu")
    seconds = {row["kind"]: row["seconds"] for row in found["rows"]}
    assert sum(seconds.values()) == pytest.approx(found["step_seconds"])
    assert found["step_seconds"] < 1, "the pause would add a second to each"
    for kind in ("matmul", "attention", "memory", "optimizer", "idle"):
        assert seconds[kind] > 0, kind
    assert {row["roofline_seconds"] for row in found["rows"]} == {None}
    table = (folder / "breakdown.txt").read_text()
    assert (
        "cpu, steps 5 to 8" in table and table.splitlines()[3].rstrip() in capsys.readouterr().out
    )
    assert (folder / "breakdown.png").stat().st_size > 10_000
    assert len(list((folder / "plugins" / "profile").glob("*/*.xplane.pb"))) == 1  # TensorBoard's
    assert not list(Path(config.run_folder).glob(".profile*"))

    other = dataclasses.replace(config, run_folder=config.run_folder + "-untraced")
    assert loop.run(other, mesh)
    assert losses(config) == losses(other)


def test_a_cut_trace_leaves_nothing_and_the_same_command_goes_on(config, mesh, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert not loop.run(config, mesh, "5:11")
    assert not list(Path(config.run_folder).glob("*profile*"))
    assert "The same command again goes on" in capsys.readouterr().out
    assert loop.run(config, mesh, "5:11")
    out = capsys.readouterr().out
    assert "NOTHING IS TRACED: --profile 5:11 begins before step" in out and "later range" in out
    assert not (Path(config.run_folder) / "profile").exists()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("5", "give START:STOP"),
        ("5:", "give START:STOP"),
        ("-2:3", "give START:STOP"),
        ("7:7", "give START:STOP"),
        ("9:4", "give START:STOP"),
        ("9:14", "the run with step 12"),
        ("1:3", "begin at step 2"),
        ("5:9", "begin at step 8"),
    ],
)
def test_a_mistaken_range_costs_one_sentence_and_nothing_on_disk(config, mesh, asked, words):
    config = dataclasses.replace(config, batch_stages=(BatchStageConfig(6, 4),))
    with pytest.raises(UserError, match=words):
        loop.run(config, mesh, asked)
    assert not Path(config.run_folder).exists()


def test_ranges_up_to_the_last_step_are_taken(config):
    assert parse_steps(None, config) == range(0)
    assert parse_steps("2:13", config) == range(2, 13)
