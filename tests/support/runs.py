"""Runs, and how two of them are compared."""

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tinyllama_jax.cli import main
from tinyllama_jax.config import Config
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh, named_leaves
from tinyllama_jax.training.metrics import Metrics, read_metrics
from tinyllama_jax.training.step import abstract_state


def losses(config: Config) -> dict[int, float]:
    """The training loss of each step that a run logged."""
    found = read_metrics(config.run_folder)
    return {step: values["train/loss"] for step, values in found.items() if "train/loss" in values}


def final_state(config: Config) -> dict[str, np.ndarray]:
    """All arrays of a run's last checkpoint, by name."""
    mesh = make_mesh(devices=jax.devices()[:1])
    checkpoints = Checkpoints(config.run_folder)
    state = checkpoints.restore(config.steps, abstract_state(config, mesh))
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def assert_same_run(config: Config, other: Config) -> None:
    """Two runs logged every step with the same losses and ended in the same bits."""
    assert losses(config) == losses(other)
    assert sorted(losses(config)) == list(range(1, config.steps + 1))
    a, b = final_state(config), final_state(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def elsewhere(config: Config, name: str, **fields: Any) -> Config:
    """The run in a folder beside its own, with some fields changed."""
    folder = str(Path(config.run_folder).with_name(name))
    return dataclasses.replace(config, run_folder=folder, **fields)


def config_file(config: Config, path: Path) -> str:
    """Writes a config file for the command line, and returns its path."""
    path.write_text(
        f"from tinyllama_jax.config import *\n\ndef get_config():\n    return {config!r}\n"
    )
    return str(path)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends SIGTERM as soon as the metrics of a step are written."""
    write = Metrics.write

    def write_and_signal(self, at, values):
        write(self, at, values)
        if at == step and "train/loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "write", write_and_signal)


def exit_code(argv: Sequence[object]) -> Any:
    """What the command line leaves with."""
    try:
        return main([str(arg) for arg in argv])
    except SystemExit as stop:  # tyro's own
        return stop.code


def weights_of(config: Config, folder: Path, step: int, mesh: Mesh) -> dict[str, np.ndarray]:
    """The weights of a checkpoint, by name."""
    found = Checkpoints(folder).restore(step, abstract_state(config, mesh))["weights"]
    return {name: np.asarray(leaf) for name, leaf in named_leaves(found).items()}
