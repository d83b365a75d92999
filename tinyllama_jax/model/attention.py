"""Causal grouped-query attention behind one contract.

Shapes: B batch, T query length, S key length, N query heads, K kv heads, G = N / K, H head width.
"""

import math

import jax
import jax.numpy as jnp


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T + mask) v (Vaswani et al. 2017, section 3.2.1), softmax in fp32.

    Args:
      q_BTNH: queries; query head n reads kv head n // (N / K).
      k_BSKH: keys.
      v_BSKH: values.
      causal: query t sees keys up to t; asks for T equal to S.
      segment_ids: integers of shape (B, T), T equal to S; a token sees its own segment alone.
      scale: factor on the scores, 1 / sqrt(H) by default.

    Returns:
      o_BTNH in the dtype of the queries.

    Raises:
      ValueError: shapes that do not fit together.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or N % K:
        raise ValueError(f"q {q_BTNH.shape}, k {k_BSKH.shape} and v {v_BSKH.shape} do not fit.")
    if (causal or segment_ids is not None) and T != S:
        raise ValueError(f"{T} queries and {S} keys: a mask needs as many of both.")
    if segment_ids is not None and segment_ids.shape != (B, T):
        raise ValueError(f"segment_ids {segment_ids.shape} must have shape {(B, T)}.")
    scale = 1 / math.sqrt(H) if scale is None else scale

    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    visible_BTS = jnp.ones((1, T, S), bool)
    if causal:
        visible_BTS &= jnp.tri(T, S, dtype=bool)
    if segment_ids is not None:
        visible_BTS &= segment_ids[:, :, None] == segment_ids[:, None, :]
    # The smallest finite number and not -inf: a row without any visible key stays finite.
    lowest = jnp.finfo(jnp.float32).min
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, lowest)
    probabilities_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", probabilities_BKGTS, v_BSKH)
    return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
