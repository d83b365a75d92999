"""Runs that are stopped, killed, moved, lengthened or begun anew: it changes nothing."""

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

from support.runs import assert_same_run, config_file, elsewhere, losses, stop_at
from tinyllama_jax.config import (
    BatchStageConfig,
    CheckpointConfig,
    ValidationConfig,
    to_json,
)
from tinyllama_jax.config_file import with_defaults
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh, put_batch
from tinyllama_jax.training import loop
from tinyllama_jax.training.metrics import read_metrics

pytestmark = pytest.mark.long


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


def test_a_run_moves_from_one_device_to_eight_and_back(config, monkeypatch):
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
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


def test_a_run_goes_on_across_a_change_of_the_batch_size(config, monkeypatch, mesh):
    # Steps 6 to 9 are three times as large as those before, the rest half.
    stages = (BatchStageConfig(5, 6), BatchStageConfig(9, 1))
    config = dataclasses.replace(config, batch_stages=stages)
    unbroken, broken = elsewhere(config, "unbroken"), elsewhere(config, "broken")
    batches = []

    def keep(batch, *place, **options):
        batches.append(batch)
        return put_batch(batch, *place, **options)

    def run_and_read(config):
        batches.clear()
        with monkeypatch.context() as patch:
            patch.setattr(loop, "put_batch", keep)
            assert loop.run(config, mesh)
        return batches[::2]  # the tokens, without the loss weights

    tokens_ABS = run_and_read(unbroken)
    shapes = [batch.shape[:2] for batch in tokens_ABS]
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
    # The order does not know the batch size: whatever the stages, the same rows in a row.
    plain = elsewhere(config, "plain", batch_stages=())
    uneven, even = (
        np.concatenate([batch.reshape(-1, batch.shape[-1]) for batch in run])
        for run in (tokens_ABS, run_and_read(plain))
    )
    np.testing.assert_array_equal(uneven[: len(even)], even)
    assert len(uneven) == config.rows_after(config.steps) > len(even)
    # The learning rate is that of equal batches.
    lr = [
        {step: values["train/lr"] for step, values in read_metrics(run.run_folder).items()}
        for run in (plain, unbroken)
    ]
    assert lr[0] == lr[1] and losses(plain)[5] == losses(unbroken)[5]
    assert losses(plain)[7] != losses(unbroken)[7]


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


def test_an_end_is_reached_when_all_of_it_is_done(config, mesh, monkeypatch, capsys):
    """A run that failed past step 6, and whose last step is now the sixth, has not ended there."""
    config = dataclasses.replace(config, validation=ValidationConfig(every=3, rows=8))
    due_after = loop.due_after

    def fail(step, config):
        if step == 7:
            raise OSError("no such disk")
        return due_after(step, config)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(loop, "due_after", fail)
        loop.run(config, mesh)
    on_the_way = read_metrics(config.run_folder)[6]["val/prose/loss"]
    shorter = dataclasses.replace(config, steps=6)
    assert loop.run(shorter, mesh)
    assert "nothing is left to train" not in capsys.readouterr().out
    assert read_metrics(config.run_folder)[6]["val/prose/loss"] != on_the_way, "over all rows now"
    assert (Path(config.run_folder) / "samples" / "0000006.txt").exists()
    assert loop.run(shorter, mesh)
    assert "nothing is left to train" in capsys.readouterr().out


def test_a_run_begun_anew_makes_its_end_anew(config, mesh, capsys):
    assert loop.run(config, mesh)
    shutil.rmtree(Path(config.run_folder) / "checkpoints")
    shutil.rmtree(Path(config.run_folder) / "samples")
    assert loop.run(config, mesh)
    assert "nothing is left to train" not in capsys.readouterr().out
    assert (Path(config.run_folder) / "samples" / "0000012.txt").exists()


def test_a_run_begun_with_an_option_that_is_gone_goes_on(config):
    saved = to_json(config)
    saved["execution"]["unroll_layers"] = True
    assert with_defaults(saved, config) == to_json(config)
