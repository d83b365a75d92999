"""The matrix products of a block, each joined with the cheap computation before it.

Each of these functions has a backward pass of its own (`jax.custom_vjp`), for two reasons.

Memory: what is kept for the backward pass are operands and results of matrix products, and nothing
that is elementwise. The backward pass computes elementwise results a second time where it needs
them, which costs little.

Precision: weights may be stored in fp32 and are multiplied in the dtype of x. The gradient of a
weight is summed in fp32 inside the product and comes out in the dtype of the weight. JAX's own
gradient would be rounded to the dtype of x first. An fp32 result also lets XLA add it in place to
the sum over micro-batches, instead of writing it to memory, reading it again and converting it.

Shapes: B batch, T tokens, M = B T, D width, F SwiGLU width, X outputs per token of a product with
all weights of a group.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tinyllama_jax.model.norm import add_norm, norm_gradient, rms_norm

Groups = tuple[tuple[jax.Array, ...], ...]
"""Weights of shape (D, ...) in groups. Those of a group are multiplied as one matrix (D, X)."""


@jax.custom_vjp
def dense(x_BTD: jax.Array, w_D: jax.Array) -> jax.Array:
    """Returns x w with shape (B, T, ...), for weights of shape (D, ...), in the dtype of x."""
    return _product(x_BTD, w_D).reshape(*x_BTD.shape[:-1], *w_D.shape[1:])


def _dense_forward(x_BTD, w_D):
    return dense(x_BTD, w_D), (x_BTD, w_D)


def _dense_backward(residuals, dy_BT):
    x_BTD, w_D = residuals
    return _dx(dy_BT, w_D), _dw(x_BTD, dy_BT, w_D)


dense.defvjp(_dense_forward, _dense_backward)


def normed_products(
    x_BTD: jax.Array, y_BTD: jax.Array | None, groups: Groups, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Adds to the residual stream, normalizes it, and multiplies the result with weights.

    The backward pass keeps the normalized stream, an operand of the products, and not the stream.

    Args:
      x_BTD: the residual stream.
      y_BTD: what is added to the stream; None adds nothing.
      groups: the weights, with the norm's gain multiplied into them (`llama.fold_gains`).
      eps: added to the mean square in the norm.

    Returns:
      x + y, and for each group of weights (x + y) / rms(x + y) w with shape (B, T, X).
    """
    # The annotation is for the type checker, which does not see through `jax.custom_vjp`.
    results: tuple[jax.Array, tuple[jax.Array, ...]] = _normed_products(x_BTD, y_BTD, groups, eps)
    return results


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normed_products(x_BTD, y_BTD, groups, eps):
    if y_BTD is not None:
        x_BTD = x_BTD + y_BTD
    h_BTD, _ = rms_norm(x_BTD, eps)
    return x_BTD, tuple(_product(h_BTD, _joined(group)) for group in groups)


def _normed_forward(x_BTD, y_BTD, groups, eps):
    if y_BTD is None:
        h_BTD, scale_BT = rms_norm(x_BTD, eps)
    else:
        x_BTD, h_BTD, scale_BT = add_norm(x_BTD, y_BTD, eps)
        # Named so that a `jax.checkpoint` around the block can keep them (`llama.KEPT`): to compute
        # them again would take y, hence the product that y came from. The norm of a stream to which
        # nothing was added needs no names, because it follows from the input of the block.
        h_BTD, scale_BT = checkpoint_name(h_BTD, "normed"), checkpoint_name(scale_BT, "scale")
    products = tuple(_product(h_BTD, _joined(group)) for group in groups)
    # The last residual only says whether there was a y. An empty tuple says it without an array.
    return (x_BTD, products), (h_BTD, scale_BT, groups, None if y_BTD is None else ())


def _normed_backward(eps, residuals, gradients):
    h_BTD, scale_BT, groups, y = residuals
    dx_BTD, dproducts = gradients
    pairs = list(zip(groups, dproducts, strict=True))
    dhs_BTD = tuple(_dx(dy_BTX, _joined(group)) for group, dy_BTX in pairs)
    dx_BTD = norm_gradient(h_BTD, scale_BT, dhs_BTD, dx_BTD)
    dgroups = tuple(_split(_dw(h_BTD, dy_BTX, _joined(group)), group) for group, dy_BTX in pairs)
    return dx_BTD, None if y is None else dx_BTD, dgroups


