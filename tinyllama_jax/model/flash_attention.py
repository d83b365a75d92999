"""FlashAttention-2 (Dao 2023) with documents and grouped queries, over either set of kernels.

Shapes: B batch, T tokens, N query heads, K kv heads, G = N / K, H head width.

A kernel owns a tile of rows and walks over tiles of columns. Which columns, and which of them need
a mask, is worked out here, so that documents which do not see each other cost nothing.
"""

import functools
import types
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.model.tiles import Call, Tile, Tiles

HEAD_WIDTHS = (32, 64, 128)  # of the kernels; others are padded with zeros to the next


def padded_width(H: int) -> int:
    """The head width that the kernels compute a head of width H in."""
    return next(width for width in HEAD_WIDTHS if width >= H)


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    causal: bool,
    scale: float,
    kernels: types.ModuleType,
    tiles: Tiles,
    interpret: bool = False,
    compute_capability: int | None = None,
) -> jax.Array:
    """o_BTNH by `kernels`, a module with `forward`, `dq` and `dkdv`; differentiable in q, k and v.

    The residuals carry the names `attn_o` and `attn_lse`: a `jax.checkpoint` that saves them, and
    q, k and v or what they come from, never runs the forward kernel again.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    padded_T = -(-T // tiles.padding()) * tiles.padding()
    padded_H = padded_width(H)

    def pad(x_BTNH):
        return jnp.pad(x_BTNH, ((0, 0), (0, padded_T - T), (0, 0), (0, padded_H - H)))

    if segment_ids_BT is not None:
        segment_ids_BT = segment_ids_BT.astype(jnp.int32)
        segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padded_T - T)), mode="edge")
    call = Call(tiles, causal, scale, T, interpret, compute_capability)
    padded = (pad(x) for x in (q_BTNH, k_BTKH, v_BTKH))
    o_BTNH: jax.Array = _attention(kernels, call, *padded, segment_ids_BT)
    return o_BTNH[:, :T, :, :H]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(kernels, call: Call, q_BTNH, k_BTKH, v_BTKH, segments_BT):
    return _forward(kernels, call, q_BTNH, k_BTKH, v_BTKH, segments_BT)[0]


def _forward(kernels, call, q_BTNH, k_BTKH, v_BTKH, segments_BT):
    documents = find_documents(segments_BT, q_BTNH.shape[1])
    ranges = column_ranges(documents, call, call.tiles.forward, rows="queries")
    o_BTNH, lse_BNT = kernels.forward(call, ranges, segments_BT, q_BTNH, k_BTKH, v_BTKH)
    o_BTNH = checkpoint_name(o_BTNH, "attn_o")
    lse_BNT = checkpoint_name(lse_BNT, "attn_lse")
    return o_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, o_BTNH, lse_BNT)


def _backward(kernels, call, residuals, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segments_BT, o_BTNH, lse_BNT = residuals
    # What every score of a query is pulled down by: sum_s p_ts dp_ts = do_t . o_t (Dao et al. 2022,
    # appendix B.2, equation 4).
    delta_BTN = jnp.sum(o_BTNH.astype(jnp.float32) * do_BTNH.astype(jnp.float32), axis=-1)
    inputs = (q_BTNH, k_BTKH, v_BTKH, do_BTNH, lse_BNT, delta_BTN.swapaxes(1, 2))
    documents = find_documents(segments_BT, q_BTNH.shape[1])
    dq_ranges = column_ranges(documents, call, call.tiles.dq, rows="queries")
    dkdv_ranges = column_ranges(documents, call, call.tiles.dkdv, rows="keys")
    dq_BTNH = kernels.dq(call, dq_ranges, segments_BT, *inputs)
    dk_BTKH, dv_BTKH = kernels.dkdv(call, dkdv_ranges, segments_BT, *inputs)
    return dq_BTNH, dk_BTKH, dv_BTKH, None


_attention.defvjp(_forward, _backward)


class Documents(NamedTuple):
    """Where the segment of each token lies: (B, T), or NumPy's (1, T) where all rows are alike."""

    first: jax.Array | np.ndarray
    """The first token of the same segment, and"""
    last: jax.Array | np.ndarray
    """the last one; a segment may come back after others."""
    run_first: jax.Array | np.ndarray
    """The first token of the unbroken run of the segment, and"""
    run_last: jax.Array | np.ndarray
    """the last one."""


