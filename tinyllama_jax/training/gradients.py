"""The gradients of a step, and everything that crosses the network for them.

Weights, and sums of their gradients, are held here as buckets: a list of dicts by name, the
embedding's first, then one for each layer, then the head's. A bucket crosses the network as one
array, while the layer next to it computes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Config, ExecutionConfig, LlamaConfig
from tinyllama_jax.data.boundaries import segment_ids
from tinyllama_jax.model import llama
from tinyllama_jax.model.embedding import embedding
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.runtime.mesh import BATCH_AXES, batch_sharding, gather_axis, shardings

Bucket = dict[str, jax.Array]
"""Weights, or gradients of weights, by name. Those of a layer have no layer axis."""
Exchange = Callable[[Bucket], Bucket]
"""Something that is done to a bucket on its way to or from the other devices."""


class Batch(NamedTuple):
    """A micro-batch; or several, with an axis A for them in front."""

    tokens_BS: jax.Array
    loss_weights_BT: jax.Array


class Sums(NamedTuple):
    """What all micro-batches so far add up to on this device."""

    loss: jax.Array
    targets: jax.Array
    """The sum of the loss weights, by which loss and gradients are divided in the end."""
    gradients: list[Bucket]
    """In fp32: in bf16 a sum of many micro-batches would lose the small ones."""


def make_gradients(
    config: Config, mesh: Mesh, dtype: jnp.dtype
) -> Callable[[Weights, jax.Array, jax.Array], tuple[jax.Array, Weights]]:
    """`gradients(weights, tokens_ABS, loss_weights_ABT) -> (mean loss, its fp32 gradient)`.

    Each device works on its own rows, and what crosses the network is written out here instead of
    being left to the compiler. With `execution.gather` "step" the weights are gathered once a step,
    each device adds up whole gradients in fp32, and these are scattered once. With "layer" both
    happen in every layer of every micro-batch, so that no device ever holds all layers whole.

    Args:
      config: the run.
      mesh: the devices.
      dtype: of matrix products, and of the weights that are gathered.
    """

    def mean_gradients(weights, tokens_ABS, loss_weights_ABT):
        folded, unfold = jax.vjp(llama.fold_gains, weights)
        parts = split(jax.tree.map(lambda w: w.astype(dtype), folded))
        batches = Batch(tokens_ABS, loss_weights_ABT)
        if config.execution.gather == "layer":
            sums = gathered_by_layer(config, parts, batches)
        elif mesh.size > 1:
            sums = gathered_by_step(config, parts, batches, devices=mesh.shape["fsdp"])
        else:
            sums = over(batches, no_sums(parts), lambda s, b: add(config, s, parts, b))
        loss, targets = jax.lax.psum((sums.loss, sums.targets), BATCH_AXES)
        means = jax.tree.map(lambda g: g / targets, join(sums.gradients))
        return loss / targets, unfold(means)[0]

    weights = llama.abstract_weights(config.model)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings(weights, mesh))
    rows = batch_sharding(mesh, rows_axis=1).spec
    return jax.shard_map(
        mean_gradients,
        mesh=mesh,
        in_specs=(specs, rows, rows),
        out_specs=(P(), specs),
        check_vma=False,  # kernels do not say on which devices their results agree
    )


def gathered_by_step(config: Config, parts: list[Bucket], batches: Batch, devices: int) -> Sums:
    """The sums of this device's parts of the gradients; weights and gradients travel once.

    The first and the last micro-batch stand outside the loop over the others: the first works on a
    layer while the weights of the next one arrive, and the last while the gradients of the layer
    above leave.

    Args:
      config: the run.
      parts: this device's parts of the weights.
      batches: all micro-batches.
      devices: how many share one set of weights.
    """
    weights = [gather(part) for part in parts]
    first, between, last = (
        jax.tree.map(lambda x, index=index: x[index], batches) for index in (0, slice(1, -1), -1)
    )
    sums = no_sums(weights)
    if len(batches.tokens_BS) > 1:
        sums = add(config, sums, weights, first)
        sums = over(between, sums, lambda s, b: add(config, s, weights, b))
        # Begun before the others are done, the last one would need its memory beside theirs.
        sums, last = jax.lax.optimization_barrier((sums, last))
    return add(config, sums, weights, last, leave=lambda bucket: scatter(bucket, devices))


def gathered_by_layer(config: Config, parts: list[Bucket], batches: Batch) -> Sums:
    """The same with weights that are gathered where they are used, for models of any size."""
    sums = over(batches, no_sums(parts), lambda s, b: add(config, s, parts, b, gather))
    return sums._replace(gradients=jax.lax.psum(sums.gradients, "data"))


def identity(bucket: Bucket) -> Bucket:
    return bucket


def add(
    config: Config,
    sums: Sums,
    weights: list[Bucket],
    batch: Batch,
    arrive: Exchange | None = None,
    leave: Exchange = identity,
) -> Sums:
    """The sums with one micro-batch more: forward through the layers, and backward.

    Nothing tells the compiler when a gradient should leave. It would work out all layers first, and
    then have neither work left to do while gradients travel nor memory for what they are made of.
    So a layer's backward pass waits until the gradients of the second layer above it have left.

    Args:
      config: the run.
      sums: of the micro-batches before.
      weights: whole; or, with `arrive`, parts.
      batch: the micro-batch.
      arrive: makes a bucket of weights whole where a layer uses it.
      leave: what is done to the sums of a bucket as soon as they are known, and kept.
    """
    below, *layers, above = weights
    sums_below, *sums_layers, sums_above = sums.gradients
    tokens_BT = batch.tokens_BS[:, :-1]
    documents = segment_ids(tokens_BT) if config.data.mask_documents else None

    # Forward.
    embed = functools.partial(embed_tokens, tokens_BT, arrive)
    x_BTD, back_embed = jax.vjp(embed, below)
    tape = Tape(config.model, arrive)
    x_BTD = llama.through_blocks(config.model, layers, x_BTD, documents, config.execution, tape.run)

    # Backward, from the head down.
    loss, targets, dx_BTD, sums_above = head_and_back(
        config.model, above, x_BTD, batch, sums_above, arrive
    )
    left = [leave(sums_above)]
    for back, sums_layer in zip(reversed(tape.back), reversed(sums_layers), strict=True):
        dx_BTD, gradients = back(dx_BTD)
        sums_layer = plus(sums_layer, gradients)
        dx_BTD, left[-1] = jax.lax.optimization_barrier((dx_BTD, left[-1]))
        left.append(leave(sums_layer))
    left.append(leave(plus(sums_below, *back_embed(dx_BTD))))
    return Sums(sums.loss + loss, sums.targets + targets, left[::-1])


def embed_tokens(tokens_BT: jax.Array, arrive: Exchange | None, below: Bucket) -> jax.Array:
    """The residual stream below the first layer, (B, T, D)."""
    below = arrive(below) if arrive else below
    return embedding(below["embedding_VD"], tokens_BT)


@dataclasses.dataclass
class Tape:
    """Runs layers, and notes the backward pass of each."""

    model: LlamaConfig
    arrive: Exchange | None
    back: list[Callable[[jax.Array], tuple[jax.Array, Bucket]]] = dataclasses.field(
        default_factory=list
    )
    """Gradient of the stream above a layer -> that of the stream below, and of the layer's bucket,
    in the order in which the layers ran."""

    def run(
        self,
        bucket: Bucket,
        x_BTD: jax.Array,
        rope: llama.Rope,
        segment_ids_BT: jax.Array | None,
        execution: ExecutionConfig,
    ) -> jax.Array:
        """The stream above a layer."""
        how = functools.partial(run_layer, self.model, rope, segment_ids_BT)
        if self.arrive is not None:
            x_BTD, back = jax.vjp(checkpointed(how, execution, self.arrive), x_BTD, bucket)
        elif execution.recompute == "layers":
            forward = functools.partial(how, execution)
            back = functools.partial(run_again_and_back, forward, x_BTD, bucket)
            x_BTD = forward(x_BTD, bucket)
        else:
            # By weights in fp32 their gradients are products in fp32, which XLA adds onto the sums
            # where these lie. It sees, too, that the weights were widened only to be narrowed
            # again for their products, and converts nothing.
            x_BTD, back = jax.vjp(functools.partial(how, execution), x_BTD, fp32(bucket))
        self.back.append(back)
        return x_BTD


def run_layer(
    model: LlamaConfig,
    rope: llama.Rope,
    segment_ids_BT: jax.Array | None,
    execution: ExecutionConfig,
    x_BTD: jax.Array,
    weights: Bucket,
) -> jax.Array:
    """The stream above a layer, from that below it and the layer's whole weights."""
    return llama.make_block(model, weights)(x_BTD, rope, segment_ids_BT, execution)


