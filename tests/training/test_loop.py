"""Whole runs: what they leave behind, and what they refuse."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from support.paths import GOLDEN
from support.runs import elsewhere, losses
from support.tensorboard_reader import scalars
from tinyllama_jax.config import (
    CheckpointConfig,
    OptimizerConfig,
    to_json,
)
from tinyllama_jax.data.tokenizer import train_tokenizer
from tinyllama_jax.errors import UserError
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh, named_leaves
from tinyllama_jax.training import loop
from tinyllama_jax.training.metrics import read_metrics
from tinyllama_jax.training.step import abstract_state


def test_a_run_leaves_what_its_folder_promises(config, mesh):
    assert loop.run(config, mesh)
    folder = Path(config.run_folder)
    assert json.loads((folder / "config.json").read_text()) == to_json(config)
    assert (folder / "tokenizer.model").read_bytes() == Path(config.data.tokenizer).read_bytes()
    assert json.loads((folder / "environment.json").read_text())["packages"]["jax"]
    assert (folder / "samples" / "0000012.txt").read_text().startswith("The")
    assert Checkpoints(folder).steps() == [9, 12]

    metrics = read_metrics(folder)
    assert sorted(metrics) == list(range(1, 13))
    rows, context = 16 * 12, config.model.context
    last = metrics[12]
    assert last["data/tokens"] == rows * context
    assert last["data/prose/tokens"] == round(0.7 * rows) * context
    assert last["train/lr"] == pytest.approx(1e-3 + 0.5 * 9e-3 * (1 + np.cos(np.pi * 8 / 9)))
    for name in ("val/prose/loss", "val/code/loss", "val/prose/bpb", "val/code/bpb"):
        assert name in metrics[6] and name in last
    for name in ("train/grad_norm", "perf/tokens_per_sec", "perf/tokens_per_sec_per_device"):
        assert np.isfinite(last[name])
    assert last["train/loss"] < metrics[1]["train/loss"] - 1
    board = scalars(folder / "tensorboard")
    for step, values in metrics.items():
        for name, value in values.items():
            assert board[name, step] == pytest.approx(value, rel=1e-6)


def test_the_first_losses_are_those_on_record(config, mesh):
    """A change of the numbers shows here. If it is meant, record the new ones and say why."""
    loop.run(config, mesh)
    recorded = json.loads((GOLDEN / "losses.json").read_text())
    np.testing.assert_allclose(list(losses(config).values()), recorded, rtol=2e-4)


def test_a_run_on_packed_documents_that_are_masked(config, prepared, mesh):
    manifest = prepared("slimpajama", best_fit=config.model.context * 16)
    prose = dataclasses.replace(
        config.data.sources[0], path=str(Path(config.run_folder).parent / "d"), max_epochs=9
    )
    data = dataclasses.replace(config.data, sources=(prose, config.data.sources[1]))
    runs = []
    for name, changes in (("plain", {}), ("masked", {"mask_documents": True}),
                          ("rest", {"first_tokens": False})):  # fmt: skip
        runs.append(elsewhere(config, name, data=dataclasses.replace(data, **changes), steps=4))
        assert loop.run(runs[-1], mesh)
    first = [losses(run)[1] for run in runs]
    assert len(set(first)) == 3 and max(first) - min(first) < 0.1
    newest = Checkpoints(runs[1].run_folder).newest()
    ledger = newest[1]["ledger"]
    assert ledger["data/prose/rows"] + ledger["data/code/rows"] == runs[1].rows_after(4)
    fill = manifest["splits"]["train"]["fill_rate"]
    prose_tokens = ledger["data/prose/rows"] * config.model.context * fill
    assert ledger["data/prose/tokens"] == round(prose_tokens)
    total = ledger["data/tokens"]
    assert abs(ledger["data/prose/tokens"] - 0.7 * total) <= config.model.context
    with pytest.raises(UserError, match="mask_documents: True -> False"):
        loop.run(dataclasses.replace(runs[1], data=data), mesh)
    capped = dataclasses.replace(prose, max_epochs=0.01)
    with pytest.raises(UserError, match="its max_epochs is 0.01"):
        loop.run(
            dataclasses.replace(runs[0], data=dataclasses.replace(data, sources=(capped,))), mesh
        )


def test_a_diverging_run_stops_and_keeps_its_checkpoint(config, mesh):
    wild = OptimizerConfig(peak_lr=1e30, end_lr=0.0, warmup_steps=0, clip_norm=1e30)
    config = dataclasses.replace(config, optimizer=wild, checkpoint=CheckpointConfig(every=1))
    with pytest.raises(loop.Diverged, match="3 steps in a row") as stopped:
        loop.run(config, mesh)
    metrics = read_metrics(config.run_folder)
    first = min(step for step, values in metrics.items() if values["train/skipped"] > 0)
    assert f"up to step {first + 2}:" in str(stopped.value)
    steps = Checkpoints(config.run_folder).steps()
    assert steps and steps[-1] < config.steps
    assert all(np.isfinite(leaf).all() for leaf in restored(config, steps[-1]).values())


def restored(config, step):
    state = abstract_state(config, make_mesh(devices=jax.devices()[:1]))
    return named_leaves(Checkpoints(config.run_folder).restore(step, state))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"optimizer": OptimizerConfig(warmup_steps=1)}, "optimizer.peak_lr"),
    ],
)
def test_a_run_of_another_config_is_refused(config, mesh, fields, words):
    loop.run(config, mesh)
    before = (Path(config.run_folder) / "config.json").read_text()
    with pytest.raises(UserError, match=words):
        loop.run(dataclasses.replace(config, **fields), mesh)
    assert (Path(config.run_folder) / "config.json").read_text() == before


def test_a_run_of_other_data_is_refused(config, mesh, tmp_path):
    loop.run(config, mesh)
    source = config.data.sources[0]
    manifest = Path(source.path) / "manifest.json"
    text = manifest.read_text()
    try:
        manifest.write_text(text.replace('"field": "text"', '"field": "body"'))
        with pytest.raises(UserError, match="trained on other data"):
            loop.run(config, mesh)
    finally:
        manifest.write_text(text)


def test_a_tokenizer_that_the_data_was_not_prepared_with_is_refused(config, mesh, tmp_path):
    other = tmp_path / "other.model"
    train_tokenizer([Path(__file__).read_text()], config.model.vocab_size, other)
    data = dataclasses.replace(config.data, tokenizer=str(other))
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        loop.run(dataclasses.replace(config, data=data), mesh)
    assert not Path(config.run_folder).exists()


def test_a_tokenizer_of_another_size_is_refused(config, mesh):
    model = dataclasses.replace(config.model, vocab_size=500)
    with pytest.raises(UserError, match="400 pieces and model.vocab_size is 500"):
        loop.run(dataclasses.replace(config, model=model), mesh)
    assert not Path(config.run_folder).exists()
