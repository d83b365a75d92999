"""FlashAttention's three kernels in Triton, through jax-triton.

Shapes as in flash_attention.py, and R rows that a program owns, C columns it takes in one step.
The forward and dQ kernels own queries and walk over keys. The dK/dV kernel owns keys and walks over
the queries of all G query heads that read them: no program adds to what another one writes.

Arrays are (B, T, heads, H) in memory, and all sizes are constants of a kernel. On Hopper the tiles
may come through the tensor memory accelerator (`Tile.tma`).
"""

# The ranges of Triton are for its own compiler, and TensorDescriptor came with jax-triton 0.4.1.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import inspect
import os

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.interpreters import partial_eval

# From Hopper on Triton 3.9 writes PTX for the newest of the two assemblers that it brings along,
# CUDA 13's, which the one of JAX's CUDA 12 refuses to read.
os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", triton.knobs.nvidia.ptxas.path)

LOWEST = tl.constexpr(-1e30)  # finite: the difference of two of them is 0 and not NaN

# The columns of a tile of rows lie in three sections, of which only the middle one needs no mask.
NEAR, FULL, FAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _load_tile(x, token, head, HEADS: tl.constexpr, H: tl.constexpr, S: tl.constexpr, TMA):
    """x_SH, S tokens of one head; tokens are counted through the whole batch."""
    if TMA:
        x_SH = x.load([token, head * H])
    else:
        tokens_S, widths_H = tl.arange(0, S), tl.arange(0, H)
        x += token.to(tl.int64) * (HEADS * H) + head * H  # a batch may hold 2^31 numbers and more
        x_SH = tl.load(x + tokens_S[:, None] * (HEADS * H) + widths_H[None, :])
    return x_SH


@triton.jit
def _store_tile(x, x_SH, token, head, HEADS: tl.constexpr, H: tl.constexpr, S: tl.constexpr):
    tokens_S, widths_H = tl.arange(0, S), tl.arange(0, H)
    x += token.to(tl.int64) * (HEADS * H) + head * H
    tl.store(x + tokens_S[:, None] * (HEADS * H) + widths_H[None, :], x_SH.to(x.dtype.element_ty))


@triton.jit
def _load_segments(segments, token, S: tl.constexpr, DOCUMENTS: tl.constexpr):
    """segments_S, all 0 where there are no documents."""
    if DOCUMENTS:
        segments_S = tl.load(segments + token + tl.arange(0, S))
    else:
        segments_S = tl.zeros([S], tl.int32)
    return segments_S


@triton.jit
def _visible(queries, query_segments, keys, key_segments, LENGTH, CAUSAL, DOCUMENTS):
    """Which pairs of tokens see each other; queries and keys lie along different axes."""
    visible = keys <= queries if CAUSAL else keys < LENGTH
    if DOCUMENTS:
        visible = visible & (query_segments == key_segments)
    return visible


@triton.jit
def _dot(a, b):
    # fp32 stays fp32: TF32 would cost three decimal digits.
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
    head, batch = tl.program_id(0), tl.program_id(1)
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
            # A row that has seen nothing yet has LOWEST for its peak; the first columns of a row
            # without documents are seen by all.
            if DOCUMENTS and section != FULL:
                weights_RC = tl.where(visible_RC, weights_RC, 0.0)
            shrink_R = tl.exp2(peak_R - new_peak_R)
            v_CH = _load_tile(v, batch * T + first_column, head // (N // K), K, H, C, TMA)
            o_RH = o_RH * shrink_R[:, None] + _dot(weights_RC.to(v_CH.dtype), v_CH)
            total_R = total_R * shrink_R + tl.sum(weights_RC, axis=1)
            peak_R = new_peak_R

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
    """Starts `kernel` on `inputs`, pairs (array, block that a TMA descriptor loads or None)."""
    import jax_triton  # here, because before 0.4 it asks for JAX's CUDA plugin at once
    from jax_triton import triton_lib

    # jax-triton 0.4.1 would keep kernels whose results nobody reads, such as a forward pass that
    # `jax.checkpoint` does not need again, and its rule takes other arguments than JAX 0.12 gives
    # it. Kernels without effects are what JAX's own rule is for.
    partial_eval.dce_rules.pop(triton_lib.triton_kernel_call_p, None)
    able = hasattr(jax_triton, "TensorDescriptor") and (compute_capability or 90) >= 90
    if tile.tma and not able:
        raise ValueError(
            "Tiles with tma=True need Hopper or later and jax-triton 0.4.1 or later (Python 3.12, "
            "jax 0.11): upgrade jax-triton, or take tiles without tma."
        )
    operands = [
        array if block is None else jax_triton.TensorDescriptor.from_array(array, block)
        for array, block in inputs
    ]
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
        # Triton is about to leave products and sums apart unless asked.
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

    `rows` says what they own, "queries" or "keys". `tokens` holds q, k, v and all that is shaped
    like them, with the tokens of it that a program loads at once, `sums` what is (B, N, T).
    """
    (q_BTNH, _), (k_BTKH, _) = tokens[:2]
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    documents = segments_BT is not None
    near = documents or (call.causal and rows == "keys")
    far = documents or (call.causal and rows == "queries") or call.length < T
    # A kernel without documents never reads the segments.
    masks = [(ranges, None), (segments_BT if documents else ranges, None)]
    if tile.tma:
        # One head of some tokens is a rectangle of (B T, heads H).
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


def forward(call, ranges, segments_BT, q_BTNH, k_BTKH, v_BTKH):
    """o_BTNH, and lse_BNT in logarithms of base 2."""
    B, T, N, _ = q_BTNH.shape
    tile = call.tiles.forward
    tokens = [(q_BTNH, tile.rows), (k_BTKH, tile.columns), (v_BTKH, tile.columns)]
    outputs = [
        jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    ]
    launch = (flash_forward, "queries", call, tile, ranges, segments_BT)
    return _launch(*launch, tokens, [], outputs)


def dq(call, ranges, segments_BT, q_BTNH, k_BTKH, v_BTKH, do_BTNH, lse_BNT, delta_BNT):
    """dq_BTNH."""
    tile = call.tiles.dq
    tokens = [(q_BTNH, tile.rows), (k_BTKH, tile.columns), (v_BTKH, tile.columns)]
    tokens += [(do_BTNH, tile.rows)]
    outputs = [jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)]
    launch = (flash_dq, "queries", call, tile, ranges, segments_BT)
    return _launch(*launch, tokens, [lse_BNT, delta_BNT], outputs)[0]


def dkdv(call, ranges, segments_BT, q_BTNH, k_BTKH, v_BTKH, do_BTNH, lse_BNT, delta_BNT):
    """dk_BTKH and dv_BTKH."""
    tile = call.tiles.dkdv
    tokens = [(q_BTNH, tile.columns), (k_BTKH, tile.rows), (v_BTKH, tile.rows)]
    tokens += [(do_BTNH, tile.columns)]
    outputs = [jax.ShapeDtypeStruct(k_BTKH.shape, k_BTKH.dtype)] * 2
    launch = (flash_dkdv, "keys", call, tile, ranges, segments_BT)
    return _launch(*launch, tokens, [lse_BNT, delta_BNT], outputs)
