"""FlashAttention's three kernels in Triton, called through jax-triton.

A program of the forward or the dQ kernel owns a tile of queries and loops over keys. A program of
the dK/dV kernel owns a tile of keys and loops over the queries of all G query heads that read them.
So no two programs add to the same output, there are no atomic additions, and the same inputs give
the same bits.

Arrays are (B, T, heads, H) in memory. All sizes are compile-time constants of a kernel. On Hopper
GPUs the tiles can be loaded through the tensor memory accelerator (`Tile.tma`).

Shapes as in flash_attention.py; R rows that a program owns, C columns that it takes in a loop step,
S tokens of a tile of either kind. Scores and log-sum-exps (`lse`) are exponents of 2.
"""

# pyright knows neither that `tl.range` can be iterated, which only Triton's own compiler does, nor
# TensorDescriptor, which exists from jax-triton 0.4.1 on.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import inspect
import os

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jax.interpreters import partial_eval

from tinyllama_jax.model.tiles import Call

# Triton 3.9 brings two assemblers along, and from Hopper on it writes PTX in the version of the
# newer one, CUDA 13's. The assembler of JAX's CUDA 12 refuses to read that version, so Triton is
# told to use its older assembler for both.
os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", triton.knobs.nvidia.ptxas.path)

# The score of a pair that must not see each other. It is finite so that the difference of two such
# scores is 0 and not NaN.
LOWEST = tl.constexpr(-1e30)

# The columns that a tile of rows visits form three sections. Only the middle one needs no mask.
NEAR, FULL, FAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _load_tile(x, token, head, HEADS: tl.constexpr, H: tl.constexpr, S: tl.constexpr, TMA):
    """Loads x_SH: S tokens of one head. `token` counts through the rows of the whole batch."""
    if TMA:
        x_SH = x.load([token, head * H])
    else:
        tokens_S, widths_H = tl.arange(0, S), tl.arange(0, H)
        # In 64 bits, because the arrays of a batch may hold more than 2^31 numbers.
        x += token.to(tl.int64) * (HEADS * H) + head * H
        x_SH = tl.load(x + tokens_S[:, None] * (HEADS * H) + widths_H[None, :])
    return x_SH


@triton.jit
def _store_tile(x, x_SH, token, head, HEADS: tl.constexpr, H: tl.constexpr, S: tl.constexpr):
    tokens_S, widths_H = tl.arange(0, S), tl.arange(0, H)
    x += token.to(tl.int64) * (HEADS * H) + head * H
    tl.store(x + tokens_S[:, None] * (HEADS * H) + widths_H[None, :], x_SH.to(x.dtype.element_ty))