def run_again_and_back(
    forward: Callable[[jax.Array, Bucket], jax.Array],
    x_BTD: jax.Array,
    weights: Bucket,
    dx_BTD: jax.Array,
) -> tuple[jax.Array, Bucket]:
    """The backward pass of a layer that kept nothing but its input: it runs forward once more."""
    # Without the barrier the compiler sees that it has computed this before, and keeps it.
    x_BTD, dx_BTD = jax.lax.optimization_barrier((x_BTD, dx_BTD))
    return jax.vjp(forward, x_BTD, fp32(weights))[1](dx_BTD)


def checkpointed(
    how: Callable[..., jax.Array], execution: ExecutionConfig, arrive: Exchange
) -> Callable[[jax.Array, Bucket], jax.Array]:
    """A layer that gathers its weights, and gathers them again for its backward pass.

    `jax.checkpoint` says what is kept for the layer as a whole, so that the layer itself keeps
    whatever it likes.
    """
    inside = ExecutionConfig(attention=execution.attention)
    policy = llama.keep_matrix_products if execution.recompute == "elementwise" else None
    return jax.checkpoint(
        lambda x_BTD, part: how(inside, x_BTD, arrive(part)),
        policy=policy,
    )


def head_and_back(
    model: LlamaConfig,
    above: Bucket,
    x_BTD: jax.Array,
    batch: Batch,
    sums: Bucket,
    arrive: Exchange | None,
) -> tuple[jax.Array, jax.Array, jax.Array, Bucket]:
    """What `llama.head_gradients` gives, with the head in its bucket."""
    if arrive is None:
        loss, targets, dx_BTD, dhead_DV = llama.head_gradients(
            model, above["head_DV"], x_BTD, *batch, sums["head_DV"]
        )
        return loss, targets, dx_BTD, {"head_DV": dhead_DV}
    whole, back = jax.vjp(arrive, above)
    none_DV = jnp.zeros(whole["head_DV"].shape, jnp.float32)
    loss, targets, dx_BTD, dhead_DV = llama.head_gradients(
        model, whole["head_DV"], x_BTD, *batch, none_DV
    )
    (gradients,) = back({"head_DV": dhead_DV.astype(whole["head_DV"].dtype)})
    return loss, targets, dx_BTD, plus(sums, gradients)


