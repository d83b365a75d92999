"""A GPU kernel for the cross-entropy loss of each token and the gradient of its logits.

XLA reads the logits from memory three times: for their maximum, for the sum of their exponentials,
and for the gradient. A program of this kernel owns one row of logits. It reads the row once for
maximum and sum together, with a running maximum (Milakov and Gimelshein 2018, algorithm 3), and a
second time for the gradient, when the row is still in the cache. The gradient is written over the
logits, so no second array of that size exists.

Shapes: M tokens, V vocabulary, C logits that a program takes in one loop step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

COLUMNS = 8192  # logits that a program takes in one loop step, at most
# Threads per row, in warps of 32. A multiprocessor holds 2,048 threads, hence four rows at a time
# with 16 warps each. The rows in work on the whole GPU then fit in its L2 cache, from which the
# second read is served: 27 MB in bf16 on an A100 with 40 MB of L2, 34 MB on an H100 with 50 MB.
# Fewer warps would put more rows to work at once than the cache holds.
WARPS = 16


def cross_entropy(
    logits_MV: jax.Array, targets_M: jax.Array, weights_M: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of each token, and the gradient by the logits of the losses' weighted sum.

    Args:
      logits_MV: in any dtype. Their memory is reused for the gradient. If the logits are used
        anywhere else, XLA has to copy them first.
      targets_M: token ids in [0, V).
      weights_M: fp32, how much the loss of each token counts.
      interpret: run the kernel in Pallas' interpreter, on a CPU.

    Returns:
      losses_M in nats, fp32 and without the weights; and dlogits_MV in the dtype of the logits.
    """
    M, V = logits_MV.shape
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_cross_entropy, columns=min(pl.next_power_of_2(V), COLUMNS)),
        name="cross_entropy",
        grid=(M,),
        in_specs=[anywhere] * 3,
        out_specs=[anywhere] * 2,
        out_shape=(
            jax.ShapeDtypeStruct((M,), jnp.float32),
            jax.ShapeDtypeStruct((M, V), logits_MV.dtype),
        ),
        input_output_aliases={0: 1},  # the gradient takes the memory of the logits
        compiler_params=plgpu.CompilerParams(num_warps=WARPS),
        interpret=interpret,
    )(logits_MV, targets_M, weights_M)


def _cross_entropy(logits_ref, targets_ref, weights_ref, losses_ref, dlogits_ref, *, columns: int):
    row, V = pl.program_id(0), logits_ref.shape[1]
    target, weight = plgpu.load(targets_ref.at[row]), plgpu.load(weights_ref.at[row])
    steps = pl.cdiv(V, columns)

    def load(ref, step):
        columns_C = step * columns + jnp.arange(columns)
        inside_C = columns_C < V
        logits_C = plgpu.load(ref.at[row, columns_C], mask=inside_C, other=-jnp.inf)
        return columns_C, inside_C, logits_C.astype(jnp.float32)

    def add(step, sums):
        peak, total, chosen = sums
        columns_C, _, logits_C = load(logits_ref, step)
        new_peak = jnp.maximum(peak, jnp.max(logits_C))
        total = total * jnp.exp(peak - new_peak) + jnp.sum(jnp.exp(logits_C - new_peak))
        return new_peak, total, chosen + jnp.sum(jnp.where(columns_C == target, logits_C, 0.0))

    # The running maximum begins at a finite number: -inf minus -inf would be NaN.
    lowest, zero = jnp.finfo(jnp.float32).min, jnp.zeros((), jnp.float32)
    # A target outside the vocabulary makes the loss NaN, so that the fault is seen at once, as with
    # an index beyond the end of an array in JAX.
    start = jnp.where((target >= 0) & (target < V), zero, jnp.nan)
    peak, total, chosen = jax.lax.fori_loop(0, steps, add, (zero + lowest, zero, start))
    lse = peak + jnp.log(total)
    plgpu.store(losses_ref.at[row], lse - chosen)

    def replace(step, _):
        # Read through the output's reference, which is the same memory as the input's. So the load
        # and the store below are on one reference, and their order is plain to the compiler.
        columns_C, inside_C, logits_C = load(dlogits_ref, step)
        dlogits_C = (jnp.exp(logits_C - lse) - (columns_C == target)) * weight
        place = dlogits_ref.at[row, columns_C]
        plgpu.store(place, dlogits_C.astype(dlogits_ref.dtype), mask=inside_C)

    jax.lax.fori_loop(0, steps, replace, None)