@triton.jit
def _load_segments(segments, token, S: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Loads segments_S, the segment ids of S tokens; all 0 where there are no documents."""
    if DOCUMENTS:
        segments_S = tl.load(segments + token + tl.arange(0, S))
    else:
        segments_S = tl.zeros([S], tl.int32)
    return segments_S


@triton.jit
def _visible(queries, query_segments, keys, key_segments, LENGTH, CAUSAL, DOCUMENTS):
    """Returns which pairs see each other; queries and keys lie along different axes."""
    # Causal attention needs no comparison with the length: padding stands at the end of a row, so
    # no real query sees a padded key.
    visible = keys <= queries if CAUSAL else keys < LENGTH
    if DOCUMENTS:
        visible = visible & (query_segments == key_segments)
    return visible


@triton.jit
def _dot(a, b):
    # By default the tensor cores would round fp32 operands to TF32, which costs three decimal
    # digits. The fp32 kernels exist to verify others, so they must keep all digits.
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def flash_forward(
    ranges,
    segments,
    q,
    k,
    v,
    o,
    lse,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    LENGTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FIRST_SECTION: tl.constexpr,
    LAST_SECTION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Computes the attention of R queries of one head, and the log-sum-exp of their scores."""
    head, batch = tl.program_id(0), tl.program_id(1)
    # Programs start in the order of their numbers. The last queries see the most keys and come
    # first, so that no long program runs alone at the end.
    row_tile = T // R - 1 - tl.program_id(2)
    first_row = row_tile * R
    rows_R = first_row + tl.arange(0, R)
    segments_R = _load_segments(segments, batch * T + first_row, R, DOCUMENTS)
    q_RH = _load_tile(q, batch * T + first_row, head, N, H, R, TMA)

    o_RH = tl.zeros([R, H], tl.float32)
    peak_R = tl.full([R], LOWEST, tl.float32)
    total_R = tl.zeros([R], tl.float32)
    bounds = ranges + 4 * ((batch * (T // R) if DOCUMENTS else 0) + row_tile)
    for section in tl.static_range(FIRST_SECTION, LAST_SECTION + 1):
        start, stop = tl.load(bounds + section), tl.load(bounds + section + 1)
        for column_tile in tl.range(start, stop):
            first_column = column_tile * C
            k_CH = _load_tile(k, batch * T + first_column, head // (N // K), K, H, C, TMA)
            scores_RC = _dot(q_RH, tl.trans(k_CH))
            if section != FULL:
                columns_C = first_column + tl.arange(0, C)
                segments_C = _load_segments(segments, batch * T + first_column, C, DOCUMENTS)
                visible_RC = _visible(
                    rows_R[:, None],
                    segments_R[:, None],
                    columns_C[None, :],
                    segments_C[None, :],
                    LENGTH,
                    CAUSAL,
                    DOCUMENTS,
                )
                scores_RC = tl.where(visible_RC, scores_RC, LOWEST)
            new_peak_R = tl.maximum(peak_R, tl.max(scores_RC, axis=1) * SCALE_LOG2)
            weights_RC = tl.exp2(scores_RC * SCALE_LOG2 - new_peak_R[:, None])
            # With documents a row may meet tiles of which it sees nothing before the first that it
            # sees. Its peak is still LOWEST then, scores minus peak are 0, and the hidden columns
            # would count with weight 1. Without documents every row sees column 0 in its first
            # tile, so its peak is that of a real score, and no second mask is needed.
            if DOCUMENTS and section != FULL:
                weights_RC = tl.where(visible_RC, weights_RC, 0.0)
            shrink_R = tl.exp2(peak_R - new_peak_R)
            v_CH = _load_tile(v, batch * T + first_column, head // (N // K), K, H, C, TMA)
            o_RH = o_RH * shrink_R[:, None] + _dot(weights_RC.to(v_CH.dtype), v_CH)
            total_R = total_R * shrink_R + tl.sum(weights_RC, axis=1)
            peak_R = new_peak_R

    # Divided by the sum once at the end and not in every step, as FlashAttention-2 does.
    _store_tile(o, o_RH * (1 / total_R)[:, None], batch * T + first_row, head, N, H, R)
    lse_R = peak_R + tl.log2(total_R)
    tl.store(lse + (batch * N + head).to(tl.int64) * T + rows_R, lse_R)


@triton.jit
def flash_dq(
    ranges,
    segments,
    q,
    k,
    v,
    do,
    lse,
    delta,
    dq,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    LENGTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FIRST_SECTION: tl.constexpr,
    LAST_SECTION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Computes the gradient of R queries of one head."""
    head, batch = tl.program_id(0), tl.program_id(1)
    row_tile = T // R - 1 - tl.program_id(2)
    first_row = row_tile * R
    rows_R = first_row + tl.arange(0, R)
    segments_R = _load_segments(segments, batch * T + first_row, R, DOCUMENTS)
    q_RH = _load_tile(q, batch * T + first_row, head, N, H, R, TMA)
    do_RH = _load_tile(do, batch * T + first_row, head, N, H, R, TMA)
    sums = (batch * N + head).to(tl.int64) * T
    lse_R, delta_R = tl.load(lse + sums + rows_R), tl.load(delta + sums + rows_R)

    dq_RH = tl.zeros([R, H], tl.float32)
    bounds = ranges + 4 * ((batch * (T // R) if DOCUMENTS else 0) + row_tile)
    for section in tl.static_range(FIRST_SECTION, LAST_SECTION + 1):
        start, stop = tl.load(bounds + section), tl.load(bounds + section + 1)
        for column_tile in tl.range(start, stop):
            first_column = column_tile * C
            k_CH = _load_tile(k, batch * T + first_column, head // (N // K), K, H, C, TMA)
            scores_RC = _dot(q_RH, tl.trans(k_CH))
            # The mask comes after the exponential here, unlike in the forward kernel, whose maximum
            # must not see hidden scores. Where a hidden score gives inf, the mask makes it 0.
            weights_RC = tl.exp2(scores_RC * SCALE_LOG2 - lse_R[:, None])
            if section != FULL:
                columns_C = first_column + tl.arange(0, C)
                segments_C = _load_segments(segments, batch * T + first_column, C, DOCUMENTS)
                visible_RC = _visible(
                    rows_R[:, None],
                    segments_R[:, None],
                    columns_C[None, :],
                    segments_C[None, :],
                    LENGTH,
                    CAUSAL,
                    DOCUMENTS,
                )
                weights_RC = tl.where(visible_RC, weights_RC, 0.0)
            v_CH = _load_tile(v, batch * T + first_column, head // (N // K), K, H, C, TMA)
            dscores_RC = weights_RC * (_dot(do_RH, tl.trans(v_CH)) - delta_R[:, None])
            dq_RH += _dot(dscores_RC.to(k_CH.dtype), k_CH)

    # The scale multiplies fp32 sums. In q itself, in bf16, it would cost one more rounding.
    _store_tile(dq, dq_RH * SCALE, batch * T + first_row, head, N, H, R)


@triton.jit
def flash_dkdv(
    ranges,
    segments,
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    LENGTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FIRST_SECTION: tl.constexpr,
    LAST_SECTION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Computes the gradients of R keys and values of one kv head, over all of its query heads."""
    kv_head, batch, row_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = row_tile * R
    rows_R = first_row + tl.arange(0, R)
    segments_R = _load_segments(segments, batch * T + first_row, R, DOCUMENTS)
    k_RH = _load_tile(k, batch * T + first_row, kv_head, K, H, R, TMA)
    v_RH = _load_tile(v, batch * T + first_row, kv_head, K, H, R, TMA)

    dk_RH, dv_RH = tl.zeros([R, H], tl.float32), tl.zeros([R, H], tl.float32)
    bounds = ranges + 4 * ((batch * (T // R) if DOCUMENTS else 0) + row_tile)
    for group_head in tl.range(N // K):
        head = kv_head * (N // K) + group_head
        sums = (batch * N + head).to(tl.int64) * T
        for section in tl.static_range(FIRST_SECTION, LAST_SECTION + 1):
            start, stop = tl.load(bounds + section), tl.load(bounds + section + 1)
            for column_tile in tl.range(start, stop):
                first_column = column_tile * C
                columns_C = first_column + tl.arange(0, C)
                q_CH = _load_tile(q, batch * T + first_column, head, N, H, C, TMA)
                scores_RC = _dot(k_RH, tl.trans(q_CH))
                lse_C = tl.load(lse + sums + columns_C)
                weights_RC = tl.exp2(scores_RC * SCALE_LOG2 - lse_C[None, :])
                if section != FULL:
                    segments_C = _load_segments(segments, batch * T + first_column, C, DOCUMENTS)
                    visible_RC = _visible(
                        columns_C[None, :],
                        segments_C[None, :],
                        rows_R[:, None],
                        segments_R[:, None],
                        LENGTH,
                        CAUSAL,
                        DOCUMENTS,
                    )
                    weights_RC = tl.where(visible_RC, weights_RC, 0.0)
                do_CH = _load_tile(do, batch * T + first_column, head, N, H, C, TMA)
                dv_RH += _dot(weights_RC.to(do_CH.dtype), do_CH)
                delta_C = tl.load(delta + sums + columns_C)
                dscores_RC = weights_RC * (_dot(v_RH, tl.trans(do_CH)) - delta_C[None, :])
                dk_RH += _dot(dscores_RC.to(q_CH.dtype), q_CH)

    _store_tile(dk, dk_RH * SCALE, batch * T + first_row, kv_head, K, H, R)
    _store_tile(dv, dv_RH, batch * T + first_row, kv_head, K, H, R)


def _run(kernel, tile, compute_capability, grid, inputs, outputs, constants):
    """Calls `kernel` through whichever version of jax-triton is installed.

    `inputs` are pairs (array, block): the shape of the blocks that a TMA descriptor loads, or None
    for an array that is read through a pointer.
    """
    # Imported here and not above, because jax-triton before 0.4 looks for JAX's CUDA plugin when it
    # is imported, and this module is also imported where there is no GPU.
    import jax_triton
    from jax_triton import triton_lib

    # jax-triton 0.4.1 registers a rule of its own for removing unused kernels. That rule keeps
    # kernels whose results nobody reads, such as a forward pass that `jax.checkpoint` does not need
    # a second time, and fails on JAX 0.12, which calls rules with other arguments. These kernels
    # have no side effects, so JAX's default rule is right once that one is gone.
    partial_eval.dce_rules.pop(triton_lib.triton_kernel_call_p, None)
    has_tma = hasattr(jax_triton, "TensorDescriptor") and (compute_capability or 90) >= 90
    if tile.tma and not has_tma:
        raise ValueError(
            "Tiles with tma=True need Hopper or later and jax-triton 0.4.1 or later (Python 3.12, "
            "jax 0.11): upgrade jax-triton, or take tiles without tma."
        )
    operands = [
        array if block is None else jax_triton.TensorDescriptor.from_array(array, block)
        for array, block in inputs
    ]
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
        # Asks explicitly to join products and sums into FMA instructions, because Triton is going
        # to change its default.
        options = dict(out_type=outputs, backend_options={"enable_fp_fusion": True})
    else:  # jax-triton before 0.4
        options = dict(out_shape=outputs)
    with jax.named_scope(kernel.__name__):
        return jax_triton.triton_call(
            *operands,
            kernel=kernel,
            name=kernel.__name__,
            grid=grid,
            num_warps=tile.warps,
            num_stages=tile.stages,
            compute_capability=compute_capability,
            **options,
            **constants,
        )


def _launch(kernel, rows, call, tile, ranges, segments_BT, tokens, sums, outputs):
    """Runs `kernel` as a grid of (heads, B, T / R) programs.

    `rows` says whether a program owns "queries" or "keys". `tokens` are pairs of an array shaped
    like q, k or v and the number of its tokens that a program loads at once. `sums` are the arrays
    of shape (B, N, T).
    """
    (q_BTNH, _), (k_BTKH, _) = tokens[:2]
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    documents = segments_BT is not None
    near = documents or (call.causal and rows == "keys")
    far = documents or (call.causal and rows == "queries") or call.length < T
    # A kernel without documents never reads the segments, but the argument must be some array.
    masks = [(ranges, None), (segments_BT if documents else ranges, None)]
    if tile.tma:
        # TMA loads rectangles. With the heads side by side, some tokens of one head are a rectangle
        # of an array (B T, heads H).
        tokens = [(x.reshape(B * T, -1), (size, H)) for x, size in tokens]
    else:
        tokens = [(x, None) for x, _ in tokens]
    constants = dict(
        T=T,
        N=N,
        K=K,
        H=H,
        R=tile.rows,
        C=tile.columns,
        SCALE=call.scale,
        SCALE_LOG2=call.scale_log2,
        LENGTH=call.length,
        CAUSAL=call.causal,
        DOCUMENTS=documents,
        FIRST_SECTION=NEAR.value if near else FULL.value,
        LAST_SECTION=FAR.value if far else FULL.value,
        TMA=tile.tma,
    )
    grid = (N if rows == "queries" else K, B, T // tile.rows)
    inputs = masks + tokens + [(x, None) for x in sums]
    inputs = [(jnp.asarray(array), block) for array, block in inputs]
    return _run(kernel, tile, call.compute_capability, grid, inputs, outputs, constants)


def forward(
    call: Call,
    ranges: jax.Array | np.ndarray,
    segments_BT: jax.Array | None,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
) -> list[jax.Array]:
    """Returns o_BTNH in the dtype of q, and lse_BNT in fp32, the base-2 log-sum-exp of scores.

    `ranges` is what `column_ranges` returns for this kernel's tile.
    """
    B, T, N, _ = q_BTNH.shape
    tile = call.tiles.forward
    tokens = [(q_BTNH, tile.rows), (k_BTKH, tile.columns), (v_BTKH, tile.columns)]
    outputs = [
        jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    ]
    launch = (flash_forward, "queries", call, tile, ranges, segments_BT)
    return _launch(*launch, tokens, [], outputs)


def dq(
    call: Call,
    ranges: jax.Array | np.ndarray,
    segments_BT: jax.Array | None,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    do_BTNH: jax.Array,
    lse_BNT: jax.Array,
    delta_BNT: jax.Array,
) -> jax.Array:
    """Returns the gradient dq_BTNH; delta_BNT is the sum over H of do * o."""
    tile = call.tiles.dq
    tokens = [(q_BTNH, tile.rows), (k_BTKH, tile.columns), (v_BTKH, tile.columns)]
    tokens += [(do_BTNH, tile.rows)]
    outputs = [jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)]
    launch = (flash_dq, "queries", call, tile, ranges, segments_BT)
    return _launch(*launch, tokens, [lse_BNT, delta_BNT], outputs)[0]


def dkdv(
    call: Call,
    ranges: jax.Array | np.ndarray,
    segments_BT: jax.Array | None,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    do_BTNH: jax.Array,
    lse_BNT: jax.Array,
    delta_BNT: jax.Array,
) -> list[jax.Array]:
    """Returns the gradients dk_BTKH and dv_BTKH; delta_BNT is the sum over H of do * o."""
    tile = call.tiles.dkdv
    tokens = [(q_BTNH, tile.columns), (k_BTKH, tile.rows), (v_BTKH, tile.rows)]
    tokens += [(do_BTNH, tile.columns)]
    outputs = [jax.ShapeDtypeStruct(k_BTKH.shape, k_BTKH.dtype)] * 2
    launch = (flash_dkdv, "keys", call, tile, ranges, segments_BT)
    return _launch(*launch, tokens, [lse_BNT, delta_BNT], outputs)
