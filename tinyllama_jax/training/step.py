"""One optimizer step, and the state it moves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Config, require
from tinyllama_jax.model import llama
from tinyllama_jax.model.attention import device_chip, why_not
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.runtime.mesh import (
    BATCH_AXES,
    batch_sharding,
    gather_axis,
    named_leaves,
    shardings,
)
from tinyllama_jax.training.optimizer import make_optimizer, make_schedule

State = dict[str, Any]
"""`weights` and `optimizer` (fp32), and three counters: `step`, `skipped` (steps whose loss or
gradient was not finite), `skipped_in_a_row`."""

MAX_SKIPPED_IN_A_ROW = 3


def compute_dtype(config: Config, mesh: Mesh) -> jnp.dtype:
    """The dtype of matrix products; on CPU bf16 is slower than fp32."""
    if config.compute_dtype == "auto":
        # Of the mesh's devices, which need not be here.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        return jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def check_attention(config: Config, mesh: Mesh) -> None:
    """Raises UserError if the backend that the config names cannot do what the run needs of it."""
    backend = config.execution.attention
    if backend == "auto":
        return
    with jax.set_mesh(mesh):
        chip = device_chip()
    dtype, width = compute_dtype(config, mesh), config.model.head_width
    complaint = why_not(backend, chip, dtype, width, documents=False)
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


def make_step(
    config: Config, mesh: Mesh
) -> Callable[[State, jax.Array, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """The compiled `step(state, tokens_ABS, weights_ABT) -> (state, metrics)`.

    A counts micro-batches, B rows, S = T + 1. The state is donated. Weights are the loss weights of
    the targets tokens[..., 1:]. Metrics: `train/loss` in nats a token, `train/grad_norm` before
    clipping, `train/lr`, and the counters. A step whose loss or gradient is not finite leaves
    weights and optimizer as they were.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)
    gradients = make_gradients(config, mesh)

    def step(state: State, tokens_ABS, weights_ABT):
        loss, grads = gradients(state["weights"], tokens_ABS, weights_ABT)
        grad_norm = optax.tree.norm(grads)
        updates, new_optimizer = optimizer.update(grads, state["optimizer"], state["weights"])
        new_weights = optax.apply_updates(state["weights"], updates)

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        old, new = (state["weights"], state["optimizer"]), (new_weights, new_optimizer)
        kept_weights, kept_optimizer = jax.tree.map(lambda a, b: jnp.where(finite, b, a), old, new)
        skipped = state["skipped"] + ~finite
        new_state = {
            "weights": kept_weights,
            "optimizer": kept_optimizer,
            "step": state["step"] + 1,
            "skipped": skipped,
            "skipped_in_a_row": jnp.where(finite, 0, state["skipped_in_a_row"] + 1),
        }
        metrics = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lr": schedule(state["step"] - state["skipped"]),
            "train/skipped": skipped,
            "train/skipped_in_a_row": new_state["skipped_in_a_row"],
        }
        return new_state, metrics

    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    rows = batch_sharding(mesh, rows_axis=1)
    return jax.jit(
        step,
        in_shardings=(state_shardings, rows, rows),
        out_shardings=(state_shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def make_gradients(
    config: Config, mesh: Mesh
) -> Callable[[Weights, jax.Array, jax.Array], tuple[jax.Array, Weights]]:
    """`gradients(weights, tokens_ABS, weights_ABT) -> (mean loss, its fp32 gradient)`.

    Each device works on its own rows, and what crosses the network is written out: with
    `execution.gather` "step" the weights are gathered once in the compute dtype, micro-batches add
    up gradients of whole weights in fp32, and one reduce-scatter ends the step. With "layer" both
    happen in every layer of every micro-batch, so no device holds all layers whole.
    """
    dtype, once = compute_dtype(config, mesh), config.execution.gather == "step"

    def gather(name, part):
        return jax.lax.all_gather(part, "fsdp", axis=gather_axis(name, part.ndim), tiled=True)

    def on_one_device(weights, tokens_ABS, weights_ABT):
        weights = jax.tree.map(lambda w: w.astype(dtype), weights)
        if once:
            weights = _map_named(gather, weights)

        def loss_sum(weights, tokens_BS, weights_BT):
            return llama.loss(
                config.model,
                weights,
                tokens_BS,
                weights_BT,
                config.execution,
                gather=None if once else gather,
            )

        def micro_batch(sums, batch):
            (loss, count), grads = jax.value_and_grad(loss_sum, has_aux=True)(weights, *batch)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            return jax.tree.map(jnp.add, sums, (loss, count, grads)), None

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        zeros = (jnp.zeros(()), jnp.zeros(()), zeros)
        (loss, count, grads), _ = jax.lax.scan(micro_batch, zeros, (tokens_ABS, weights_ABT))

        def scatter(name, grad):
            axis = gather_axis(name, grad.ndim)
            return jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True)

        if once:
            grads = _map_named(scatter, grads)
        grads = jax.lax.psum(grads, "data")
        loss, count = jax.lax.psum((loss, count), BATCH_AXES)
        return loss / count, jax.tree.map(lambda g: g / count, grads)

    weights = abstract_state(config, mesh)["weights"]
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, weights)
    rows = batch_sharding(mesh, rows_axis=1).spec
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(specs, rows, rows),
        out_specs=(P(), specs),
        check_vma=False,  # kernels say nothing about which devices agree
    )


def _map_named(function, tree):
    """`function(name, leaf)` over a tree of weights."""
    leaves = [function(name, leaf) for name, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def loss_weights(tokens_ABS: np.ndarray) -> np.ndarray:
    """Weight 1 for every target: packed rows hold no padding."""
    return np.ones_like(tokens_ABS[..., 1:], np.float32)
