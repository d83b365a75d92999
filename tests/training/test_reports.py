"""What a run says about itself: which steps it logs, how fast it was, what it is compared with."""

import dataclasses
import itertools
import re
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tinyllama_jax.config import (
    BatchStageConfig,
    CheckpointConfig,
    SampleConfig,
    ValidationConfig,
)
from tinyllama_jax.data.boundaries import loss_weights
from tinyllama_jax.data.rows import Rows
from tinyllama_jax.data.tokenizer import load_tokenizer
from tinyllama_jax.evaluation.held_out import bigram_loss, gzip_bits_per_byte, unigram_entropy
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh
from tinyllama_jax.training import loop
from tinyllama_jax.training.metrics import Metrics, read_metrics


def test_a_run_reports_the_first_step_the_last_and_every_few_between(config, mesh):
    config = dataclasses.replace(
        config,
        log_every=5,
        validation=ValidationConfig(every=4, rows=8),
        sample=SampleConfig(every=5, prompts=("The", "def"), max_tokens=4),
    )
    assert loop.run(config, mesh)
    metrics = read_metrics(config.run_folder)

    def steps_with(name):
        return [step for step, values in metrics.items() if name in values]

    assert steps_with("train/loss") == steps_with("perf/tokens_per_sec") == [1, 5, 10, 12]
    assert steps_with("val/prose/loss") == steps_with("val/code/bpb") == [4, 8, 12]
    samples = sorted((Path(config.run_folder) / "samples").iterdir())
    assert [path.name for path in samples] == ["0000005.txt", "0000010.txt", "0000012.txt"]
    for path in samples:
        first, second = path.read_text().split("\n---\n")
        assert first.startswith("The") and second.startswith("def")


def test_speed_and_time_left_count_training_alone(config, monkeypatch, capsys):
    """On a clock that stands still but for 30 s a step and 100 s a line of validation."""
    config = dataclasses.replace(
        config,
        log_every=2,
        batch_stages=(BatchStageConfig(8, 1),),  # the later steps read half as many rows
        checkpoint=CheckpointConfig(every=100),
        validation=ValidationConfig(every=6, rows=8),
    )
    now, validating, logged = 0.0, 0.0, {}
    poll, write = Checkpoints.poll, Metrics.write

    def clock():
        nonlocal now
        now += 1e-6  # no two looks at the same time, or a speed could be infinite
        return now

    def poll_after_a_step(checkpoints):
        nonlocal now
        now += 30.0
        poll(checkpoints)

    def write_and_note(metrics, step, values):
        nonlocal now, validating
        if "train/loss" in values:
            logged[step] = now - validating
        else:
            now, validating = now + 100.0, validating + 100.0
        write(metrics, step, values)

    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(Checkpoints, "poll", poll_after_a_step)
    monkeypatch.setattr(Metrics, "write", write_and_note)
    assert loop.run(config, make_mesh(devices=jax.devices()[:2]))
    monkeypatch.undo()

    metrics, steps = read_metrics(config.run_folder), [1, 2, 4, 6, 8, 10, 12]
    assert sorted(logged) == steps and validating >= 200
    for before, step in itertools.pairwise(steps):
        rows = config.rows_after(step) - config.rows_after(before)
        speed = rows * config.model.context / (logged[step] - logged[before])
        assert metrics[step]["perf/tokens_per_sec"] == pytest.approx(speed, rel=1e-3), step
        each = metrics[step]["perf/tokens_per_sec_per_device"]
        assert each == pytest.approx(speed / 2, rel=1e-3)

    line = r"^step (\d+)/12  loss .* ([\d,]+) tokens/s .*?(?:eta (\d+):(\d\d))?$"
    lines = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step, *_ in lines] == steps
    for step, speed, minutes, seconds in lines:
        step = int(step)
        shown = float(speed.replace(",", ""))
        assert shown == pytest.approx(metrics[step]["perf/tokens_per_sec"], abs=0.51)
        if step == 1:  # its time is mostly compilation, which tells nothing of the steps to come
            assert not minutes
            continue
        first, read, all_rows = (config.rows_after(at) for at in (1, step, config.steps))
        left = (logged[step] - logged[1]) / (read - first) * (all_rows - read)
        assert 60 * int(minutes) + int(seconds) == pytest.approx(left, abs=1.01), step


def test_the_last_table_sets_the_model_beside_simple_ones(config, mesh, capsys):
    """Every column under its own name, the bigrams counted on all training rows."""
    assert loop.run(config, mesh)
    said = capsys.readouterr().out.splitlines()
    head = next(line for line in said if "unigram" in line)
    names = [cell.strip() for cell in head.strip("┃").split("┃")]
    last = read_metrics(config.run_folder)[config.steps]
    tokenizer = load_tokenizer(config.data.tokenizer)
    for source in config.data.sources:
        line = next(line for line in said if line.startswith(f"│ {source.name} "))
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        shown = dict(zip(names, cells, strict=True))
        train, unseen = (
            Rows(source.path, split, config.model.context, config.model.vocab_size)
            for split in ("train", "validation")
        )
        train_BS, unseen_BS = (np.stack([rows[i] for i in range(len(rows))])
                               for rows in (train, unseen))  # fmt: skip
        targets = unseen_BS[:, 1:][loss_weights(unseen_BS) > 0]
        vocab_size = config.model.vocab_size
        assert shown["tokens"] == f"{len(targets):,}"
        for name, value in {
            "loss": last[f"val/{source.name}/loss"],
            "unigram": unigram_entropy(targets, vocab_size),
            "bigram": bigram_loss(train_BS, unseen_BS, vocab_size),
            "bits/byte": last[f"val/{source.name}/bpb"],
        }.items():
            assert shown[name] == f"{value:.3f}", name
        few = bigram_loss(train_BS[:3], unseen_BS, vocab_size)
        assert float(shown["bigram"]) < few - 0.1, "three rows would tell less"
        text = tokenizer.decode(unseen_BS[:, 1:].ravel().tolist())
        assert shown["gzip -9"] == f"{gzip_bits_per_byte(text.encode()):.3f}"
