"""The Llama 2 decoder as Flax NNX modules: RoPE, RMSNorm, SwiGLU, grouped-query attention.

Shapes: B batch, T tokens, S columns of a cache, D width, N query heads, K kv heads, H head width,
F SwiGLU width, V vocabulary, L layers, X = N H. Weights are named and shaped for what they
multiply: `query_DNH`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from tinyllama_jax.config import ExecutionConfig, LlamaConfig
from tinyllama_jax.model.attention import attention, cached_attention
from tinyllama_jax.model.embedding import embedding
from tinyllama_jax.model.flash_attention import first_of_run
from tinyllama_jax.model.loss import next_token_gradients, next_token_loss, target_scores
from tinyllama_jax.model.norm import rms_norm
from tinyllama_jax.model.products import dense, normed_products, swiglu_product

Weights = dict[str, Any]  # a nested dict of arrays, as every other room sees a model
Gather = Callable[[str, jax.Array], jax.Array]
"""What makes a weight whole where the model comes to it: (name, this device's part) -> all of it.
A weight of a block comes by its bare name and without its layer axis."""


def whole(name: str, weight: jax.Array) -> jax.Array:
    """The `Gather` of weights that are not in parts."""
    return weight


# What a block keeps for its backward pass so that no matrix product runs twice: the SwiGLU product
# is computed again, and the first norm, from the block's input.
KEPT = ("query", "key", "value", "attn_o", "attn_lse", "normed", "scale", "gate", "up")

# The gain of a block's norm -> the matrices that multiply what it scales.
SCALED_BY = {
    "attention_norm_D": ("query_DNH", "key_DKH", "value_DKH"),
    "swiglu_norm_D": ("gate_DF", "up_DF"),
}


def rope_tables(positions_BT: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotation angles, fp32, (B, T, 1, H / 2) (Su et al. 2021, section 3.2.2).

    Computed in the step, never cached: a cache would have to be keyed by every input.
    """
    half = config.head_width // 2
    frequencies_h = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions_BT11 = positions_BT[:, :, None, None].astype(jnp.float32) / config.rope_factor
    angles_BT1h = positions_BT11 * frequencies_h
    return jnp.cos(angles_BT1h), jnp.sin(angles_BT1h)


def rotate(x_BTNH: jax.Array, cos_BT1h: jax.Array, sin_BT1h: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H / 2): the half-split form, Hugging Face's own."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [a * cos_BT1h - b * sin_BT1h, b * cos_BT1h + a * sin_BT1h]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)); the gains stand in the matrices, by
    `fold_gains`."""

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

    def __call__(self, x_BTD, rope, segment_ids_BT, execution: ExecutionConfig):
        x_BTD, q_BTNH, k_BTKH, v_BTKH = self.heads(x_BTD, rope)
        attend = functools.partial(
            attention, segment_ids=segment_ids_BT, backend=execution.attention
        )
        if execution.recompute == "elementwise":  # or plain JAX keeps all its scores
            attend = jax.checkpoint(attend, policy=keep_matrix_products)
        with jax.named_scope("attention"):
            o_BTNH = attend(
                checkpoint_name(q_BTNH, "query"),
                checkpoint_name(k_BTKH, "key"),
                checkpoint_name(v_BTKH, "value"),
            )
        return self.above_attention(x_BTD, o_BTNH, execution)

    def heads(self, x_BTD, rope):
        """The residual stream as it goes on; queries, keys and values, rotated: what attention and
        a cache of it are made of."""
        N, K, H = self.config.query_heads, self.config.kv_heads, self.config.head_width
        weights = self.query_DNH[...], self.key_DKH[...], self.value_DKH[...]
        # One product for the three, or the backward pass would add up three gradients of what they
        # multiply; for one token, to join them would copy the weights.
        groups = (weights,) if x_BTD.shape[1] > 1 else tuple((w,) for w in weights)
        with jax.named_scope("attention"):
            x_BTD, products = normed_products(x_BTD, None, groups, self.config.norm_eps)
            qkv_BTMH = jnp.concatenate(products, axis=-1).reshape(*x_BTD.shape[:2], -1, H)
            q_BTNH, k_BTKH, v_BTKH = jnp.split(qkv_BTMH, (N, N + K), axis=2)
            return x_BTD, rotate(q_BTNH, *rope), rotate(k_BTKH, *rope), v_BTKH

    def above_attention(self, x_BTD, o_BTNH, execution: ExecutionConfig = ExecutionConfig()):
        """The residual stream above the block, from that below it and what attention gave."""
        with jax.named_scope("attention"):
            # The heads side by side as one axis, for the same reason as in products.py.
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
    """The blocks are one `Block` whose weights carry a leading layer axis."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        std, (V, D) = init_std(config), (config.vocab_size, config.width)
        self.embedding_VD = nnx.Param(std * jax.random.normal(rngs.params(), (V, D)))

        def block(layer_rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=layer_rngs)

        self.blocks = nnx.vmap(block)(rngs.split(config.layers))
        self.head_DV = nnx.Param(std * jax.random.normal(rngs.params(), (D, V)))

    def hidden(self, tokens_BT, segment_ids_BT, execution: ExecutionConfig, gather: Gather):
        """The residual stream above the last block, (B, T, D)."""
        x_BTD = embed({"embedding_VD": self.embedding_VD[...]}, tokens_BT, gather)
        # What is computed again is said here, for the layer as a whole: a scan would copy what its
        # own barriers hold, and keeps the second time apart from the first by itself.
        plain = ExecutionConfig(attention=execution.attention)
        layer = make_layer(self.config, plain, tokens_BT.shape[1], segment_ids_BT, gather)
        if execution.recompute != "nothing":
            policy = keep_matrix_products if execution.recompute == "elementwise" else None
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        # vmap made the layer axis above, scan walks it: the block is traced and compiled once.
        stacked = nnx.to_pure_dict(nnx.state(self.blocks))
        return jax.lax.scan(lambda x, weights: (layer(x, weights), None), x_BTD, stacked)[0]


def positions(T: int, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Places of the tokens of a row, (1, T); in a packed row (B, T), from 0 in each document."""
    positions_1T = jnp.arange(T)[None]
    return positions_1T if segment_ids_BT is None else positions_1T - first_of_run(segment_ids_BT)


def embed(weights: Weights, tokens_BT: jax.Array, gather: Gather = whole) -> jax.Array:
    """The residual stream below the first block, (B, T, D)."""
    return embedding(gather("embedding_VD", weights["embedding_VD"]), tokens_BT)


def make_layer(
    config: LlamaConfig,
    execution: ExecutionConfig,
    T: int,
    segment_ids_BT: jax.Array | None = None,
    gather: Gather = whole,
) -> Callable[[jax.Array, Weights], jax.Array]:
    """`layer(x_BTD, folded weights of one block) -> x_BTD`, for rows of T tokens."""
    rope, block = rope_tables(positions(T, segment_ids_BT), config), make_block(config)

    def layer(x_BTD, weights):
        weights = {name: gather(name, w) for name, w in weights.items()}
        return block(weights)(x_BTD, rope, segment_ids_BT, execution)

    return layer


def keep_matrix_products(primitive: Primitive, *args, **params) -> bool:
    """A policy for `jax.checkpoint`: keeps what is named in `KEPT`, and what cuDNN's
    forward pass of attention gives, which JAX does not name."""
    by_name = jax.checkpoint_policies.save_only_these_names(*KEPT)
    return "dot_product_attention_fwd" in primitive.name or by_name(primitive, *args, **params)


def make_block(config: LlamaConfig) -> Callable[[Weights], Block]:
    """`block(folded weights of one block) -> Block`."""
    definition = nnx.graphdef(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))
    return functools.partial(nnx.merge, definition)


def init_std(config: LlamaConfig) -> float:
    """sqrt(2 / (5 D)), for every matrix but the two below (Nguyen and Salazar 2019, 2.2)."""
    return math.sqrt(2 / (5 * config.width))


def residual_init_std(config: LlamaConfig) -> float:
    """1 / (sqrt(D) L), for the two matrices of a block that write into the residual stream."""
    return 1 / (math.sqrt(config.width) * config.layers)


def init_weights(config: LlamaConfig, key: jax.Array) -> Weights:
    """Fresh fp32 weights, a pure function of the key: jit it with out_shardings to shard them."""
    weights = nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(params=key))))
    gains = {name: jnp.ones((config.layers, config.width)) for name in SCALED_BY}
    return weights | {"blocks": weights["blocks"] | gains, "norm_D": jnp.ones(config.width)}


def fold_gains(weights: Weights) -> Weights:
    """The weights as the modules take them: without gains, which are in the matrices after them.

    (x / rms(x) gain) w = x / rms(x) (gain w), so that a norm multiplies nothing, and its gain's
    gradient, which this function's derivative gives, takes no pass over all tokens. What has no
    gains, blocks in a list too, stays as it is.
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
      tokens_BT: ids in [0, V), T up to what memory holds; JAX clamps ids that lie outside, so check
        them on the host.
      segment_ids_BT: documents of a packed row; a token sees its own document alone, and its
        position counts from there.
      execution: how.
    """
    weights = fold_gains(weights)
    x_BTD = _merged(config, weights).hidden(tokens_BT, segment_ids_BT, execution, whole)
    return _logits(config, weights, x_BTD)


def for_decoding(weights: Weights) -> Weights:
    """The weights as `prefill` and `decode` take them: folded, with a list of blocks, which share
    nothing.

    Cut out of all layers' weights where it is used, a matrix would be copied for every token.
    """
    weights = fold_gains(weights)
    return weights | {"blocks": unstack(weights["blocks"])}


class Cache(NamedTuple):
    """Keys and values of the tokens so far: of the kv heads alone, rotated.

    The columns of a row hold its prompt, padding up to the longest one, and its new tokens. So a
    new token has the same column in all rows, whatever its position in its own. Each layer has
    arrays of its own: cut out of all layers' they would be copied for every token.
    """

    keys_BKSH: tuple[jax.Array, ...]
    values_BKSH: tuple[jax.Array, ...]
    filled_BS: jax.Array
    """Which columns hold a token."""


def prefill(
    config: LlamaConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    columns: int,
) -> tuple[jax.Array, Cache]:
    """Logits (B, V) after the last token of each prompt, and a cache with room for more.

    Args:
      config: the model.
      weights: in the dtype to compute in, and as `for_decoding` gives them.
      tokens_BT: prompts, each followed by padding, which no token of a prompt sees.
      lengths_B: tokens of each prompt, from 1 to T.
      columns: of the cache, at least T.
    """
    B, T = tokens_BT.shape
    block, rope = make_block(config), rope_tables(jnp.arange(T)[None], config)
    free = ((0, 0), (0, 0), (0, columns - T), (0, 0))
    x_BTD, keys, values = embed(weights, tokens_BT), [], []
    for layer in map(block, weights["blocks"]):
        x_BTD, q_BTNH, k_BTKH, v_BTKH = layer.heads(x_BTD, rope)
        with jax.named_scope("attention"):
            o_BTNH = attention(q_BTNH, k_BTKH, v_BTKH)
        x_BTD = layer.above_attention(x_BTD, o_BTNH)
        keys.append(jnp.pad(k_BTKH.swapaxes(1, 2), free))
        values.append(jnp.pad(v_BTKH.swapaxes(1, 2), free))
    cache = Cache(tuple(keys), tuple(values), jnp.arange(columns) < lengths_B[:, None])
    # Of the other positions nobody wants the logits, which are V wide.
    return _logits(config, weights, x_BTD[jnp.arange(B), lengths_B - 1]), cache


def decode(
    config: LlamaConfig,
    weights: Weights,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    column: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Logits (B, V) after one more token of each row, and the cache with it.

    Args:
      config: the model.
      weights: in the dtype to compute in, and as `for_decoding` gives them.
      tokens_B: the tokens.
      positions_B: where each stands in its row's text.
      column: where all of them go in the cache.
      cache: of the tokens before; donate it, and it is written in place.
    """
    block, rope = make_block(config), rope_tables(positions_B[:, None], config)
    filled_BS = cache.filled_BS.at[:, column].set(True)
    x_B1D, keys, values = embed(weights, tokens_B[:, None]), [], []
    layers = zip(map(block, weights["blocks"]), cache.keys_BKSH, cache.values_BKSH, strict=True)
    for layer, k_BKSH, v_BKSH in layers:
        x_B1D, q_B1NH, k_B1KH, v_B1KH = layer.heads(x_B1D, rope)
        keys.append(k_BKSH.at[:, :, column].set(k_B1KH[:, 0]))
        values.append(v_BKSH.at[:, :, column].set(v_B1KH[:, 0]))
        with jax.named_scope("attention"):
            o_B1NH = cached_attention(q_B1NH, keys[-1], values[-1], filled_BS)
        x_B1D = layer.above_attention(x_B1D, o_B1NH)
    return _logits(config, weights, x_B1D[:, 0]), Cache(tuple(keys), tuple(values), filled_BS)


def unstack(
    blocks: Weights, layers_of: Callable[[Any], Sequence[Any]] = jnp.unstack
) -> list[Weights]:
    """The weights of each block, from those with a leading layer axis, which `layers_of` splits."""
    layers = zip(*map(layers_of, blocks.values()), strict=True)
    return [dict(zip(blocks, layer, strict=True)) for layer in layers]


def loss(
    config: LlamaConfig,
    weights: Weights,
    tokens_BS: jax.Array,
    weights_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    execution: ExecutionConfig = ExecutionConfig(),
    gather: Gather = whole,
) -> tuple[jax.Array, jax.Array]:
    """Sums of next-token losses and of their weights, without the logits ever standing in memory.

    Args:
      config: the model.
      weights: in the dtype to compute in.
      tokens_BS: rows of S = T + 1 tokens.
      weights_BT: fp32, how much the target tokens_BS[:, 1:] counts.
      segment_ids_BT: as `apply` takes them, of tokens_BS[:, :-1].
      execution: how.
      gather: makes a weight whole where `weights` are the parts of a device; by default they are.

    Returns:
      As `next_token_loss`.
    """
    weights = fold_gains(weights)
    x_BTD = _merged(config, weights).hidden(tokens_BS[:, :-1], segment_ids_BT, execution, gather)
    with jax.named_scope("head"):
        h_BTD, _ = rms_norm(x_BTD, config.norm_eps)
        head_DV = gather("head_DV", weights["head_DV"])
        return next_token_loss(h_BTD, head_DV, tokens_BS[:, 1:], weights_BT)


def head_gradients(config: LlamaConfig, weights: Weights, x_BTD, tokens_BS, weights_BT, sums):
    """What `loss` returns, from the stream above the last block and folded weights; the gradient of
    that stream; and `sums`, a dict of fp32 gradients of the weights, with theirs added."""
    with jax.named_scope("head"):
        h_BTD, back = jax.vjp(lambda x_BTD: rms_norm(x_BTD, config.norm_eps)[0], x_BTD)
        loss, dh_BTD, dhead_DV, _ = next_token_gradients(
            h_BTD, weights["head_DV"], tokens_BS[:, 1:], weights_BT, sums["head_DV"]
        )
        (dx_BTD,) = back(dh_BTD)
        return loss, jnp.sum(weights_BT), dx_BTD, sums | {"head_DV": dhead_DV}


def next_token_scores(
    config: LlamaConfig,
    weights: Weights,
    tokens_BS: jax.Array,
    execution: ExecutionConfig = ExecutionConfig(),
) -> tuple[jax.Array, jax.Array]:
    """Of each token but the first of a row: its log-probability, and whether none is likelier.

    Args:
      config: the model.
      weights: in the dtype to compute in.
      tokens_BS: rows of S = T + 1 tokens.
      execution: how.

    Returns:
      As `target_scores`, (B, T) each.
    """
    weights = fold_gains(weights)
    x_BTD = _merged(config, weights).hidden(tokens_BS[:, :-1], None, execution, whole)
    with jax.named_scope("head"):
        h_BTD, _ = rms_norm(x_BTD, config.norm_eps)
        return target_scores(h_BTD, weights["head_DV"], tokens_BS[:, 1:])


def _logits(config: LlamaConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """Of any positions, (..., V), from the residual stream above the last block."""
    with jax.named_scope("head"):
        return rms_norm(x, config.norm_eps)[0] @ weights["head_DV"]


def _merged(config: LlamaConfig, weights: Weights) -> Llama:
    definition = nnx.graphdef(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    return nnx.merge(definition, weights)
