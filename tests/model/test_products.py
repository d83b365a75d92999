"""The matrix products of a block, held against what plain JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.model import norm, products
from tinyllama_jax.model.products import dense, normed_products, swiglu_product

B, T, D, F, EPS = 3, 8, 16, 40, 1e-3


def random(*shapes, seed=0, dtype="float32"):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def plain_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS)


def assert_same(found, expected, tolerance=2e-6):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        a, b = (np.asarray(y, np.float64) for y in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def outputs_and_gradients(run, *arrays):
    """With random gradients coming in."""
    out, back = jax.vjp(run, *arrays)
    leaves, tree = jax.tree.flatten(out)
    gradients = random(*(leaf.shape for leaf in leaves), seed=1)
    gradients = [g.astype(leaf.dtype) for g, leaf in zip(gradients, leaves, strict=True)]
    return out, back(jax.tree.unflatten(tree, gradients))


@pytest.mark.parametrize("with_branch", [False, True])
def test_normed_products_and_their_gradients(with_branch):
    x, y, *weights = random((B, T, D), (B, T, D), (D, 4, 3), (D, 2, 3), (D, F))
    groups = (tuple(weights[:2]), tuple(weights[2:]))
    y = y if with_branch else None

    def plain(x, y, groups):
        x = x if y is None else x + y
        flat = [jnp.concatenate([w.reshape(D, -1) for w in group], 1) for group in groups]
        return x, tuple(plain_norm(x) @ w for w in flat)

    found = outputs_and_gradients(lambda *a: normed_products(*a, EPS), x, y, groups)
    assert_same(found, outputs_and_gradients(plain, x, y, groups))


@pytest.mark.parametrize("keep", [False, True])
def test_swiglu_and_its_gradients(keep):
    arrays = random((B, T, F), (B, T, F), (F, D))
    found = outputs_and_gradients(lambda *a: swiglu_product(*a, keep), *arrays)
    plain = outputs_and_gradients(lambda g, u, w: (jax.nn.silu(g) * u) @ w, *arrays)
    assert_same(found, plain)


def test_dense_and_its_gradients():
    arrays = random((B, T, D), (D, 4, 3))
    plain = outputs_and_gradients(lambda x, w: jnp.einsum("btd,dnh->btnh", x, w), *arrays)
    assert_same(outputs_and_gradients(dense, *arrays), plain)


def test_weights_in_fp32_are_multiplied_narrow_and_have_their_gradients_unrounded():
    x, dy = random((B, 512, D), (B, 512, F), dtype="bfloat16")
    (w,) = random((D, F))
    y, back = jax.vjp(dense, x, w)
    np.testing.assert_array_equal(y, dense(x, w.astype("bfloat16")))
    exact = np.einsum("btd,btf->df", *(np.asarray(a, np.float64) for a in (x, dy)))
    found = back(dy)[1]
    assert found.dtype == jnp.float32
    assert_same(found, exact, 1e-6)
    rounded = jax.vjp(dense, x, w.astype("bfloat16"))[1](dy)[1]
    assert rounded.dtype == jnp.bfloat16
    with pytest.raises(AssertionError):
        assert_same(rounded, exact, 1e-4)


def kept(run, *arrays):
    """Shapes of what the forward pass keeps, arguments left out."""
    saved = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], *arrays)
    given = [a.shape for a in jax.tree.leaves(arrays)]
    shapes = [leaf.shape for leaf in jax.tree.leaves(saved)]
    for shape in given:
        if shape in shapes:
            shapes.remove(shape)
    return sorted(shapes)


def test_what_is_kept_for_the_backward_pass():
    """A norm keeps its result and not the stream; SwiGLU its product, where that is asked for."""
    x, y, w = random((B, T, D), (B, T, D), (D, F))
    stream = kept(lambda x, y: normed_products(x, y, ((w,),), EPS), x, y)
    assert (B, T) in stream and stream.count((B, T, D)) <= 1
    gate, up, down = random((B, T, F), (B, T, F), (F, D))
    assert (B, T, F) not in kept(lambda *a: swiglu_product(*a, False), gate, up, down)
    assert (B, T, F) in kept(lambda *a: swiglu_product(*a, True), gate, up, down)


def test_gradients_by_the_kernels_are_those_without(monkeypatch):
    """The kernels interpreted, as if a chip were here that has them."""
    x, y, w = random((B, T, D), (B, T, D), (D, F))

    def run(x, y, w):
        return normed_products(x, y, ((w,),), EPS)

    expected = outputs_and_gradients(run, x, y, w)
    for name in ("add_norm", "norm_gradient"):
        kernel = getattr(norm, f"{name}_by_kernel")
        monkeypatch.setattr(products, name, lambda *a, k=kernel: k(*a, interpret=True))
    assert_same(outputs_and_gradients(run, x, y, w), expected)
