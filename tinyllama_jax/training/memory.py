"""What a step takes of a device's memory, estimated without compiling it, and how much fits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from tinyllama_jax.config import Config, ExecutionConfig, LlamaConfig
from tinyllama_jax.model import llama
from tinyllama_jax.model.attention import why_not
from tinyllama_jax.training.roofline import kept_by_elementwise

Recompute = Literal["nothing", "elementwise", "layers"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The most rows a device can take at once under one choice of `execution.recompute`."""

    recompute: str
    rows: int
    peak_bytes_per_device: int
    """With these rows; with one row where not even one fits (`rows` is 0)."""
    whole_batch: bool
    """It is limited by the rows of a step, not by memory."""


def planned_dtype(config: Config) -> jnp.dtype:
    """The dtype of matrix products on a GPU."""
    return jnp.dtype(jnp.float32 if config.compute_dtype == "float32" else jnp.bfloat16)


def state_bytes(config: Config, fsdp: int) -> tuple[int, int]:
    """(weights, optimizer) of a device: fp32, one value a weight and two."""
    weights = 4 * config.model.parameters() // fsdp
    return weights, 2 * weights


def estimated_peak(config: Config, devices: int, fsdp: int) -> int:
    """Peak bytes of a device in bf16 or fp32, by what the step holds when its backward pass begins.

    State / fsdp; the gathered weights and a micro-batch's gradients in the compute dtype; the sum
    of gradients in fp32; what autodiff keeps of each row; one layer's backward pass.
    """
    model, execution = config.model, config.execution
    rows = config.micro_rows / devices
    dtype = planned_dtype(config)
    parameters, item = model.parameters(), dtype.itemsize
    kept = rows * kept_bytes_a_row(model, execution.recompute, dtype)
    kept += rows * model.context * kept_by_elementwise(model) * item / 2
    state = sum(state_bytes(config, fsdp))
    if execution.gather == "layer":
        outside = 2 * model.vocab_size * model.width
        whole = (parameters - outside) / model.layers + outside  # one layer, embedding and head
        parts = (2 * item + 4) * parameters / fsdp
        return int(state + parts + 2 * item * whole + kept)
    weights_and_gradients = 2 * item * parameters
    if config.micro_batches == 1:  # its gradients are cast when no row is kept any more
        return int(state + weights_and_gradients + max(kept, 4 * parameters))
    return int(state + weights_and_gradients + 4 * parameters + kept)


@functools.cache
def kept_bytes_a_row(model: LlamaConfig, recompute: Recompute, dtype: jnp.dtype) -> int:
    """Bytes that the forward pass of a row keeps for its backward pass, as autodiff plans it."""
    backend = "reference" if why_not("pallas", "cpu", dtype, model.head_width, False) else "pallas"
    execution = ExecutionConfig(attention=backend, recompute=recompute)

    def residuals(rows: int) -> int:
        weights = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), llama.abstract_weights(model)
        )
        tokens_BS = jax.ShapeDtypeStruct((rows, model.context + 1), jnp.int32)
        weights_BT = jax.ShapeDtypeStruct((rows, model.context), jnp.float32)

        def backward(weights, tokens_BS, weights_BT):
            def loss(weights):
                return llama.loss(model, weights, tokens_BS, weights_BT, execution)

            return jax.vjp(loss, weights)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, weights, tokens_BS, weights_BT))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    # The difference, because weights are kept too.
    return residuals(2) - residuals(1)


def largest_micro_batches(
    config: Config,
    devices: int,
    limit: int,
    peak: int,
    peak_of: Callable[[Config], int],
    estimate: Callable[[Config], int],
) -> tuple[MicroBatch, ...]:
    """The most rows a device can take at once, for each choice of `execution.recompute`.

    Steps of two micro-batches stand for steps of any number above one: both take the same memory.

    Args:
      config: the run.
      devices: of the mesh.
      limit: bytes of a device that the step may take.
      peak: bytes that the step of `config` itself takes.
      peak_of: the same of any config; called as rarely as possible.
      estimate: a guess of it.
    """
    most = config.batch_rows // devices
    found = []
    for recompute in RECOMPUTE:
        if config.execution.gather == "layer" and recompute == "nothing":
            continue  # which the config refuses
        execution = dataclasses.replace(config.execution, recompute=recompute)

        def trial(rows: int, execution=execution) -> Config:
            return dataclasses.replace(
                config, micro_batches=2, batch_rows=2 * rows * devices, execution=execution
            )

        known = {}
        if recompute == config.execution.recompute and config.micro_batches > 1:
            known[config.micro_rows // devices] = peak
        a_row = estimate(trial(2)) - estimate(trial(1))

        def measure(rows: int, trial=trial) -> int:
            return peak_of(trial(rows))

        rows = most_rows(measure, known, limit, most, estimate(trial(1)), a_row)
        found.append(MicroBatch(recompute, rows, known[max(rows, 1)], rows == most))
    return tuple(found)


def most_rows(
    peak_of: Callable[[int], int],
    known: dict[int, int],
    limit: int,
    most: int,
    one_row: int,
    a_row: int,
) -> int:
    """The most rows, from 0 to `most`, whose peak is within `limit`; memory grows with rows.

    Both that number and the next one are measured; a line through what is known guesses which.

    Args:
      peak_of: measures; slow.
      known: what was measured so far, by rows; gains what is measured here.
      limit: bytes.
      most: rows.
      one_row: guess of the peak with one row.
      a_row: guess of what each further row takes.
    """
    while True:
        fitting = max((rows for rows, peak in known.items() if peak <= limit), default=0)
        too_many = min((rows for rows, peak in known.items() if peak > limit), default=most + 1)
        if fitting >= most or fitting + 1 >= too_many:
            return min(fitting, most)
        nearest = fitting or too_many
        start, peak = (nearest, known[nearest]) if nearest in known else (1, one_row)
        slope = a_row
        if fitting and too_many in known:
            slope = (known[too_many] - known[fitting]) / (too_many - fitting)
        guess = start + int((limit - peak) // slope)
        guess = min(max(guess, fitting + 1), too_many - 1, most)
        known[guess] = peak_of(guess)
