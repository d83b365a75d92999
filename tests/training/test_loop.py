"""Whole runs: what they leave behind, and that stopping one changes nothing."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from support.paths import GOLDEN
from support.runs import assert_same_run, config_file, elsewhere, losses, stop_at
from support.tensorboard_reader import scalars
from tinyllama_jax.config import (
    BatchStageConfig,
    CheckpointConfig,
    OptimizerConfig,
    ValidationConfig,
    to_json,
)
from tinyllama_jax.data.tokenizer import train_tokenizer
from tinyllama_jax.errors import UserError
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh, named_leaves, put_batch
from tinyllama_jax.training import loop
from tinyllama_jax.training.inputs import batches_after, open_inputs
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


def test_a_run_stopped_at_random_steps_is_bitwise_the_unbroken_one(config, monkeypatch):
    unbroken, broken = elsewhere(config, "unbroken"), elsewhere(config, "broken")
    assert loop.run(unbroken)
    for step in sorted(random.Random(0).sample(range(1, config.steps - 1), 3)):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert not loop.run(broken)
        # The signal came while the next step was under way, which is finished and saved.
        assert step <= Checkpoints(broken.run_folder).steps()[-1] <= step + 2
    assert loop.run(broken)
    assert_same_run(unbroken, broken)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_killed_at_random_moments_is_bitwise_the_unbroken_one(config, tmp_path):
    # Many more steps than five kills use up, or a fast machine would finish before the last.
    config = dataclasses.replace(
        config,
        steps=120,
        checkpoint=CheckpointConfig(every=4, keep=2),
        validation=ValidationConfig(every=60, rows=8),
    )
    unbroken, broken = elsewhere(config, "unbroken"), elsewhere(config, "broken")
    assert loop.run(unbroken)
    command = [sys.executable, "-m", "tinyllama_jax.cli", "train"]
    command.append(config_file(broken, tmp_path / "config.py"))
    metrics, rng = Path(broken.run_folder) / "metrics.jsonl", random.Random(1)
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        while not metrics.exists() or metrics.read_text().count("\n") < lines + 3:
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(unbroken, broken)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_a_run_moves_from_one_device_to_eight_and_back(config, monkeypatch, dtype, tolerance):
    config = dataclasses.replace(config, compute_dtype=dtype)
    alone, moved = elsewhere(config, "alone"), elsewhere(config, "moved")
    one, eight = make_mesh(devices=jax.devices()[:1]), make_mesh()
    assert loop.run(alone, one)
    for mesh, step in [(one, 3), (eight, 7)]:
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert not loop.run(moved, mesh)
    assert loop.run(moved, one)
    a, b = losses(alone), losses(moved)
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=tolerance)


def test_a_run_goes_on_across_a_change_of_the_batch_size(config, monkeypatch, mesh):
    # Steps 6 to 9 are three times as large as those before, the rest half.
    stages = (BatchStageConfig(5, 6), BatchStageConfig(9, 1))
    config = dataclasses.replace(config, batch_stages=stages)
    unbroken, broken = elsewhere(config, "unbroken"), elsewhere(config, "broken")
    read = []

    def count(batch, *place, **options):
        read.append(batch.shape[:2])
        return put_batch(batch, *place, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", count)
        assert loop.run(unbroken, mesh)
    shapes = read[::2]  # the tokens, without the loss weights
    assert shapes == [(2, 8)] * 5 + [(6, 8)] * 4 + [(1, 8)] * 3
    context, rows = config.model.context, np.cumsum([a * b for a, b in shapes])
    for step, values in read_metrics(unbroken.run_folder).items():
        assert values["data/tokens"] == rows[step - 1] * context
        assert values["data/tokens"] == sum(
            values[f"data/{source.name}/tokens"] for source in config.data.sources
        )
    checkpoint = Checkpoints(unbroken.run_folder).newest()
    assert checkpoint is not None and checkpoint[1]["rows"] == rows[-1] == config.rows_after(12)
    for step in (3, 4, 7):  # stopped before, at and after the change
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert not loop.run(broken, mesh)
    assert loop.run(broken, mesh)
    assert_same_run(unbroken, broken)
    # The learning rate is that of equal batches.
    plain = elsewhere(config, "plain", batch_stages=())
    assert loop.run(plain, mesh)
    lr = [
        {step: values["train/lr"] for step, values in read_metrics(run.run_folder).items()}
        for run in (plain, unbroken)
    ]
    assert lr[0] == lr[1] and losses(plain)[5] == losses(unbroken)[5]
    assert losses(plain)[7] != losses(unbroken)[7]


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


def test_a_larger_batch_reads_the_rows_that_follow(config, mesh):
    """The order does not know the batch size: whatever the stages, the same rows in a row."""
    inputs = open_inputs(config, mesh)
    staged = dataclasses.replace(config, batch_stages=(BatchStageConfig(3, 5),))
    even, uneven = (
        np.concatenate([b.reshape(-1, b.shape[-1]) for b in batches_after(0, run, inputs)])
        for run in (config, staged)
    )
    np.testing.assert_array_equal(even, uneven[: len(even)])
    assert len(uneven) == staged.rows_after(config.steps) > len(even)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(config, monkeypatch):
    unbroken, broken = elsewhere(config, "unbroken"), elsewhere(config, "broken")
    assert loop.run(unbroken) and loop.run(broken)
    folder = Path(broken.run_folder)
    (folder / "checkpoints" / "12" / "sha256.json").write_text("{")
    assert loop.run(broken)
    assert_same_run(unbroken, broken)
    assert Checkpoints(folder).newest()[0] == 12
    assert (folder / "damaged" / "12").is_dir()


def test_a_signal_between_two_looks_loses_no_metrics(config, mesh, monkeypatch):
    def poll(checkpoints):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "poll", poll)
    assert not loop.run(config, mesh)
    assert sorted(losses(config)) == Checkpoints(config.run_folder).steps() == [1]


def test_a_run_stopped_at_its_very_last_step_still_validates(config, mesh, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, config.steps)
        assert not loop.run(config, mesh)
    assert "val/prose/loss" not in read_metrics(config.run_folder)[config.steps]
    assert loop.run(config, mesh)
    assert "val/code/bpb" in read_metrics(config.run_folder)[config.steps]


def test_a_finished_run_is_left_alone(config, mesh, capsys):
    assert loop.run(config, mesh)
    before = losses(config)
    capsys.readouterr()
    assert loop.run(config, mesh)
    assert "nothing is left to train" in capsys.readouterr().out
    assert losses(config) == before


def test_a_run_begun_anew_owes_nothing_to_the_one_before_it(config, mesh):
    fresh, used = elsewhere(config, "fresh", seed=1), elsewhere(config, "used", seed=1)
    loop.run(dataclasses.replace(used, seed=0, steps=15), mesh)
    shutil.rmtree(Path(used.run_folder) / "checkpoints")
    (Path(used.run_folder) / "tokenizer.model").write_text("of other data")
    assert loop.run(fresh, mesh) and loop.run(used, mesh)
    assert_same_run(fresh, used)
    found = [read_metrics(config.run_folder)[12]["val/code/loss"] for config in (fresh, used)]
    assert found[0] == found[1]
    wanted = Path(config.data.tokenizer).read_bytes()
    assert (Path(used.run_folder) / "tokenizer.model").read_bytes() == wanted


def test_a_diverging_run_stops_and_keeps_its_checkpoint(config, mesh):
    wild = OptimizerConfig(peak_lr=1e30, end_lr=0.0, warmup_steps=0, clip_norm=1e30)
    config = dataclasses.replace(config, optimizer=wild, checkpoint=CheckpointConfig(every=1))
    with pytest.raises(loop.Diverged, match="3 steps in a row"):
        loop.run(config, mesh)
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


def test_more_steps_lengthen_a_run_and_fewer_leave_it_alone(config, mesh, capsys):
    loop.run(config, mesh)
    assert loop.run(dataclasses.replace(config, steps=15), mesh)
    assert "steps: 12 -> 15" in capsys.readouterr().out
    metrics = read_metrics(config.run_folder)
    assert sorted(metrics) == list(range(1, 16))
    assert metrics[15]["train/lr"] < metrics[13]["train/lr"] < metrics[4]["train/lr"]
    assert loop.run(dataclasses.replace(config, steps=9), mesh)
    assert "at step 15, past the 9 steps" in capsys.readouterr().out
    assert json.loads((Path(config.run_folder) / "config.json").read_text())["steps"] == 15
    assert Checkpoints(config.run_folder).steps()[-1] == 15


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
