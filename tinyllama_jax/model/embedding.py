"""The embedding: rows of a table by token, and a gradient of it that adds in fp32 and in order.

The gradient of `table[tokens]` as JAX makes it adds in the table's dtype, in bf16 until a frequent
token's sum is too large to notice what is added to it; on a GPU it adds by atomics besides, in
another order each time.

Shapes: V pieces, D width, B rows, T tokens of a row, M = B T; a program of the kernel owns a piece
and C columns, and takes R tokens in one step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tinyllama_jax.model.attention import has_kernels

TOKENS_A_STEP = 8  # rows in flight, where a frequent token has thousands of them
MOST_COLUMNS = 1024


@jax.custom_vjp
def embedding(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """table_VD[tokens_BT], (B, T, D).

    The gradient's sums are fp32, rounded once to the dtype of the table. On chips that our kernels
    are for, the same tokens and gradients give the same bits.

    Args:
      table_VD: a row for each piece of the vocabulary.
      tokens_BT: ids in [0, V).
    """
    return table_VD[tokens_BT]


def _forward(table_VD, tokens_BT):
    return table_VD[tokens_BT], (table_VD, tokens_BT)


def _backward(residuals, dx_BTD):
    table_VD, tokens_BT = residuals
    if has_kernels():
        sums_VD = sums_by_token(tokens_BT, dx_BTD, len(table_VD))
    else:
        sums_VD = jnp.zeros(table_VD.shape, jnp.float32).at[tokens_BT].add(dx_BTD)
    return sums_VD.astype(table_VD.dtype), None


embedding.defvjp(_forward, _backward)


def sums_by_token(
    tokens_BT: jax.Array, x_BTD: jax.Array, pieces: int, interpret: bool = False
) -> jax.Array:
    """For each piece the sum of the rows of x that stand at it, (V, D) in the dtype of x.

    Args:
      tokens_BT: ids in [0, V).
      x_BTD: what is added up, in fp32 and in the order of the tokens.
      pieces: V.
      interpret: run the kernel in Python.
    """
    D = x_BTD.shape[-1]
    ids_M, order_M = jax.lax.sort_key_val(tokens_BT.ravel(), jnp.arange(tokens_BT.size))
    starts = jnp.searchsorted(ids_M, jnp.arange(pieces + 1))
    columns = min(pl.next_power_of_2(D), MOST_COLUMNS)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_sum_rows, columns=columns),
        name="embedding_gradient",
        grid=(pieces, pl.cdiv(D, columns)),
        in_specs=[anywhere] * 3,
        out_specs=anywhere,
        out_shape=jax.ShapeDtypeStruct((pieces, D), x_BTD.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(starts, order_M, x_BTD.reshape(-1, D))


def _sum_rows(starts_ref, order_ref, x_ref, sums_ref, *, columns: int):
    piece = pl.program_id(0)
    start, stop = plgpu.load(starts_ref.at[piece]), plgpu.load(starts_ref.at[piece + 1])
    columns_C = pl.program_id(1) * columns + jnp.arange(columns)
    inside_C = columns_C < x_ref.shape[1]

    def step(index, sum_C):
        places_R = start + index * TOKENS_A_STEP + jnp.arange(TOKENS_A_STEP)
        there_R = places_R < stop
        rows_R1 = plgpu.load(order_ref.at[places_R], mask=there_R, other=0)[:, None]
        mask_RC = there_R[:, None] & inside_C
        x_RC = plgpu.load(x_ref.at[rows_R1, columns_C[None]], mask=mask_RC, other=0)
        return sum_C + jnp.sum(x_RC.astype(jnp.float32), axis=0)

    steps = pl.cdiv(stop - start, TOKENS_A_STEP)
    sum_C = jax.lax.fori_loop(0, steps, step, jnp.zeros(columns, jnp.float32))
    plgpu.store(sums_ref.at[piece, columns_C], sum_C.astype(sums_ref.dtype), mask=inside_C)
