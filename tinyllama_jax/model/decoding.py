"""The decoder with a cache: prompts are read once, and each further token costs one position.

Shapes: B batch, T tokens, S columns of the cache, D width, N query heads, K kv heads, H head width,
V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tinyllama_jax.config import LlamaConfig
from tinyllama_jax.model.attention import attention, cached_attention
from tinyllama_jax.model.embedding import embedding
from tinyllama_jax.model.llama import Block, Weights, fold_gains, make_block, rope_tables, unstack
from tinyllama_jax.model.norm import rms_norm


class Cache(NamedTuple):
    """Keys and values of the tokens so far, of the kv heads alone, the keys rotated.

    The columns of a row hold its prompt, padding up to the longest prompt, and its new tokens, so
    that a new token has the same column in all rows, whatever its position in its own text. Each
    layer has arrays of its own: cut out of one array of all layers they would be copied for every
    token.
    """

    keys_BKSH: tuple[jax.Array, ...]
    values_BKSH: tuple[jax.Array, ...]
    filled_BS: jax.Array
    """Which columns hold a token."""


def for_decoding(weights: Weights) -> Weights:
    """The weights as `prefill` and `decode` take them: gains folded in, and a list of blocks.

    As for the cache, a matrix that is cut out of an array of all layers where it is used would be
    copied for every token.
    """
    weights = fold_gains(weights)
    return weights | {"blocks": unstack(weights["blocks"])}


def prefill(
    config: LlamaConfig,
    weights: Weights,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    columns: int,
) -> tuple[jax.Array, Cache]:
    """Reads prompts: logits (B, V) after each one's last token, and a cache with room for more.

    Args:
      config: the model.
      weights: as `for_decoding` gives them, in the dtype to compute in.
      tokens_BT: prompts, each followed by padding, which no token of a prompt attends to.
      lengths_B: tokens of each prompt, from 1 to T.
      columns: of the cache, at least T.
    """
    B, T = tokens_BT.shape
    rope = rope_tables(jnp.arange(T)[None], config)
    free = ((0, 0), (0, 0), (0, columns - T), (0, 0))
    x_BTD, keys, values = embedding(weights["embedding_VD"], tokens_BT), [], []
    for block in _blocks(config, weights):
        x_BTD, q_BTNH, k_BTKH, v_BTKH = block.heads(x_BTD, rope)
        with jax.named_scope("attention"):
            o_BTNH = attention(q_BTNH, k_BTKH, v_BTKH)
        x_BTD = block.above_attention(x_BTD, o_BTNH)
        keys.append(jnp.pad(k_BTKH.swapaxes(1, 2), free))
        values.append(jnp.pad(v_BTKH.swapaxes(1, 2), free))
    cache = Cache(tuple(keys), tuple(values), jnp.arange(columns) < lengths_B[:, None])
    # Nobody wants the logits of the other positions, and they are V wide.
    return _logits(config, weights, x_BTD[jnp.arange(B), lengths_B - 1]), cache


def decode(
    config: LlamaConfig,
    weights: Weights,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    column: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Reads one more token of each row: logits (B, V) after it, and the cache with it.

    Args:
      config: the model.
      weights: as `for_decoding` gives them, in the dtype to compute in.
      tokens_B: the tokens.
      positions_B: where each stands in its row's text.
      column: where all of them go in the cache.
      cache: of the tokens before. Donate it, and it is written in place.
    """
    rope = rope_tables(positions_B[:, None], config)
    filled_BS = cache.filled_BS.at[:, column].set(True)
    x_B1D, keys, values = embedding(weights["embedding_VD"], tokens_B[:, None]), [], []
    layers = zip(_blocks(config, weights), cache.keys_BKSH, cache.values_BKSH, strict=True)
    for block, k_BKSH, v_BKSH in layers:
        x_B1D, q_B1NH, k_B1KH, v_B1KH = block.heads(x_B1D, rope)
        keys.append(k_BKSH.at[:, :, column].set(k_B1KH[:, 0]))
        values.append(v_BKSH.at[:, :, column].set(v_B1KH[:, 0]))
        with jax.named_scope("attention"):
            o_B1NH = cached_attention(q_B1NH, keys[-1], values[-1], filled_BS)
        x_B1D = block.above_attention(x_B1D, o_B1NH)
    return _logits(config, weights, x_B1D[:, 0]), Cache(tuple(keys), tuple(values), filled_BS)


def _blocks(config: LlamaConfig, weights: Weights) -> list[Block]:
    return [make_block(config, block) for block in weights["blocks"]]


def _logits(config: LlamaConfig, weights: Weights, x_BD: jax.Array) -> jax.Array:
    """Logits (B, V) from one position of the stream above the last block."""
    with jax.named_scope("head"):
        return rms_norm(x_BD, config.norm_eps)[0] @ weights["head_DV"]
