"""The Llama 2 decoder as Flax NNX modules: RoPE, RMSNorm, SwiGLU, grouped-query attention.

Shapes: B batch, T tokens, S = T + 1 tokens of a row with its targets, D width, N query heads,
K kv heads, H head width, F SwiGLU width, V vocabulary, L layers, X = N H. A weight is named and
shaped for what it multiplies: `query_DNH`.

All other rooms see the weights as a plain nested dict, as `init_weights` makes it: `embedding_VD`,
`blocks` (each weight of a block with a leading layer axis), `norm_D`, `head_DV`. The modules are
what computes with them.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from tinyllama_jax.config import ExecutionConfig, LlamaConfig
from tinyllama_jax.model.attention import attention
from tinyllama_jax.model.embedding import embedding
from tinyllama_jax.model.flash_attention import first_of_run
from tinyllama_jax.model.loss import next_token_gradients, next_token_loss, target_scores
from tinyllama_jax.model.norm import rms_norm
from tinyllama_jax.model.products import dense, normed_products, swiglu_product

Weights = dict[str, Any]
Rope = tuple[jax.Array, jax.Array]
"""cos and sin of the rotation angles, (B, T, 1, H / 2) each; B is 1 where all rows share them."""

# The arrays that a block keeps for its backward pass under recompute "elementwise". With them no
# matrix product of weights runs twice: the backward pass computes again only the SwiGLU product,
# and the block's first norm from the block's input.
KEPT = ("query", "key", "value", "attn_o", "attn_lse", "normed", "scale", "gate", "up")

# The gain of each norm in a block -> the matrices that multiply what it scales.
SCALED_BY = {
    "attention_norm_D": ("query_DNH", "key_DKH", "value_DKH"),
    "swiglu_norm_D": ("gate_DF", "up_DF"),
}


def rope_tables(positions_BT: jax.Array, config: LlamaConfig) -> Rope:
    """The rotation angles' cosines and sines, in fp32 (Su et al. 2021, section 3.2.2).

    They are computed in each step and never cached, since a cache would have to be keyed by every
    input: a second RoPE base or factor would silently get the tables of the first.
    """
    half = config.head_width // 2
    frequencies_h = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions_BT11 = positions_BT[:, :, None, None].astype(jnp.float32) / config.rope_factor
    angles_BT1h = positions_BT11 * frequencies_h
    return jnp.cos(angles_BT1h), jnp.sin(angles_BT1h)


def rotate(x_BTNH: jax.Array, cos_BT1h: jax.Array, sin_BT1h: jax.Array) -> jax.Array:
    """Rotates each pair of features (i, i + H / 2) by the angle of its position.

    This is the half-split layout of Hugging Face's checkpoints. Meta's own checkpoints pair
    neighbours (2 i, 2 i + 1) instead, and need their rows permuted first.
    """
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [a * cos_BT1h - b * sin_BT1h, b * cos_BT1h + a * sin_BT1h]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + swiglu(norm(x)).

    The norms have no gains here, because `fold_gains` has multiplied them into the matrices.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D, N, K = config.width, config.query_heads, config.kv_heads
        H, F = config.head_width, config.swiglu_width
        self.config = config

        def normal(std: float, *shape: int) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape))

        into, out = init_std(config), residual_init_std(config)
        self.query_DNH = normal(into, D, N, H)
        self.key_DKH = normal(into, D, K, H)
        self.value_DKH = normal(into, D, K, H)
        self.output_NHD = normal(out, N, H, D)
        self.gate_DF = normal(into, D, F)
        self.up_DF = normal(into, D, F)
        self.down_FD = normal(out, F, D)

    def __call__(
        self,
        x_BTD: jax.Array,
        rope: Rope,
        segment_ids_BT: jax.Array | None = None,
        execution: ExecutionConfig = ExecutionConfig(),
    ) -> jax.Array:
        """The residual stream above the block, (B, T, D), from the stream below it."""
        x_BTD, q_BTNH, k_BTKH, v_BTKH = self.heads(x_BTD, rope)
        attend = functools.partial(
            attention, segment_ids=segment_ids_BT, backend=execution.attention
        )
        if execution.recompute == "elementwise":
            # The kernels keep little, but plain JAX would keep all its scores, T x T a head.
            attend = jax.checkpoint(attend, policy=keep_matrix_products)
        with jax.named_scope("attention"):
            o_BTNH = attend(
                checkpoint_name(q_BTNH, "query"),
                checkpoint_name(k_BTKH, "key"),
                checkpoint_name(v_BTKH, "value"),
            )
        return self.above_attention(x_BTD, o_BTNH, execution)

    def heads(
        self, x_BTD: jax.Array, rope: Rope
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The part of a block below attention, which a cache of keys and values needs by itself.

        Returns:
          The residual stream, unchanged but for its gradient, which ends in the norm's; and
          queries (B, T, N, H), keys and values (B, T, K, H), the first two rotated.
        """
        N, K, H = self.config.query_heads, self.config.kv_heads, self.config.head_width
        weights = self.query_DNH[...], self.key_DKH[...], self.value_DKH[...]
        # Training multiplies the three as one matrix: the backward pass would otherwise add up
        # three gradients of the norm. For a single token, joining them would copy all weights.
        groups = (weights,) if x_BTD.shape[1] > 1 else tuple((w,) for w in weights)
        with jax.named_scope("attention"):
            x_BTD, products = normed_products(x_BTD, None, groups, self.config.norm_eps)
            qkv_BTMH = jnp.concatenate(products, axis=-1).reshape(*x_BTD.shape[:2], -1, H)
            q_BTNH, k_BTKH, v_BTKH = jnp.split(qkv_BTMH, (N, N + K), axis=2)
            return x_BTD, rotate(q_BTNH, *rope), rotate(k_BTKH, *rope), v_BTKH

    def above_attention(
        self,
        x_BTD: jax.Array,
        o_BTNH: jax.Array,
        execution: ExecutionConfig = ExecutionConfig(),
    ) -> jax.Array:
        """The part of a block above attention: the stream above the block, (B, T, D).

        Args:
          x_BTD: the stream below the block.
          o_BTNH: what attention gave.
          execution: whether the SwiGLU product is kept for the backward pass.
        """
        with jax.named_scope("attention"):
            # The heads are one axis of the product, for the reason given in products.py.
            output_XD = self.output_NHD[...].reshape(-1, self.config.width)
            y_BTD = dense(o_BTNH.reshape(*x_BTD.shape[:2], -1), output_XD)
        with jax.named_scope("swiglu"):
            groups = (self.gate_DF[...],), (self.up_DF[...],)
            x_BTD, products = normed_products(x_BTD, y_BTD, groups, self.config.norm_eps)
            gate_BTF, up_BTF = map(checkpoint_name, products, ("gate", "up"))
            keep = execution.recompute == "nothing"
            y_BTD: jax.Array = swiglu_product(gate_BTF, up_BTF, self.down_FD[...], keep)
            return x_BTD + y_BTD


