"""One optimizer step, and the state it moves."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Config
from tinyllama_jax.errors import require
from tinyllama_jax.model import llama
from tinyllama_jax.model.attention import device_chip, why_not
from tinyllama_jax.performance.program import OPTIMIZER_SCOPE
from tinyllama_jax.runtime.compiler import compiler_options
from tinyllama_jax.runtime.mesh import auto_dtype, batch_sharding, shardings
from tinyllama_jax.training.gradients import make_gradients
from tinyllama_jax.training.optimizer import make_optimizer, make_schedule

State = dict[str, Any]
"""`weights` and `optimizer` (fp32), and three counters: `step`, `skipped` (steps whose loss or
gradient was not finite), `skipped_in_a_row`."""

MAX_SKIPPED_IN_A_ROW = 3


def compute_dtype(config: Config, mesh: Mesh) -> jnp.dtype:
    """The dtype of matrix products."""
    if config.compute_dtype == "auto":
        return auto_dtype(mesh)
    return jnp.dtype(config.compute_dtype)


def check_attention(config: Config, mesh: Mesh) -> None:
    """Raises UserError if the attention backend that the config names cannot do what the run needs.

    It asks the devices of the mesh; `check_attention_on` asks a chip by name.
    """
    with jax.set_mesh(mesh):
        chip = device_chip()
    check_attention_on(config, chip, compute_dtype(config, mesh))


def check_attention_on(config: Config, chip: str, dtype: jnp.dtype) -> None:
    """`check_attention` for a chip that need not be here, by its name in `CHIPS`, or `cpu`."""
    backend = config.execution.attention
    if backend == "auto":
        return
    model, documents = config.model, config.data.mask_documents
    complaint = why_not(backend, chip, dtype, model.head_width, model.context, documents)
    require(
        complaint is None,
        f"execution.attention {backend} {complaint}; auto takes what can do it.",
    )


def state_from_weights(config: Config, weights: llama.Weights) -> State:
    """The state before the first step, with these weights."""
    return {
        "weights": weights,
        "optimizer": make_optimizer(config.optimizer, config.steps).init(weights),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "skipped_in_a_row": jnp.zeros((), jnp.int32),
    }


def abstract_state(config: Config, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state; nothing is allocated."""
    weights = llama.abstract_weights(config.model)
    state = jax.eval_shape(lambda weights: state_from_weights(config, weights), weights)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )


def init_state(config: Config, mesh: Mesh) -> State:
    """A fresh state, made where it lives: the same numbers on every mesh."""

    def init(key):
        return state_from_weights(config, llama.init_weights(config.model, key))

    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(init, out_shardings=where)(jax.random.key(config.seed))


def step(
    state: State,
    tokens_ABS: jax.Array,
    loss_weights_ABT: jax.Array,
    *,
    gradients: Callable[[llama.Weights, jax.Array, jax.Array], tuple[jax.Array, llama.Weights]],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer step: loss -> gradients -> update -> metrics.

    A step whose loss or gradient is not finite leaves weights and optimizer as they were.

    Args:
      state: see `State`.
      tokens_ABS: A micro-batches of B rows of S = T + 1 tokens.
      loss_weights_ABT: how much each of the targets tokens_ABS[..., 1:] counts.
      gradients: what `make_gradients` returns.
      optimizer: what `make_optimizer` returns.
      schedule: the learning rate by updates made.

    Returns:
      The new state, and metrics: `train/loss` in nats a token, `train/grad_norm` before clipping,
      `train/lr`, and the counters of skipped steps.
    """
    weights = state["weights"]
    loss, grads = gradients(weights, tokens_ABS, loss_weights_ABT)
    with jax.named_scope(OPTIMIZER_SCOPE):
        grad_norm = optax.tree.norm(grads)
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], weights)
        updated = optax.apply_updates(weights, updates), optimizer_state

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new_weights, new_optimizer = jax.tree.map(
            lambda old, new: jnp.where(finite, new, old), (weights, state["optimizer"]), updated
        )
    skipped = state["skipped"] + ~finite
    skipped_in_a_row = jnp.where(finite, 0, state["skipped_in_a_row"] + 1)
    new_state = {
        "weights": new_weights,
        "optimizer": new_optimizer,
        "step": state["step"] + 1,
        "skipped": skipped,
        "skipped_in_a_row": skipped_in_a_row,
    }
    metrics = {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/lr": schedule(state["step"] - state["skipped"]),
        "train/skipped": skipped,
        "train/skipped_in_a_row": skipped_in_a_row,
    }
    return new_state, metrics


def make_step(
    config: Config, mesh: Mesh
) -> Callable[[State, jax.Array, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """`step(state, tokens_ABS, loss_weights_ABT)` of a run, compiled; it donates the state."""
    bound = functools.partial(
        step,
        gradients=make_gradients(config, mesh, compute_dtype(config, mesh)),
        optimizer=make_optimizer(config.optimizer, config.steps),
        schedule=make_schedule(config.optimizer, config.steps),
    )
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    rows = batch_sharding(mesh, rows_axis=1)
    return jax.jit(
        bound,
        in_shardings=(state_shardings, rows, rows),
        out_shardings=(state_shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
