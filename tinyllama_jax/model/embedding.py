"""The token embedding, with a gradient that is summed in fp32 and, on GPUs, in a fixed order.

The gradient of a token's row in the table is a sum over all places where the token occurs. JAX's
own gradient of `table[tokens]` has two faults. It sums in the dtype of the table: in bf16 the sum
of a frequent token soon grows so large that adding one more term no longer changes it. And on a GPU
it sums by atomic additions, whose order differs from run to run, and with it the result.

Shapes: V vocabulary, D width, B batch, T tokens, M = B T. In the kernel a program owns one token of
the vocabulary and C columns of the table; it takes R places in one loop step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tinyllama_jax.model.attention import has_kernels

# Places that a program takes in one loop step. Several loads at once hide the latency of memory,
# which matters for frequent tokens with thousands of places.
TOKENS_A_STEP = 8
MOST_COLUMNS = 1024  # for one program


@jax.custom_vjp
def embedding(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Returns table_VD[tokens_BT] with shape (B, T, D).

    The gradient of the table is summed in fp32 and rounded once, to the dtype of the table. On the
    GPUs for which this project has kernels, the same inputs give the same bits.

    Args:
      table_VD: a row for each token of the vocabulary.
      tokens_BT: token ids in [0, V).
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
    """Sums for each token of the vocabulary the rows of x at the places where the token occurs.

    The sum is taken in fp32, in the order in which the places stand in the batch.

    Args:
      tokens_BT: token ids in [0, V).
      x_BTD: the rows to sum.
      pieces: the size V of the vocabulary.
      interpret: run the kernel in Pallas' interpreter, on a CPU.

    Returns:
      Sums of shape (V, D), in the dtype of x.
    """
    D = x_BTD.shape[-1]
    # Sorted by token, the places of a token are neighbors. The sort is stable, so they keep the
    # order that they have in the batch, and the sum is the same in every run.
    ids_M, order_M = jax.lax.sort_key_val(tokens_BT.ravel(), jnp.arange(tokens_BT.size))
    starts = jnp.searchsorted(ids_M, jnp.arange(pieces + 1))
    columns = min(pl.next_power_of_2(D), MOST_COLUMNS)
    # No array is cut into blocks: which rows of x a program reads depends on the tokens.
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