class Llama(nnx.Module):
    """The decoder. Its `blocks` are one `Block` whose weights carry a leading layer axis."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        std, (V, D) = init_std(config), (config.vocab_size, config.width)
        self.embedding_VD = nnx.Param(std * jax.random.normal(rngs.params(), (V, D)))

        def block(layer_rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=layer_rngs)

        self.blocks = nnx.vmap(block)(rngs.split(config.layers))
        self.head_DV = nnx.Param(std * jax.random.normal(rngs.params(), (D, V)))

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        execution: ExecutionConfig = ExecutionConfig(),
    ) -> jax.Array:
        """Logits (B, T, V) of the token after each token, in the dtype of the weights."""
        h_BTD = self.hidden(tokens_BT, segment_ids_BT, execution)
        with jax.named_scope("head"):
            return h_BTD @ self.head_DV[...]

    def hidden(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        execution: ExecutionConfig = ExecutionConfig(),
    ) -> jax.Array:
        """What the head multiplies: the normalised stream above the last block, (B, T, D)."""
        x_BTD = embedding(self.embedding_VD[...], tokens_BT)
        x_BTD = through_blocks(self.config, self.layers(), x_BTD, segment_ids_BT, execution)
        with jax.named_scope("head"):
            return rms_norm(x_BTD, self.config.norm_eps)[0]

    def layers(self) -> list[Block]:
        """The blocks one by one, without the layer axis."""
        definition, state = nnx.split(self.blocks)
        leaves, tree = jax.tree.flatten(state)
        each = zip(*map(jnp.unstack, leaves), strict=True)
        return [nnx.merge(definition, jax.tree.unflatten(tree, layer)) for layer in each]


def through_blocks(
    config: LlamaConfig,
    blocks: Iterable[Any],
    x_BTD: jax.Array,
    segment_ids_BT: jax.Array | None,
    execution: ExecutionConfig,
    run: Callable[..., jax.Array] = Block.__call__,
) -> jax.Array:
    """The one composition of the layers, of training and of evaluation: (B, T, D).

    Each layer is compiled on its own, instead of once as the body of a loop over all: a loop copies
    what each layer keeps into arrays of all layers and out again, which doubled a step's memory
    traffic, and it leaves the compiler nothing to do while another layer's weights travel.

    Args:
      config: the model.
      blocks: the layers from the lowest to the highest.
      x_BTD: the stream below the lowest.
      segment_ids_BT: documents, as `Llama` takes them.
      execution: how each layer is computed.
      run: calls a block. Training passes weights for blocks, and a `run` that notes the layer's
        backward pass.
    """
    rope = rope_tables(positions(x_BTD.shape[1], segment_ids_BT), config)
    for block in blocks:
        x_BTD = run(block, x_BTD, rope, segment_ids_BT, execution)
    return x_BTD


def positions(T: int, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Positions of the tokens in a row, (1, T); with documents (B, T), from 0 in each of them."""
    positions_1T = jnp.arange(T)[None]
    return positions_1T if segment_ids_BT is None else positions_1T - first_of_run(segment_ids_BT)


