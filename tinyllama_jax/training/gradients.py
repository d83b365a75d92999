"""The gradients of a step, and everything that crosses the network for them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Config
from tinyllama_jax.data.boundaries import segment_ids
from tinyllama_jax.model import llama
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.runtime.mesh import BATCH_AXES, batch_sharding, gather_axis, shardings

Batch = tuple[jax.Array, jax.Array]
"""Tokens and loss weights of a micro-batch; of several, with an axis for them in front."""
Bucket = dict[str, jax.Array]
"""Weights that cross the network together, by name: those of a layer, without their layer axis,
or some of those outside the layers."""
Sums = tuple[jax.Array, jax.Array, Any]
"""Over the rows so far: losses, loss weights, and fp32 gradients of the losses."""


def make_gradients(
    config: Config, mesh: Mesh, dtype: jnp.dtype
) -> Callable[[Weights, jax.Array, jax.Array], tuple[jax.Array, Weights]]:
    """`gradients(weights, tokens_ABS, weights_ABT) -> (mean loss, its fp32 gradient)`.

    Each device works on its own rows, and what crosses the network is written out: with
    `execution.gather` "step" the weights are gathered once, micro-batches add up gradients of whole
    weights in fp32, and these are scattered once. With "layer" both happen in every layer of every
    micro-batch, so no device holds all layers whole.

    Args:
      config: the run.
      mesh: where.
      dtype: of matrix products, and of the weights that are gathered.
    """
    model, execution = config.model, config.execution

    def documents(tokens_BS: jax.Array) -> jax.Array | None:
        return segment_ids(tokens_BS[:, :-1]) if config.data.mask_documents else None

    def add(sums: Sums, weights: Weights, batch: Batch, gather=llama.whole) -> Sums:
        """The sums with a micro-batch more."""

        def loss(weights):
            return llama.loss(model, weights, *batch, documents(batch[0]), execution, gather)

        (losses, count), grads = jax.value_and_grad(loss, has_aux=True)(weights)
        return jax.tree.map(jnp.add, sums, (losses, count, _fp32(grads)))

    def add_joined(sums: Sums, buckets: list[Bucket], batch: Batch) -> Sums:
        losses, count, grads = add(_with_joined(sums), _join(buckets), batch)
        return losses, count, _split(grads)

    def add_by_layer(sums: Sums, buckets: list[Bucket], batch: Batch, leave=_identity) -> Sums:
        """As `add`, each layer on its own; what `leave` makes of a bucket's gradients is kept.

        Gradients of weights in fp32 are products in fp32, which add onto the sums where they lie.
        That the weights came out of a narrower dtype, to be multiplied in it, the compiler finds:
        nothing is converted.

        Without a word of when, the compiler works out all layers first, and has nothing left to do
        while gradients leave, nor memory for what they are made of. So a layer's work waits until
        the gradients of the second layer above it have left.
        """
        losses, count, (sums_below, *sums_layers, sums_above) = sums
        below, *layers, above = buckets
        tokens_BS, weights_BT = batch

        def embed(below):
            return llama.embed(below, tokens_BS[:, :-1])

        layer = llama.make_layer(model, execution, weights_BT.shape[1], documents(tokens_BS))

        def through(x_BTD, bucket):
            """The stream above a layer, and the layer's backward pass."""
            if execution.recompute != "layers":
                return jax.vjp(layer, x_BTD, _fp32(bucket))

            def back(dx_BTD):
                # Or the compiler finds that it has computed the layer before, and keeps it.
                x_again_BTD, dx_BTD = jax.lax.optimization_barrier((x_BTD, dx_BTD))
                return jax.vjp(layer, x_again_BTD, _fp32(bucket))[1](dx_BTD)

            return layer(x_BTD, bucket), back

        x_BTD, back_embed = jax.vjp(embed, below)
        back_layers = []
        for bucket in layers:
            x_BTD, back = through(x_BTD, bucket)
            back_layers.append(back)
        loss, targets, dx_BTD, sums_above = llama.head_gradients(
            model, above, x_BTD, tokens_BS, weights_BT, sums_above
        )

        left = [leave(sums_above)]
        for back, sums_layer in zip(back_layers[::-1], sums_layers[::-1], strict=True):
            dx_BTD, grads = back(dx_BTD)
            sums_layer = _sum(sums_layer, grads)
            dx_BTD, left[-1] = jax.lax.optimization_barrier((dx_BTD, left[-1]))
            left.append(leave(sums_layer))
        left.append(leave(_sum(sums_below, *back_embed(dx_BTD))))
        return losses + loss, count + targets, left[::-1]

    add_bucketed = add_by_layer if execution.unroll_layers else add_joined

    def sums_in_loop(weights: Weights, batches: Batch, gather=llama.whole) -> Sums:
        return _over(batches, _no_sums(weights), lambda s, b: add(s, weights, b, gather))

    def sums_gathered_by_step(weights: Weights, batches: Batch) -> Sums:
        """The first and the last micro-batch stand outside the loop: the first works on a layer
        while the weights of the next arrive, the last while the gradients of the one above leave.
        """
        tokens_ABS, weights_ABT = batches
        first, between, last = (
            (tokens_ABS[part], weights_ABT[part]) for part in (0, slice(1, -1), -1)
        )
        buckets = [_gather(bucket) for bucket in _split(weights)]
        sums = _no_sums(buckets)
        if len(tokens_ABS) > 1:
            sums = add_by_layer(sums, buckets, first)
            sums = _over(between, sums, lambda s, b: add_bucketed(s, buckets, b))
            # Begun before the others are done, the last one would need memory beside theirs.
            sums, last = jax.lax.optimization_barrier((sums, last))

        def scatter(grads: Bucket) -> Bucket:
            return _scatter(grads, mesh.shape["fsdp"])

        return _with_joined(add_by_layer(sums, buckets, last, scatter))

    def sums_by_layer(weights: Weights, batches: Batch) -> Sums:
        buckets = _split(weights)
        sums = _over(batches, _no_sums(buckets), lambda s, b: add_by_layer(s, buckets, b))
        return _with_joined(sums)

    def mean_gradients(weights, tokens_ABS, weights_ABT):
        folded, unfold = jax.vjp(llama.fold_gains, weights)
        weights = jax.tree.map(lambda w: w.astype(dtype), folded)
        batches = tokens_ABS, weights_ABT
        if execution.gather == "layer":
            losses, count, grads = sums_in_loop(weights, batches, _gather_one)
            grads = jax.lax.psum(grads, "data")
        elif mesh.size > 1:
            losses, count, grads = sums_gathered_by_step(weights, batches)
        elif execution.unroll_layers:
            losses, count, grads = sums_by_layer(weights, batches)
        else:
            losses, count, grads = sums_in_loop(weights, batches)
        losses, count = jax.lax.psum((losses, count), BATCH_AXES)
        (grads,) = unfold(jax.tree.map(lambda g: g / count, grads))
        return losses / count, grads

    weights = llama.abstract_weights(config.model)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings(weights, mesh))
    rows = batch_sharding(mesh, rows_axis=1).spec
    return jax.shard_map(
        mean_gradients,
        mesh=mesh,
        in_specs=(specs, rows, rows),
        out_specs=(P(), specs),
        check_vma=False,  # kernels say nothing about which devices agree
    )