def over(batches: Batch, sums: Sums, add: Callable[[Sums, Batch], Sums]) -> Sums:
    """Adds each micro-batch in turn, in a loop that is compiled once."""
    return jax.lax.scan(lambda sums, batch: (add(sums, batch), None), sums, batches)[0]


def no_sums(weights: list[Bucket]) -> Sums:
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    return Sums(jnp.zeros(()), jnp.zeros(()), zeros)


def plus(sums: Bucket, gradients: Bucket) -> Bucket:
    return jax.tree.map(jnp.add, sums, fp32(gradients))


def fp32(bucket: Bucket) -> Bucket:
    return jax.tree.map(lambda x: x.astype(jnp.float32), bucket)


def split(weights: Weights) -> list[Bucket]:
    """Folded weights as buckets: the embedding, each layer, and the head."""
    layers = llama.unstack(weights["blocks"])
    return [
        {"embedding_VD": weights["embedding_VD"]},
        *layers,
        {"head_DV": weights["head_DV"]},
    ]


def join(buckets: list[Bucket]) -> Weights:
    """The weights, or gradients of weights, that `split` has split."""
    below, *layers, above = buckets
    blocks = {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
    return below | {"blocks": blocks} | above


def gather(parts: Bucket) -> Bucket:
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


def scatter(gradients: Bucket, devices: int) -> Bucket:
    """This device's parts of the gradients' sums over all devices, by one reduce-scatter.

    Args:
      gradients: whole, of this device's rows.
      devices: how many share one set of weights. Groups of them add theirs up by an all-reduce.
    """
    leading = {name: jnp.moveaxis(g, gather_axis(name, g.ndim), 0) for name, g in gradients.items()}
    rows = jnp.concatenate([g.reshape(devices, -1) for g in leading.values()], axis=1)
    flat = jax.lax.psum(jax.lax.psum_scatter(rows, "fsdp"), "data")
    parts, start = {}, 0
    for name, g in leading.items():
        shape = g.shape[0] // devices, *g.shape[1:]
        part = flat[start : start + math.prod(shape)].reshape(shape)
        parts[name] = jnp.moveaxis(part, 0, gather_axis(name, part.ndim))
        start += math.prod(shape)
    return parts
