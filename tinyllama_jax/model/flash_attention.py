"""FlashAttention-2 (Dao 2023) for packed documents and grouped queries.

The kernels themselves are in pallas_kernels.py and triton_kernels.py; this file is what they share.
Each program of a kernel owns a tile of rows and loops over tiles of columns. This file computes
beforehand which tiles of columns a program has to visit, and which of those need a mask, so that
pairs of documents that do not see each other cost no time.

Shapes: B batch, T tokens, S = T (the second axis of a T x T matrix), N query heads, K kv heads,
G = N / K, H head width, I tiles of rows.
"""

import functools
import types
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.model.tiles import Call, Tile, Tiles

# The head widths that the kernels support. Other heads are padded with zeros to the next width.
HEAD_WIDTHS = (32, 64, 128)


def padded_width(H: int) -> int:
    """Returns the head width to which the kernels pad a head of width H, at most 128."""
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
    """Computes attention with one of the two sets of kernels; differentiable in q, k and v.

    Two residuals of the backward pass carry names for `jax.checkpoint`: `attn_o` and `attn_lse`. A
    policy that saves both, and also q, k and v or their inputs, never runs the forward kernel
    again.

    Args:
      q_BTNH: queries; query head n reads kv head n // G.
      k_BTKH: keys.
      v_BTKH: values.
      segment_ids_BT: a token sees only tokens with its own segment id; None: it sees all.
      causal: whether a query sees only the keys up to its own position.
      scale: factor on the scores.
      kernels: a module with the functions `forward`, `dq` and `dkdv`.
      tiles: tile sizes for those kernels, for this head width and dtype.
      interpret: run the kernels in Pallas' interpreter, on a CPU.
      compute_capability: of the GPU to compile for, 80 for 8.0; only the Triton kernels use it.

    Returns:
      o_BTNH in the dtype of the queries.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    padded_T = -(-T // tiles.padding()) * tiles.padding()
    padded_H = padded_width(H)

    def pad(x_BTNH):
        return jnp.pad(x_BTNH, ((0, 0), (0, padded_T - T), (0, 0), (0, padded_H - H)))

    if segment_ids_BT is not None:
        segment_ids_BT = segment_ids_BT.astype(jnp.int32)
        # The padding continues the last document: any number might be the id of another one, and a
        # padded query that sees no key at all would divide by zero.
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
    # The derivative of the softmax subtracts sum_s p_ts dp_ts from the gradient of each of a
    # query's scores. That sum equals do_t . o_t (Dao et al. 2022, appendix B.2, equation 4), so it
    # is computed once here and no kernel has to loop over the columns a second time for it.
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
    """For each token the positions that its segment spans.

    Every field has shape (B, T), or is a NumPy array of shape (1, T) where all rows are alike. The
    same segment id may come back after other segments, so the span of a segment and the unbroken
    run around a token can differ. The span bounds what a token can see; only inside an unbroken
    run is it certain that every token sees every other.
    """

    first: jax.Array | np.ndarray
    """The first position with the token's segment id."""
    last: jax.Array | np.ndarray
    """The last position with the token's segment id."""
    run_first: jax.Array | np.ndarray
    """The first position of the unbroken run of that id around the token."""
    run_last: jax.Array | np.ndarray
    """The last position of the unbroken run of that id around the token."""


def find_documents(segments_BT: jax.Array | None, T: int) -> Documents:
    """Finds the documents of packed rows; without segments, one document fills each row."""
    if segments_BT is None:
        # NumPy arrays, not JAX's: `column_ranges` then computes its result while the step is
        # traced, and the kernels receive constants.
        zeros_1T, last_1T = np.zeros((1, T), np.int32), np.full((1, T), T - 1, np.int32)
        return Documents(zeros_1T, last_1T, zeros_1T, last_1T)
    positions_1T = jnp.arange(T)[None]
    # The compiler fuses this comparison into the two reductions below, so T x T booleans never
    # stand in memory.
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    ends_BT = jnp.pad(changes_BT, ((0, 0), (0, 1)), constant_values=True)
    return Documents(
        jnp.min(jnp.where(same_BTS, positions_1T[:, None], T), axis=-1),
        jnp.max(jnp.where(same_BTS, positions_1T[:, None], -1), axis=-1),
        first_of_run(segments_BT),
        jax.lax.cummin(jnp.where(ends_BT, positions_1T, T - 1), axis=1, reverse=True),
    )