def _no_sums(weights) -> Sums:
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    return jnp.zeros(()), jnp.zeros(()), zeros


def _over(batches: Batch, sums: Sums, add: Callable[[Sums, Batch], Sums]) -> Sums:
    """Adds each micro-batch in turn, in a loop that is compiled once."""
    return jax.lax.scan(lambda sums, batch: (add(sums, batch), None), sums, batches)[0]


def _fp32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _sum(sums: Bucket, grads: Bucket) -> Bucket:
    return jax.tree.map(jnp.add, sums, _fp32(grads))


def _identity(bucket: Bucket) -> Bucket:
    return bucket


def _split(weights: Weights) -> list[Bucket]:
    """The embedding, each layer, and what stands above them."""
    layers = llama.unstack(weights["blocks"])
    above = {name: w for name, w in weights.items() if name not in ("blocks", "embedding_VD")}
    return [{"embedding_VD": weights["embedding_VD"]}, *layers, above]


def _join(buckets: list[Bucket]) -> Weights:
    """What `_split` has split."""
    below, *layers, above = buckets
    blocks = {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
    return below | {"blocks": blocks} | above


def _with_joined(sums: Sums) -> Sums:
    losses, count, grads = sums
    return losses, count, _join(grads)


def _gather_one(name: str, part: jax.Array) -> jax.Array:
    return jax.lax.all_gather(part, "fsdp", axis=gather_axis(name, part.ndim), tiled=True)


def _gather(parts: Bucket) -> Bucket:
    """The whole weights of which this device holds parts, by one all-gather."""
    # The axis that is split comes first, so that the parts of a weight stand one after the other.
    leading = {name: jnp.moveaxis(p, gather_axis(name, p.ndim), 0) for name, p in parts.items()}
    flat = jnp.concatenate([part.ravel() for part in leading.values()])
    rows = jax.lax.all_gather(flat, "fsdp")
    weights, start = {}, 0
    for name, part in leading.items():
        w = rows[:, start : start + part.size].reshape(-1, *part.shape[1:])
        weights[name] = jnp.moveaxis(w, 0, gather_axis(name, w.ndim))
        start += part.size
    return weights


def _scatter(grads: Bucket, devices: int) -> Bucket:
    """This device's parts of the gradients' sums over all devices, by one reduce-scatter."""
    leading = {name: jnp.moveaxis(g, gather_axis(name, g.ndim), 0) for name, g in grads.items()}
    rows = jnp.concatenate([g.reshape(devices, -1) for g in leading.values()], axis=1)
    flat = jax.lax.psum(jax.lax.psum_scatter(rows, "fsdp"), "data")
    parts, start = {}, 0
    for name, g in leading.items():
        shape = g.shape[0] // devices, *g.shape[1:]
        part = flat[start : start + math.prod(shape)].reshape(shape)
        parts[name] = jnp.moveaxis(part, 0, gather_axis(name, part.ndim))
        start += math.prod(shape)
    return parts