def keep_matrix_products(primitive: Primitive, *args, **params) -> bool:
    """A policy for `jax.checkpoint` that keeps the arrays of `KEPT`.

    It also keeps what cuDNN's forward pass of attention gives, which JAX does not name: without
    that, this pass would run twice.
    """
    by_name = jax.checkpoint_policies.save_only_these_names(*KEPT)
    return "dot_product_attention_fwd" in primitive.name or by_name(primitive, *args, **params)


def make_block(config: LlamaConfig, weights: Weights) -> Block:
    """The module of one layer, from its folded weights by name."""
    return nnx.merge(_definition(Block, config), weights)


def make_model(config: LlamaConfig, weights: Weights) -> Llama:
    """The module of the model, from weights as `init_weights` or `fold_gains` give them."""
    return nnx.merge(_definition(Llama, config), fold_gains(weights))


@functools.cache
def _definition(module: Callable[..., nnx.Module], config: LlamaConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))


def init_std(config: LlamaConfig) -> float:
    """sqrt(2 / (5 D)), for every matrix but the two below (Nguyen and Salazar 2019, 2.2)."""
    return math.sqrt(2 / (5 * config.width))


def residual_init_std(config: LlamaConfig) -> float:
    """1 / (sqrt(D) L), for the two matrices of a block that write into the residual stream."""
    return 1 / (math.sqrt(config.width) * config.layers)


def init_weights(config: LlamaConfig, key: jax.Array) -> Weights:
    """Fresh fp32 weights, a pure function of the key; jit it with out_shardings to shard them."""
    weights = nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(params=key))))
    gains = {name: jnp.ones((config.layers, config.width)) for name in SCALED_BY}
    return weights | {"blocks": weights["blocks"] | gains, "norm_D": jnp.ones(config.width)}


def fold_gains(weights: Weights) -> Weights:
    """The weights with each norm's gain multiplied into the matrices that stand after the norm.

    (x / rms(x) gain) w = x / rms(x) (gain w). So a norm multiplies nothing, and the gradient of its
    gain is the derivative of this function, which needs no pass over all tokens. Weights that are
    folded already, with a list of blocks or with stacked ones, are returned as they are.
    """

    def scaled(gain_D, w_D):
        return gain_D.reshape(gain_D.shape + (1,) * (w_D.ndim - gain_D.ndim)) * w_D

    def fold(block: Weights) -> Weights:
        block = dict(block)
        for gain, matrices in SCALED_BY.items():
            if (gain_D := block.pop(gain, None)) is not None:
                block |= {name: scaled(gain_D, block[name]) for name in matrices}
        return block

    folded, blocks = dict(weights), weights["blocks"]
    folded["blocks"] = [fold(b) for b in blocks] if isinstance(blocks, list) else fold(blocks)
    if (gain_D := folded.pop("norm_D", None)) is not None:
        folded["head_DV"] = scaled(gain_D, folded["head_DV"])
    return folded