_normed_products.defvjp(_normed_forward, _normed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def swiglu_product(
    gate_BTF: jax.Array, up_BTF: jax.Array, down_FD: jax.Array, keep: bool
) -> jax.Array:
    """Returns (silu(gate) * up) down with shape (B, T, D) (Shazeer 2020, equation 6).

    Args:
      gate_BTF: the factor that goes through silu.
      up_BTF: the other factor.
      down_FD: the weights.
      keep: keep silu(gate) * up for the backward pass; otherwise it is computed again there.
    """
    return _product(_swiglu(gate_BTF, up_BTF), down_FD)


def _swiglu(gate_BTF, up_BTF):
    return jax.nn.silu(gate_BTF) * up_BTF


def _swiglu_forward(gate_BTF, up_BTF, down_FD, keep):
    h_BTF = _swiglu(gate_BTF, up_BTF)
    return _product(h_BTF, down_FD), (gate_BTF, up_BTF, h_BTF if keep else None, down_FD)


def _swiglu_backward(keep, residuals, dy_BTD):
    gate_BTF, up_BTF, kept_BTF, down_FD = residuals
    dh_BTF = _dx(dy_BTD, down_FD)
    if not keep:
        # Without this barrier the compiler would see that silu(gate) * up was already computed in
        # the forward pass, and keep that array in memory instead of computing it again. dh passes
        # through the barrier too, so that the second computation cannot begin before it is needed.
        gate_BTF, up_BTF, dh_BTF = jax.lax.optimization_barrier((gate_BTF, up_BTF, dh_BTF))
    h_BTF, back = jax.vjp(_swiglu, gate_BTF, up_BTF)
    return *back(dh_BTF), _dw(kept_BTF if keep else h_BTF, dy_BTD, down_FD)


swiglu_product.defvjp(_swiglu_forward, _swiglu_backward)


# In all products below the tokens of the batch form a single axis M. The gradient of a weight would
# otherwise be a sum over two axes, B and T, and for such a product XLA on CPUs first makes a
# transposed copy of a matrix.


def _product(x_BTD, w_D):
    """Returns x w with shape (B, T, X), in the dtype of x."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    y_MX = x_MD @ w_D.reshape(len(w_D), -1).astype(x_BTD.dtype)
    return y_MX.reshape(*x_BTD.shape[:-1], -1)


def _dx(dy_BT, w_D):
    """Returns the gradient of x in the product x w, (B, T, D)."""
    w_DX = w_D.reshape(len(w_D), -1).astype(dy_BT.dtype)
    dy_MX = dy_BT.reshape(-1, w_DX.shape[1])
    dx_MD = jax.lax.dot_general(dy_MX, w_DX, (((1,), (1,)), ((), ())))
    return dx_MD.reshape(*dy_BT.shape[:2], -1)


def _dw(x_BTD, dy_BT, w_D):
    """Returns the gradient of w in the product x w, with the shape and the dtype of w."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    dy_MX = dy_BT.reshape(len(x_MD), -1)
    dw_DX = jax.lax.dot_general(
        x_MD, dy_MX, (((0,), (0,)), ((), ())), preferred_element_type=w_D.dtype
    )
    return dw_DX.reshape(w_D.shape)


def _joined(group: tuple[jax.Array, ...]) -> jax.Array:
    """Returns the weights of a group side by side, as one matrix (D, X)."""
    if len(group) == 1:
        return group[0].reshape(len(group[0]), -1)
    return jnp.concatenate([w.reshape(len(w), -1) for w in group], axis=1)


def _split(joined_DX: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Splits a matrix like that of `_joined` into parts with the shapes of the group's weights."""
    stops = itertools.accumulate(w.size // len(w) for w in group[:-1])
    parts = jnp.split(joined_DX, list(stops), axis=1)
    return tuple(part.reshape(w.shape) for part, w in zip(parts, group, strict=True))
