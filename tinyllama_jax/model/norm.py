"""RMSNorm and the residual sum before it, with their gradient.

On GPUs for which this project has kernels, the sum and the norm are one kernel and their gradient
is another. XLA would read a row from memory once for the sum along it, once more to scale it, and
once for each addition to the residual stream; a kernel reads a row once and keeps it on the chip.

The norm's gain does not appear here. It is multiplied into the matrices that follow the norm
(`llama.fold_gains`), which is the same product and takes no pass over the tokens.

Shapes: B batch, T tokens, D width; inside a kernel M = B T rows and C columns, where C is D rounded
up to a power of two.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tinyllama_jax.model.attention import has_kernels


def rms_norm(x_BTD: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Normalizes x by its root mean square (Zhang and Sennrich 2019, equation 4, without the gain).

    Statistics are computed in fp32.

    Args:
      x_BTD: in any dtype.
      eps: added to the mean square.

    Returns:
      h_BTD = x / rms(x) in the dtype of x, and scale_BT = 1 / rms(x) in fp32.
    """
    x32_BTD = x_BTD.astype(jnp.float32)
    scale_BT = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1) + eps)
    return (x32_BTD * scale_BT[..., None]).astype(x_BTD.dtype), scale_BT


def add_norm(
    x_BTD: jax.Array, y_BTD: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns x + y, h_BTD and scale_BT, where the last two are `rms_norm` of x + y."""
    if has_kernels():
        return add_norm_by_kernel(x_BTD, y_BTD, eps)
    x_BTD = x_BTD + y_BTD
    return x_BTD, *rms_norm(x_BTD, eps)


def norm_gradient(
    h_BTD: jax.Array, scale_BT: jax.Array, dhs_BTD: tuple[jax.Array, ...], dx_BTD: jax.Array
) -> jax.Array:
    """Returns the gradient of x, which was used twice: normalized, as h = x / rms(x), and as it is.

    The computation is in fp32 and the result is rounded once, to the dtype of `dhs_BTD`. The
    function takes h and not x: h is kept for the backward pass anyway, as an operand of the matrix
    products, so x need not be kept beside it.

    Args:
      h_BTD: the result of the norm.
      scale_BT: 1 / rms(x).
      dhs_BTD: arrays whose sum is the gradient of h.
      dx_BTD: the gradient of x from its use as it is.
    """
    if has_kernels():
        return norm_gradient_by_kernel(h_BTD, scale_BT, dhs_BTD, dx_BTD)
    h_BTD, dx_BTD, *dhs = (x.astype(jnp.float32) for x in (h_BTD, dx_BTD, *dhs_BTD))
    dh_BTD = functools.reduce(jnp.add, dhs)
    # The norm removes the length of x, so the part of the gradient along x has no effect.
    along_BT1 = jnp.mean(dh_BTD * h_BTD, axis=-1, keepdims=True)
    gradient_BTD = dx_BTD + scale_BT[..., None] * (dh_BTD - along_BT1 * h_BTD)
    return gradient_BTD.astype(dhs_BTD[0].dtype)


def add_norm_by_kernel(
    x_BTD: jax.Array, y_BTD: jax.Array, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `add_norm` by a kernel; `interpret` runs it in Pallas' interpreter, on a CPU."""
    kernel = functools.partial(_add_norm, eps=eps)
    shapes = (x_BTD, x_BTD, jax.ShapeDtypeStruct(x_BTD.shape[:2], jnp.float32))
    return _by_row(kernel, "add_norm", (x_BTD, y_BTD), shapes, interpret)


def norm_gradient_by_kernel(
    h_BTD: jax.Array,
    scale_BT: jax.Array,
    dhs_BTD: tuple[jax.Array, ...],
    dx_BTD: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Computes `norm_gradient` by a kernel; `interpret` runs it in Pallas' interpreter."""
    inputs = (h_BTD, scale_BT, dx_BTD, *dhs_BTD)
    return _by_row(_norm_gradient, "norm_gradient", inputs, (dx_BTD,), interpret)[0]


def _by_row(kernel, name: str, inputs, outputs, interpret: bool):
    """Runs one program of `kernel` for each of the B T rows.

    `inputs` are arrays of shape (B, T, D) or (B, T). `outputs` are anything with the shape and the
    dtype of an output.
    """

    def rows(x):
        return jax.ShapeDtypeStruct((x.shape[0] * x.shape[1], *x.shape[2:]), x.dtype)

    columns = pl.next_power_of_2(inputs[0].shape[-1])
    # The kernels load and store rows themselves: the blocks of a BlockSpec must have a power of two
    # for their size, which D need not be.
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    results = pl.pallas_call(
        functools.partial(kernel, columns=columns),
        name=name,
        grid=(inputs[0].shape[0] * inputs[0].shape[1],),
        in_specs=[anywhere] * len(inputs),
        out_specs=[anywhere] * len(outputs),
        out_shape=[rows(x) for x in outputs],
        # Each of the 32 threads of a warp holds 16 numbers of the row, which are two loads of 16
        # bytes in bf16, the widest that an A100 or H100 can do.
        compiler_params=plgpu.CompilerParams(num_warps=min(max(columns // 512, 1), 16)),
        interpret=interpret,
    )(*(x.reshape(rows(x).shape) for x in inputs))
    return tuple(x.reshape(output.shape) for x, output in zip(results, outputs, strict=True))


def _row(columns: int, D: int):
    """Returns two functions that load and store this program's row, converted to and from fp32."""
    row, columns_C = pl.program_id(0), jnp.arange(columns)
    inside_C = columns_C < D

    def load(ref):
        return plgpu.load(ref.at[row, columns_C], mask=inside_C, other=0).astype(jnp.float32)

    def store(ref, x_C):
        plgpu.store(ref.at[row, columns_C], x_C.astype(ref.dtype), mask=inside_C)

    return load, store


def _add_norm(x_ref, y_ref, sum_ref, h_ref, scale_ref, *, columns: int, eps: float):
    D = x_ref.shape[1]
    load, store = _row(columns, D)
    # The sum is rounded to the dtype in which it is stored, so that the norm is that of the very
    # numbers that go on in the residual stream, as in the version without a kernel.
    sum_C = (load(x_ref) + load(y_ref)).astype(sum_ref.dtype).astype(jnp.float32)
    store(sum_ref, sum_C)
    scale = jax.lax.rsqrt(jnp.sum(sum_C * sum_C) / D + eps)
    store(h_ref, sum_C * scale)
    plgpu.store(scale_ref.at[pl.program_id(0)], scale)


def _norm_gradient(h_ref, scale_ref, dx_ref, *refs, columns: int):
    *dh_refs, out_ref = refs
    D = h_ref.shape[1]
    load, store = _row(columns, D)
    h_C, dh_C = load(h_ref), functools.reduce(jnp.add, map(load, dh_refs))
    along = jnp.sum(dh_C * h_C) / D
    scale = plgpu.load(scale_ref.at[pl.program_id(0)])
    store(out_ref, load(dx_ref) + scale * (dh_C - along * h_C))