def find_documents(segments_BT: jax.Array | None, T: int) -> Documents:
    """The documents of packed rows; one that fills the row where there are no segments."""
    if segments_BT is None:
        zeros_1T, last_1T = np.zeros((1, T), np.int32), np.full((1, T), T - 1, np.int32)
        return Documents(zeros_1T, last_1T, zeros_1T, last_1T)
    positions_1T = jnp.arange(T)[None]
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]  # fused away, never in memory
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    ends_BT = jnp.pad(changes_BT, ((0, 0), (0, 1)), constant_values=True)
    return Documents(
        jnp.min(jnp.where(same_BTS, positions_1T[:, None], T), axis=-1),
        jnp.max(jnp.where(same_BTS, positions_1T[:, None], -1), axis=-1),
        first_of_run(segments_BT),
        jax.lax.cummin(jnp.where(ends_BT, positions_1T, T - 1), axis=1, reverse=True),
    )


def first_of_run(segments_BT: jax.Array) -> jax.Array:
    """Of each token, the place (B, T) where the unbroken run of its segment begins."""
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)), constant_values=True)
    positions_1T = jnp.arange(segments_BT.shape[1])[None]
    return jax.lax.cummax(jnp.where(starts_BT, positions_1T, 0), axis=1)


def column_ranges(
    documents: Documents, call: Call, tile: Tile, rows: Literal["queries", "keys"]
) -> jax.Array | np.ndarray:
    """The columns that a tile of rows has to walk over, in tiles of columns.

    Returns:
      int32 (B, T / tile.rows, 4) of start <= full_start <= full_stop <= stop: outside
      [start, stop) no row of the tile sees a column, in [full_start, full_stop) every row sees
      every column and needs no mask.
    """
    xp = np if isinstance(documents.first, np.ndarray) else jnp  # constants stay constants
    B, T = documents.first.shape
    positions_1T = xp.arange(T)[None]
    # The rows of a tile are one document if its last row's run began no later than its first row.
    first_row_I = xp.arange(0, T, tile.rows)
    last_row_I = first_row_I + tile.rows - 1
    run_first_BI = documents.run_first[:, last_row_I]
    run_last_BI = documents.run_last[:, last_row_I]

    low_BT, high_BT = documents.first, documents.last
    full_low_BI, full_high_BI = run_first_BI, run_last_BI
    if call.causal and rows == "queries":
        high_BT = xp.broadcast_to(positions_1T, high_BT.shape)
        full_high_BI = xp.broadcast_to(first_row_I, run_last_BI.shape)
    elif call.causal:
        low_BT = xp.broadcast_to(positions_1T, low_BT.shape)
        full_low_BI = xp.broadcast_to(last_row_I, run_first_BI.shape)
    high_BT = xp.minimum(high_BT, call.length - 1)
    full_high_BI = xp.minimum(full_high_BI, call.length - 1)

    start_BI = xp.min(low_BT.reshape(B, -1, tile.rows), axis=-1) // tile.columns
    stop_BI = xp.max(high_BT.reshape(B, -1, tile.rows), axis=-1) // tile.columns + 1
    full_start_BI = xp.clip(-(-full_low_BI // tile.columns), start_BI, stop_BI)
    full_stop_BI = xp.clip((full_high_BI + 1) // tile.columns, full_start_BI, stop_BI)
    one_document_BI = run_first_BI <= first_row_I
    full_start_BI = xp.where(one_document_BI, full_start_BI, start_BI)
    full_stop_BI = xp.where(one_document_BI, full_stop_BI, start_BI)
    bounds = [start_BI, full_start_BI, full_stop_BI, stop_BI]
    return xp.stack(bounds, axis=-1).astype(np.int32)
