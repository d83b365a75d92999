"""Runs our training step for the benchmarks, as `tinyllama train` does, on one device."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import running
from tinyllama_jax.config import Config, DataConfig, ExecutionConfig, LlamaConfig, OptimizerConfig
from tinyllama_jax.data.boundaries import loss_weights
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.runtime.allocator import keep_memory
from tinyllama_jax.runtime.compiler import keep_programs
from tinyllama_jax.runtime.mesh import make_mesh, put_batch
from tinyllama_jax.training.step import (
    State,
    abstract_state,
    init_state,
    make_step,
    state_from_weights,
)


class Trained(NamedTuple):
    """The measurements of a training run, and its last state."""

    result: dict[str, Any]
    """`seconds` and `losses` of each step, `compile_seconds`, `first_step_seconds` (from the start
    of the process to the end of the first step), and `peak_bytes`, None if the device does not
    report it."""
    state: State
    program: jax.stages.Compiled


def config_of(spec: dict[str, Any], optimizer: OptimizerConfig, steps: int) -> Config:
    """The run that a `running.Spec` asks for, with the learning rates of a run of `steps` steps."""
    execution = dict(spec["options"])
    if running.REHEARSED:
        execution["attention"] = "reference"  # the one that every device has
    return Config(
        run_folder="",
        model=LlamaConfig(**spec["model"]),
        data=DataConfig(),
        steps=steps,
        batch_rows=spec["rows"],
        micro_batches=spec["rows"] // spec["micro_rows"],
        compute_dtype=spec["precision"],
        optimizer=optimizer,
        execution=ExecutionConfig(**execution),
    )


def train(
    config: Config, batches: Iterable[np.ndarray], begun: float, weights: Weights | None = None
) -> Trained:
    """Trains for one step on each batch; a step is timed from an idle device to an idle device.

    Args:
      config: the run.
      batches: tokens (A, B, S) of each step, at least one.
      begun: time.time() at which the process was started.
      weights: initial weights, as `init_weights` gives them; by default those of `config.seed`.
    """
    keep_memory()
    mesh, seconds, losses = make_mesh(devices=jax.devices()[:1]), [], []
    keep_programs(mesh)
    program, compile_seconds, first = None, 0.0, 0.0
    with jax.set_mesh(mesh):
        if weights is None:
            state = init_state(config, mesh)
        else:
            where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
            start = jax.jit(lambda w: state_from_weights(config, w), out_shardings=where)
            state = start(jax.tree.map(np.asarray, weights))
        step = make_step(config, mesh)
        for tokens_ABS in batches:
            batch = put_batch(tokens_ABS, mesh, 1), put_batch(loss_weights(tokens_ABS), mesh, 1)
            jax.block_until_ready((state, batch))
            if program is None:
                before = time.perf_counter()
                program = step.lower(state, *batch).compile()
                compile_seconds = time.perf_counter() - before
            before = time.perf_counter()
            state, metrics = program(state, *batch)
            losses.append(float(jax.block_until_ready((state, metrics))[1]["train/loss"]))
            seconds.append(time.perf_counter() - before)
            first = first or time.time() - begun
    assert program is not None
    stats = running.if_known("memory in use", jax.devices()[0].memory_stats) or {}
    result = {
        "seconds": seconds,
        "losses": losses,
        "first_step_seconds": first,
        "compile_seconds": compile_seconds,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }
    return Trained(result, state, program)