def first_of_run(segments_BT: jax.Array) -> jax.Array:
    """Returns for each token the position at which its segment's unbroken run begins, (B, T)."""
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)), constant_values=True)
    positions_1T = jnp.arange(segments_BT.shape[1])[None]
    return jax.lax.cummax(jnp.where(starts_BT, positions_1T, 0), axis=1)


def column_ranges(
    documents: Documents, call: Call, tile: Tile, rows: Literal["queries", "keys"]
) -> jax.Array | np.ndarray:
    """Computes which tiles of columns each tile of rows has to visit.

    Args:
      documents: the documents of the rows of the batch.
      call: says whether attention is causal and how long the rows are without padding.
      tile: the tile sizes of the kernel.
      rows: whether the kernel's rows are "queries" (forward, dQ) or "keys" (dK/dV).

    Returns:
      int32 (B, T / tile.rows, 4): four numbers start <= full_start <= full_stop <= stop for each
      tile of rows, which count tiles of columns. Outside [start, stop) no row sees any column.
      Inside [full_start, full_stop) every row sees every column, so no mask is needed.
    """
    xp = np if isinstance(documents.first, np.ndarray) else jnp
    B, T = documents.first.shape
    positions_1T = xp.arange(T)[None]
    # The rows of a tile belong to one document if the run of its last row began no later than its
    # first row.
    first_row_I = xp.arange(0, T, tile.rows)
    last_row_I = first_row_I + tile.rows - 1
    run_first_BI = documents.run_first[:, last_row_I]
    run_last_BI = documents.run_last[:, last_row_I]

    # Each row can see columns from low to high; all rows of a tile see every column from full_low
    # to full_high. Causal attention moves one end of both ranges to the position of the row itself:
    # a query's upper end, or a key's lower end.
    low_BT, high_BT = documents.first, documents.last
    full_low_BI, full_high_BI = run_first_BI, run_last_BI
    if call.causal and rows == "queries":
        high_BT = xp.broadcast_to(positions_1T, high_BT.shape)
        full_high_BI = xp.broadcast_to(first_row_I, run_last_BI.shape)
    elif call.causal:
        low_BT = xp.broadcast_to(positions_1T, low_BT.shape)
        full_low_BI = xp.broadcast_to(last_row_I, run_first_BI.shape)
    # Columns of padding at the end of a row are seen by no one.
    high_BT = xp.minimum(high_BT, call.length - 1)
    full_high_BI = xp.minimum(full_high_BI, call.length - 1)

    # From tokens to tiles: [start, stop) is rounded outward, the full range inward.
    start_BI = xp.min(low_BT.reshape(B, -1, tile.rows), axis=-1) // tile.columns
    stop_BI = xp.max(high_BT.reshape(B, -1, tile.rows), axis=-1) // tile.columns + 1
    full_start_BI = xp.clip(-(-full_low_BI // tile.columns), start_BI, stop_BI)
    full_stop_BI = xp.clip((full_high_BI + 1) // tile.columns, full_start_BI, stop_BI)
    # A tile of rows that holds the end of a document has no full columns.
    one_document_BI = run_first_BI <= first_row_I
    full_start_BI = xp.where(one_document_BI, full_start_BI, start_BI)
    full_stop_BI = xp.where(one_document_BI, full_stop_BI, start_BI)
    bounds = [start_BI, full_start_BI, full_stop_BI, stop_BI]
    return xp.stack(bounds, axis=-1).astype(np.int32)
