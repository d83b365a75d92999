"""The loss of each token from its logits together with their gradient, a row of logits at a time.

XLA reads the logits three times for it: for their maximum, for their sum, and for the gradient. A
program of this kernel reads a row once for both sums, keeping a running maximum (Milakov and
Gimelshein 2018, algorithm 3), and once more for the gradient, while it still lies in the cache; the
gradient takes its place.

Shapes: M tokens, V vocabulary; C pieces that a program takes in one step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

COLUMNS = 8192
# So many threads a row that the rows at work, four a multiprocessor, stay in the L2 cache: 27 MB of
# bf16 on an A100, which has 40, and 34 on an H100, which has 50.
WARPS = 16


def cross_entropy(
    logits_MV: jax.Array, targets_M: jax.Array, weights_M: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The loss of each token in nats, fp32, and the gradient of their weighted sum by the logits.

    Args:
      logits_MV: in any dtype, which is that of the gradient; nothing else should want them.
      targets_M: ids in [0, V).
      weights_M: fp32, how much each token's loss counts.
      interpret: run the kernel in Python.
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
        input_output_aliases={0: 1},
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

    lowest, zero = jnp.finfo(jnp.float32).min, jnp.zeros((), jnp.float32)
    # As indexing in JAX: what lies outside is nothing to learn from, and shows.
    start = jnp.where((target >= 0) & (target < V), zero, jnp.nan)
    peak, total, chosen = jax.lax.fori_loop(0, steps, add, (zero + lowest, zero, start))
    lse = peak + jnp.log(total)
    plgpu.store(losses_ref.at[row], lse - chosen)

    def replace(step, _):
        columns_C, inside_C, logits_C = load(dlogits_ref, step)
        dlogits_C = (jnp.exp(logits_C - lse) - (columns_C == target)) * weight
        place = dlogits_ref.at[row, columns_C]
        plgpu.store(place, dlogits_C.astype(dlogits_ref.dtype), mask=inside_C)

    jax.lax.fori_loop(0, steps, replace, None)
