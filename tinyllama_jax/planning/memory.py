"""What a step takes of a device's memory, estimated without compiling it, and how much fits."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import jax.numpy as jnp

from tinyllama_jax.config import Config
from tinyllama_jax.performance.roofline import kept_by_elementwise

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
    """Peak bytes of a device, by what the step holds when the last backward pass begins.

    State / fsdp; the whole weights in the compute dtype; fp32 sums of gradients, where there are
    other micro-batches; what is kept of each row; two layers' worth of a backward pass; a layer's
    gradients on their way out, and the head's.
    """
    model, execution = config.model, config.execution
    tokens = config.micro_rows / devices * model.context
    item, parameters = planned_dtype(config).itemsize, model.parameters()
    outside = 2 * model.vocab_size * model.width
    layer = (parameters - outside) / model.layers
    products = kept_by_elementwise(model) * item / 2
    kept = {
        "layers": item * model.width,
        "elementwise": products,
        "nothing": products + item * model.swiglu_width,  # and the SwiGLU product
    }[execution.recompute]
    activations = tokens * (model.layers * kept + 2 * products)
    state = sum(state_bytes(config, fsdp))
    if execution.gather == "layer":
        parts = (2 * item + 4) * parameters / fsdp
        return int(state + parts + 2 * item * (layer + outside) + activations)
    whole = item * parameters
    if config.micro_batches > 1:
        whole += 4 * parameters
    leaving = 3 * 4 * layer + 2 * outside
    return int(state + whole + activations + leaving)


def largest_micro_batches(
    config: Config,
    devices: int,
    limit: int,
    peak: int,
    peak_of: Callable[[Config], int],
    estimate: Callable[[Config], int],
) -> tuple[MicroBatch, ...]:
    """The most rows a device can take at once, for each choice of `execution.recompute`.

    A step of one micro-batch stands for any, since it compiles in half the time, and the sums of
    gradients that several need are added.

    Args:
      config: the run.
      devices: of the mesh.
      limit: bytes of a device that the step may take.
      peak: bytes that the step of `config` itself takes.
      peak_of: the same of any config; called as rarely as possible.
      estimate: a guess of it.
    """
    most = config.batch_rows // devices
    sums = 4 * config.model.parameters() if config.micro_batches > 1 else 0

    def search(recompute: Recompute) -> MicroBatch:
        execution = dataclasses.replace(config.execution, recompute=recompute)

        def trial(rows: int) -> Config:
            return dataclasses.replace(
                config,
                micro_batches=1,
                batch_rows=rows * devices,
                batch_stages=(),
                execution=execution,
            )

        known = {}
        if recompute == config.execution.recompute and config.micro_batches > 1:
            known[config.micro_rows // devices] = peak
        one_row = estimate(trial(1)) + sums
        a_row = estimate(trial(2)) + sums - one_row
        rows = most_rows(
            lambda rows: peak_of(trial(rows)) + sums, known, limit, most, one_row, a_row
        )
        return MicroBatch(recompute, rows, known[max(rows, 1)], rows == most)

    choices = list(RECOMPUTE)
    if config.execution.gather == "layer":
        choices.remove("nothing")  # which the config refuses
    # Side by side: a compiler leaves Python alone, and keeps one core busy.
    with ThreadPoolExecutor() as threads:
        return tuple(threads.map(search, choices))


def most_rows(
    peak_of: Callable[[int], int],
    known: dict[int, int],
    limit: int,
    most: int,
    one_row: int,
    a_row: int,
) -> int:
    """The most rows, from 0 to `most`, whose peak is within `limit`; memory grows with rows.

    That number is measured; that one row more is too many is measured as well, or read off a line
    through it.

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
        guess = min(max(guess, fitting, 1), too_many - 1, most)
        if guess == fitting:
            return fitting
        known[guess] = peak_of(guess)
