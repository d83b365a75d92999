"""Estimates a step's memory without compiling it, and finds the largest micro-batch that fits."""

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
    """The peak with this many rows, or with one row if not even one fits and `rows` is 0."""
    whole_batch: bool
    """Whether the number of rows in a step is the limit, and not memory."""


def planned_dtype(config: Config) -> jnp.dtype:
    """The dtype in which a run multiplies matrices on a GPU.

    The planner cannot ask the devices, as a run does where the config says `auto`: they are not
    here.
    """
    return jnp.dtype(jnp.float32 if config.compute_dtype == "float32" else jnp.bfloat16)


def state_bytes(config: Config, fsdp: int) -> tuple[int, int]:
    """The bytes of weights and of optimizer state on one device.

    Both are fp32. AdamW keeps two moments for each weight.
    """
    weights = 4 * config.model.parameters() // fsdp
    return weights, 2 * weights


def estimated_peak(config: Config, devices: int, fsdp: int) -> int:
    """Estimates the peak memory of a step on one device, in bytes.

    The estimate adds up what the step holds when the last micro-batch's backward pass begins. It
    came within 6 % of the compiled peak in the five cases that LOG.md lists under 2026-11-24.

    Args:
      config: the run.
      devices: the number of devices of the mesh.
      fsdp: the number of devices that share one copy of weights and optimizer state.
    """
    model, execution = config.model, config.execution
    tokens = config.micro_rows / devices * model.context
    item, parameters = planned_dtype(config).itemsize, model.parameters()
    outside = 2 * model.vocab_size * model.width
    layer = (parameters - outside) / model.layers
    products = kept_by_elementwise(model) * item / 2
    # The bytes that each choice keeps for a token and layer until the backward pass.
    kept = {
        "layers": item * model.width,
        "elementwise": products,
        "nothing": products + item * model.swiglu_width,  # and the SwiGLU product
    }[execution.recompute]
    # A layer's backward pass holds about two layers' worth of such arrays while it runs.
    activations = tokens * (model.layers * kept + 2 * products)
    state = sum(state_bytes(config, fsdp))
    if execution.gather == "layer":
        # Each device keeps its part of the weights and gradients in the compute dtype, and of the
        # fp32 sums. Whole weights and gradients exist of one layer at a time, and of embedding and
        # head.
        parts = (2 * item + 4) * parameters / fsdp
        return int(state + parts + 2 * item * (layer + outside) + activations)
    # With one gathering a step, every device holds all weights in the compute dtype, and the fp32
    # sums of all gradients if there are micro-batches to add up.
    whole = item * parameters
    if config.micro_batches > 1:
        whole += 4 * parameters
    # Gradients on their way through the network, in fp32: three times a layer's, and the head's.
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
    """Finds the most rows that fit on a device at once, for each choice of `execution.recompute`.

    Args:
      config: the run.
      devices: the number of devices of the mesh.
      limit: the bytes that a step may take on each device.
      peak: the bytes that a step of `config` as it is takes on each device.
      peak_of: returns the bytes that a step of another config takes. It may compile the step, so it
        is called as rarely as possible, and from several threads.
      estimate: returns a quick guess of the same.
    """
    most = config.batch_rows // devices
    # A step of one micro-batch is compiled, which takes half the time of the real one, and the fp32
    # sums of gradients that several micro-batches need are added.
    sums = 4 * config.model.parameters() if config.micro_batches > 1 else 0

    def search(recompute: Recompute) -> MicroBatch:
        """The largest micro-batch under one choice."""
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
        # `most_rows` has measured the number that it returns, or one row if it returns 0.
        return MicroBatch(recompute, rows, known[max(rows, 1)], rows == most)

    choices = list(RECOMPUTE)
    if config.execution.gather == "layer":
        choices.remove("nothing")  # a config with both is refused
    # The choices are searched in threads, because XLA releases Python's lock while it compiles and
    # keeps only one core busy.
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
    """Finds the most rows whose peak memory is within a limit.

    Memory grows with the rows in nearly a straight line. A binary search would therefore measure
    more often than this one, which measures where the line through the known points meets the
    limit. The peak of the returned number is always measured. That one row more does not fit is
    either measured too, or follows from the line.

    Args:
      peak_of: measures the peak in bytes for a number of rows, which is slow.
      known: the peaks measured so far by number of rows. Measurements made here are added.
      limit: the bytes that the peak may reach.
      most: the largest number of rows that is of interest.
      one_row: a guess of the peak with one row, in bytes.
      a_row: a guess of the bytes that each further row takes.

    Returns:
      The number of rows, from 0 to `most`.
    """
    while True:
        fitting = max((rows for rows, peak in known.items() if peak <= limit), default=0)
        too_many = min((rows for rows, peak in known.items() if peak > limit), default=most + 1)
        if fitting >= most or fitting + 1 >= too_many:
            return min(fitting, most)
        # The line starts at a measured point, if there is one near, or else at the guess for one
        # row. Its slope is a guess until there is a point on either side of the limit.
        nearest = fitting or too_many
        start, peak = (nearest, known[nearest]) if nearest in known else (1, one_row)
        slope = a_row
        if fitting and too_many in known:
            slope = (known[too_many] - known[fitting]) / (too_many - fitting)
        guess = start + int((limit - peak) // slope)
        guess = min(max(guess, fitting, 1), too_many - 1, most)
        if guess == fitting:  # the line says that one row more does not fit
            return fitting
        known[guess] = peak_of(guess)
