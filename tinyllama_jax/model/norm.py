"""RMSNorm, and on chips that our kernels are for, the residual sums around it in the same pass.

By itself XLA walks over a row once for the sums along it and once more for what is made of them,
and once for each sum with the stream: in a kernel a row stays on the chip. There is no gain here:
it stands in the matrices that multiply the result (`llama.fold_gains`).

Shapes: B batch, T tokens, D width; in a kernel M = B T rows, and C columns, a power of two from D.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tinyllama_jax.model.attention import has_kernels


def rms_norm(x_BTD: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x / rms(x) in the dtype of x, and 1 / rms(x), (B, T), in fp32 as all statistics (Zhang and
    Sennrich 2019, equation 4, without its gain)."""
    x32_BTD = x_BTD.astype(jnp.float32)
    scale_BT = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1) + eps)
    return (x32_BTD * scale_BT[..., None]).astype(x_BTD.dtype), scale_BT


def add_norm(
    x_BTD: jax.Array, y_BTD: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x + y, and its `rms_norm`."""
    if has_kernels():
        return add_norm_by_kernel(x_BTD, y_BTD, eps)
    x_BTD = x_BTD + y_BTD
    return x_BTD, *rms_norm(x_BTD, eps)


def norm_gradient(
    h_BTD: jax.Array, scale_BT: jax.Array, dhs_BTD: tuple[jax.Array, ...], dx_BTD: jax.Array
) -> jax.Array:
    """The gradient of an x that goes on as it is and as h = x / rms(x); fp32 inside, rounded once.

    Args:
      h_BTD: the norm's result, by which x is known as far as it matters.
      scale_BT: 1 / rms(x).
      dhs_BTD: what the gradient of h is the sum of.
      dx_BTD: the gradient of the x that goes on.
    """
    if has_kernels():
        return norm_gradient_by_kernel(h_BTD, scale_BT, dhs_BTD, dx_BTD)
    h_BTD, dx_BTD, *dhs = (x.astype(jnp.float32) for x in (h_BTD, dx_BTD, *dhs_BTD))
    dh_BTD = functools.reduce(jnp.add, dhs)
    # What lies along x itself does not change its direction.
    along_BT1 = jnp.mean(dh_BTD * h_BTD, axis=-1, keepdims=True)
    gradient_BTD = dx_BTD + scale_BT[..., None] * (dh_BTD - along_BT1 * h_BTD)
    return gradient_BTD.astype(dhs_BTD[0].dtype)


def add_norm_by_kernel(x_BTD, y_BTD, eps, interpret=False):
    """What `add_norm` returns."""
    kernel = functools.partial(_add_norm, eps=eps)
    shapes = (x_BTD, x_BTD, jax.ShapeDtypeStruct(x_BTD.shape[:2], jnp.float32))
    return _by_row(kernel, "add_norm", (x_BTD, y_BTD), shapes, interpret)


def norm_gradient_by_kernel(h_BTD, scale_BT, dhs_BTD, dx_BTD, interpret=False):
    """What `norm_gradient` returns."""
    inputs = (h_BTD, scale_BT, dx_BTD, *dhs_BTD)
    return _by_row(_norm_gradient, "norm_gradient", inputs, (dx_BTD,), interpret)[0]


def _by_row(kernel, name: str, inputs, outputs, interpret: bool):
    """A program of `kernel` for each row; arrays (B, T, D) or (B, T), outputs by their shapes."""

    def rows(x):
        return jax.ShapeDtypeStruct((x.shape[0] * x.shape[1], *x.shape[2:]), x.dtype)

    columns = pl.next_power_of_2(inputs[0].shape[-1])
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    found = pl.pallas_call(
        functools.partial(kernel, columns=columns),
        name=name,
        grid=(inputs[0].shape[0] * inputs[0].shape[1],),
        in_specs=[anywhere] * len(inputs),
        out_specs=[anywhere] * len(outputs),
        out_shape=[rows(x) for x in outputs],
        # Sixteen numbers of a row a thread: two loads of 16 bytes in bf16.
        compiler_params=plgpu.CompilerParams(num_warps=min(max(columns // 512, 1), 16)),
        interpret=interpret,
    )(*(x.reshape(rows(x).shape) for x in inputs))
    return tuple(x.reshape(wanted.shape) for x, wanted in zip(found, outputs, strict=True))


def _row(columns: int, D: int):
    """(load, store) of the row of this program, in fp32 inside."""
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
    # Rounded as it is stored: what is normed is what goes on.
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