def abstract_weights(config: LlamaConfig) -> Weights:
    """Shapes and dtypes of the weights; nothing is allocated."""
    return jax.eval_shape(lambda: init_weights(config, jax.random.key(0)))


def apply(
    config: LlamaConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    execution: ExecutionConfig = ExecutionConfig(),
) -> jax.Array:
    """Logits (B, T, V) of the model with these weights, in their dtype.

    Args:
      config: the model.
      weights: as `init_weights` gives them, in the dtype to compute in.
      tokens_BT: ids in [0, V), T up to what memory holds. JAX clamps ids that lie outside, so check
        them on the host.
      segment_ids_BT: numbers of the documents in packed rows. A token attends to its own document
        alone, and its position counts from there.
      execution: how the model is computed.
    """
    return make_model(config, weights)(tokens_BT, segment_ids_BT, execution)


def unstack(
    blocks: Weights, layers_of: Callable[[Any], Sequence[Any]] = jnp.unstack
) -> list[Weights]:
    """The weights of each block by name, from those with a leading layer axis.

    Args:
      blocks: the weights of all blocks by name.
      layers_of: splits one of them along its layer axis.
    """
    layers = zip(*map(layers_of, blocks.values()), strict=True)
    return [dict(zip(blocks, layer, strict=True)) for layer in layers]


def loss(
    config: LlamaConfig,
    weights: Weights,
    tokens_BS: jax.Array,
    loss_weights_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    execution: ExecutionConfig = ExecutionConfig(),
) -> tuple[jax.Array, jax.Array]:
    """The sum of the next-token losses, and of their weights; no array of all logits is made.

    Args:
      config: the model.
      weights: in the dtype to compute in.
      tokens_BS: rows of S = T + 1 tokens.
      loss_weights_BT: fp32, how much each target tokens_BS[:, 1:] counts.
      segment_ids_BT: documents of tokens_BS[:, :-1], as `apply` takes them.
      execution: how the model is computed.

    Returns:
      As `next_token_loss`.
    """
    model = make_model(config, weights)
    h_BTD = model.hidden(tokens_BS[:, :-1], segment_ids_BT, execution)
    with jax.named_scope("head"):
        return next_token_loss(h_BTD, model.head_DV[...], tokens_BS[:, 1:], loss_weights_BT)


def head_gradients(
    config: LlamaConfig,
    head_DV: jax.Array,
    x_BTD: jax.Array,
    tokens_BS: jax.Array,
    loss_weights_BT: jax.Array,
    dhead_DV: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The top of the backward pass: the loss, and its gradients by the stream and by the head.

    Args:
      config: the model.
      head_DV: the head, with the last norm's gain folded in.
      x_BTD: the stream above the last block.
      tokens_BS: rows of S = T + 1 tokens.
      loss_weights_BT: fp32, how much each target counts.
      dhead_DV: fp32 gradient of the head so far, onto which this one is added.

    Returns:
      The sum of the losses; the sum of their weights; the gradient of x_BTD; and dhead_DV with the
      head's gradient added.
    """
    with jax.named_scope("head"):
        h_BTD, norm_back = jax.vjp(lambda x_BTD: rms_norm(x_BTD, config.norm_eps)[0], x_BTD)
        loss, dh_BTD, dhead_DV, _ = next_token_gradients(
            h_BTD, head_DV, tokens_BS[:, 1:], loss_weights_BT, dhead_DV
        )
        (dx_BTD,) = norm_back(dh_BTD)
        return loss, jnp.sum(loss_weights_BT), dx_BTD, dhead_DV


def next_token_scores(
    config: LlamaConfig,
    weights: Weights,
    tokens_BS: jax.Array,
    execution: ExecutionConfig = ExecutionConfig(),
) -> tuple[jax.Array, jax.Array]:
    """For each token but the first of a row: its log-probability, and whether none is likelier.

    Args:
      config: the model.
      weights: in the dtype to compute in.
      tokens_BS: rows of S = T + 1 tokens.
      execution: how the model is computed.

    Returns:
      As `target_scores`, (B, T) each.
    """
    model = make_model(config, weights)
    h_BTD = model.hidden(tokens_BS[:, :-1], None, execution)
    with jax.named_scope("head"):
        return target_scores(h_BTD, model.head_DV[...], tokens_BS[:, 1:])
