"""FlashAttention's three kernels in Pallas, which JAX compiles for GPUs by way of Triton.

A program of the forward or the dQ kernel owns a tile of queries and loops over keys. A program of
the dK/dV kernel owns a tile of keys and loops over the queries of all G query heads that read them.
So no two programs add to the same output, there are no atomic additions, and the same inputs give
the same bits.

Shapes as in flash_attention.py; R rows that a program owns, C columns that it takes in a loop step.
Scores are exponents of 2, and so are the log-sum-exps (`lse`), because GPUs have an instruction for
powers of 2 alone.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tinyllama_jax.model.tiles import Call

# The score of a pair that must not see each other. It is finite so that the difference of two such
# scores is 0 and not NaN.
LOWEST = -1e30


def _dot(a, b):
    # By default the tensor cores would round fp32 operands to TF32, which costs three decimal
    # digits. The fp32 kernels exist to verify others, so they must keep all digits.
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _softmax_weights(scores_RC, shift, call):
    """Returns 2^(scores * scale - shift), in two GPU instructions per score.

    This is written in PTX because of how XLA compiles it: it does not join the product and the
    difference into one instruction (FMA), and does not take the fast exponential unless denormal
    numbers are flushed to zero in the whole program (`xla_gpu_ftz`). That makes five more
    instructions per score, and the forward kernel has few others.
    """
    shift_RC = jnp.broadcast_to(shift, scores_RC.shape)
    if call.interpret:
        return jnp.exp2(scores_RC * call.scale_log2 - shift_RC)
    scale_RC = jnp.full(scores_RC.shape, call.scale_log2, jnp.float32)
    # The assembler merges the negation into the FMA. A negation in JAX would be an instruction of
    # its own.
    code = "neg.ftz.f32 x, $3; fma.rn.ftz.f32 x, $1, $2, x; ex2.approx.ftz.f32 $0, x;"
    return _assembled(code, scores_RC, scale_RC, shift_RC)


def _exp2(x, call):
    return jnp.exp2(x) if call.interpret else _assembled("ex2.approx.ftz.f32 $0, $1;", x)


def _assembled(code: str, *arguments):
    """Runs PTX code on every element: $0 is the result, $1 the first argument, x a register."""
    return plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 x; {code} }}",
        args=arguments,
        constraints=",".join(["=f", *"f" * len(arguments)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)],
    )[0]


def _walk(ranges_ref, near: bool, far: bool, step: Callable, carry):
    """Loops `carry = step(column_tile, carry)` over the bounds that `column_ranges` computed.

    There are three loops, because only tiles before and after the fully visible ones need a mask,
    and a mask costs time. `near` and `far` say whether there can be any such tiles before and after
    them. A loop that can only be empty is left out of the program.
    """
    start, full_start, full_stop, stop = (ranges_ref[bound] for bound in range(4))
    masked, full = functools.partial(step, masked=True), functools.partial(step, masked=False)
    if near:
        carry = jax.lax.fori_loop(start, full_start, masked, carry)
    carry = jax.lax.fori_loop(full_start, full_stop, full, carry)
    return jax.lax.fori_loop(full_stop, stop, masked, carry) if far else carry


def _tokens(segments_ref, first, size: int, axis: int):
    """Returns the positions and segment ids of `size` tokens, along one axis of a tile."""
    positions = jnp.expand_dims(first + jnp.arange(size), 1 - axis)
    if segments_ref is None:
        return positions, None
    segments = plgpu.load(segments_ref.at[pl.ds(first, size)])
    return positions, jnp.expand_dims(segments, 1 - axis)


def _visible(queries, keys, causal: bool, length: int):
    """Returns which pairs see each other; `queries` and `keys` are results of `_tokens`."""
    # Causal attention needs no comparison with the length: padding stands at the end of a row, so
    # no real query sees a padded key.
    visible = keys[0] <= queries[0] if causal else keys[0] < length
    return visible if keys[1] is None else visible & (keys[1] == queries[1])


def _forward(call, tile, first_row, walk, segments_ref, q_ref, k_ref, v_ref, o_ref, lse_ref):
    queries = _tokens(segments_ref, first_row, tile.rows, axis=0)
    q_RH = plgpu.load(q_ref)

    def step(column_tile, carry, *, masked):
        o_RH, peak_R, total_R = carry
        first_column = column_tile * tile.columns
        columns = pl.ds(first_column, tile.columns)
        scores_RC = _dot(q_RH, plgpu.load(k_ref.at[columns, :]).T)
        if masked:
            keys = _tokens(segments_ref, first_column, tile.columns, axis=1)
            visible_RC = _visible(queries, keys, call.causal, call.length)
            scores_RC = jnp.where(visible_RC, scores_RC, LOWEST)
        new_peak_R = jnp.maximum(peak_R, jnp.max(scores_RC, axis=1) * call.scale_log2)
        weights_RC = _softmax_weights(scores_RC, new_peak_R[:, None], call)
        # With documents a row may meet tiles of which it sees nothing before the first that it
        # sees. Its peak is still LOWEST then, scores minus peak are 0, and the hidden columns
        # would count with weight 1. Without documents every row sees column 0 in its first tile,
        # so its peak is that of a real score, and no second mask is needed.
        if masked and segments_ref is not None:
            weights_RC = jnp.where(visible_RC, weights_RC, 0.0)
        shrink_R = _exp2(peak_R - new_peak_R, call)
        v_CH = plgpu.load(v_ref.at[columns, :])
        o_RH = o_RH * shrink_R[:, None] + _dot(weights_RC.astype(v_CH.dtype), v_CH)
        return o_RH, new_peak_R, total_R * shrink_R + jnp.sum(weights_RC, axis=1)

    zeros_R = jnp.zeros(tile.rows, jnp.float32)
    carry = (jnp.zeros(q_RH.shape, jnp.float32), zeros_R + LOWEST, zeros_R)
    o_RH, peak_R, total_R = walk(step, carry)
    # Divided by the sum once at the end and not in every step, as FlashAttention-2 does.
    plgpu.store(o_ref, (o_RH * (1 / total_R)[:, None]).astype(o_ref.dtype))
    plgpu.store(lse_ref, peak_R + jnp.log2(total_R))


def _dq(call, tile, first_row, walk, segments_ref, *refs):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref = refs
    queries = _tokens(segments_ref, first_row, tile.rows, axis=0)
    q_RH, do_RH = plgpu.load(q_ref), plgpu.load(do_ref)
    lse_R, delta_R = plgpu.load(lse_ref), plgpu.load(delta_ref)

    def step(column_tile, dq_RH, *, masked):
        first_column = column_tile * tile.columns
        columns = pl.ds(first_column, tile.columns)
        k_CH = plgpu.load(k_ref.at[columns, :])
        # The mask comes after the exponential here, unlike in the forward kernel, whose maximum
        # must not see hidden scores. Where a hidden score gives inf, the mask makes it 0.
        weights_RC = _softmax_weights(_dot(q_RH, k_CH.T), lse_R[:, None], call)
        if masked:
            keys = _tokens(segments_ref, first_column, tile.columns, axis=1)
            weights_RC = jnp.where(
                _visible(queries, keys, call.causal, call.length), weights_RC, 0.0
            )
        dweights_RC = _dot(do_RH, plgpu.load(v_ref.at[columns, :]).T)
        dscores_RC = weights_RC * (dweights_RC - delta_R[:, None])
        return dq_RH + _dot(dscores_RC.astype(k_CH.dtype), k_CH)

    zeros_RH = jnp.zeros(q_RH.shape, jnp.float32)
    dq_RH = walk(step, zeros_RH)
    # The scale multiplies fp32 sums. In q itself, in bf16, it would cost one more rounding.
    plgpu.store(dq_ref, (dq_RH * call.scale).astype(dq_ref.dtype))


def _dkdv(call, tile, first_row, walk, segments_ref, *refs):
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref = refs
    keys = _tokens(segments_ref, first_row, tile.rows, axis=0)
    k_RH, v_RH = plgpu.load(k_ref), plgpu.load(v_ref)

    def step(head, column_tile, carry, *, masked):
        dk_RH, dv_RH = carry
        first_column = column_tile * tile.columns
        columns = pl.ds(first_column, tile.columns)
        q_CH = plgpu.load(q_ref.at[columns, head, :])
        do_CH = plgpu.load(do_ref.at[columns, head, :])
        lse_C, delta_C = (plgpu.load(ref.at[head, columns]) for ref in (lse_ref, delta_ref))
        weights_RC = _softmax_weights(_dot(k_RH, q_CH.T), lse_C[None, :], call)
        if masked:
            queries = _tokens(segments_ref, first_column, tile.columns, axis=1)
            weights_RC = jnp.where(
                _visible(queries, keys, call.causal, call.length), weights_RC, 0.0
            )
        dv_RH += _dot(weights_RC.astype(do_CH.dtype), do_CH)
        dscores_RC = weights_RC * (_dot(v_RH, do_CH.T) - delta_C[None, :])
        return dk_RH + _dot(dscores_RC.astype(q_CH.dtype), q_CH), dv_RH

    def head_step(head, carry):
        return walk(functools.partial(step, head), carry)

    zeros_RH = jnp.zeros(k_RH.shape, jnp.float32)
    dk_RH, dv_RH = jax.lax.fori_loop(0, q_ref.shape[1], head_step, (zeros_RH, zeros_RH))
    plgpu.store(dk_ref, (dk_RH * call.scale).astype(dk_ref.dtype))
    plgpu.store(dv_ref, dv_RH.astype(dv_ref.dtype))


def _launch(kernel, name, rows, call, tile, heads, ranges, segments_BT, inputs, outputs):
    """Runs `kernel` as a grid of (heads, B, T / R) programs.

    `rows` says whether a program owns "queries" or "keys". `inputs` are pairs (array, spec) and
    `outputs` pairs (shape and dtype, spec). A spec is a pair (block shape, index function), and
    the function maps (head, batch, row tile) to the index of a block.
    """
    B, T = inputs[0][0].shape[:2]
    row_tiles = T // tile.rows
    documents = segments_BT is not None
    near = documents or (call.causal and rows == "keys")
    far = documents or (call.causal and rows == "queries") or call.length < T

    def row_tile(program):
        # The GPU starts programs in the order of their numbers. The longest ones come first, so
        # that no long program runs alone at the end: under causal attention the last queries see
        # the most keys, and the first keys are seen by the most queries.
        return row_tiles - 1 - program if rows == "queries" else program

    def block_spec(spec):
        shape, index = spec
        return pl.BlockSpec(shape, lambda h, b, program: index(h, b, row_tile(program)))

    def body(ranges_ref, *refs):
        segments_ref, refs = (refs[0], refs[1:]) if documents else (None, refs)
        walk = functools.partial(_walk, ranges_ref, near, far)
        kernel(call, tile, row_tile(pl.program_id(2)) * tile.rows, walk, segments_ref, *refs)

    # Without documents the ranges are the same for every row of the batch, and stored once.
    masks = [(ranges, ((None, None, 4), lambda h, b, i: (b if documents else 0, i, 0)))]
    if documents:
        masks += [(segments_BT, ((None, T), lambda h, b, i: (b, 0)))]
    return pl.pallas_call(
        body,
        name=name,
        grid=(heads, B, row_tiles),
        in_specs=[block_spec(spec) for _, spec in masks + inputs],
        out_specs=[block_spec(spec) for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=call.interpret,
    )(*(array for array, _ in masks + inputs))


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
    B, T, N, H = q_BTNH.shape
    tile, G = call.tiles.forward, N // k_BTKH.shape[2]
    tokens = ((None, tile.rows, None, H), lambda n, b, i: (b, i, n, 0))
    keys = ((None, T, None, H), lambda n, b, i: (b, 0, n // G, 0))
    sums = ((None, None, tile.rows), lambda n, b, i: (b, n, i))
    inputs = [(q_BTNH, tokens), (k_BTKH, keys), (v_BTKH, keys)]
    outputs = [
        (jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), tokens),
        (jax.ShapeDtypeStruct((B, N, T), jnp.float32), sums),
    ]
    launch = functools.partial(_launch, _forward, "flash_forward", "queries")
    return launch(call, tile, N, ranges, segments_BT, inputs, outputs)


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
    _, T, N, H = q_BTNH.shape
    tile, G = call.tiles.dq, N // k_BTKH.shape[2]
    tokens = ((None, tile.rows, None, H), lambda n, b, i: (b, i, n, 0))
    keys = ((None, T, None, H), lambda n, b, i: (b, 0, n // G, 0))
    sums = ((None, None, tile.rows), lambda n, b, i: (b, n, i))
    inputs = [(q_BTNH, tokens), (k_BTKH, keys), (v_BTKH, keys), (do_BTNH, tokens)]
    inputs += [(lse_BNT, sums), (delta_BNT, sums)]
    outputs = [(jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), tokens)]
    launch = functools.partial(_launch, _dq, "flash_dq", "queries")
    return launch(call, tile, N, ranges, segments_BT, inputs, outputs)[0]


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
    _, T, N, H = q_BTNH.shape
    tile, K = call.tiles.dkdv, k_BTKH.shape[2]
    queries = ((None, T, N // K, H), lambda k, b, j: (b, 0, k, 0))
    tokens = ((None, tile.rows, None, H), lambda k, b, j: (b, j, k, 0))
    sums = ((None, N // K, T), lambda k, b, j: (b, k, 0))
    inputs = [(q_BTNH, queries), (k_BTKH, tokens), (v_BTKH, tokens), (do_BTNH, queries)]
    inputs += [(lse_BNT, sums), (delta_BNT, sums)]
    outputs = [(jax.ShapeDtypeStruct(k_BTKH.shape, k_BTKH.dtype), tokens)] * 2
    launch = functools.partial(_launch, _dkdv, "flash_dkdv", "keys")
    return launch(call, tile, K, ranges, segments_BT, inputs, outputs)
