"""RMSNorm with the sums around it, and its kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.on_gpu import skip_without_gpu
from tinyllama_jax.model.norm import (
    add_norm,
    add_norm_by_kernel,
    norm_gradient,
    norm_gradient_by_kernel,
    rms_norm,
)

EPS = 1e-3  # large enough to be seen
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8}


def arrays(count, D, dtype, B=3, T=7):
    """Rows of every size, so that a sum over the wrong axis shows."""
    keys = jax.random.split(jax.random.key(D), count)
    sizes_BT1 = jnp.exp(jnp.linspace(0, 3, B * T)).reshape(B, T, 1)
    return [(sizes_BT1 * jax.random.normal(key, (B, T, D))).astype(dtype) for key in keys]


def exact_norm(x):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS)


def assert_near(found, exact, dtype):
    found = np.asarray(found, np.float64)
    assert np.linalg.norm(found - exact) <= TOLERANCE[dtype] * np.linalg.norm(exact)


ways = pytest.mark.parametrize("by_kernel", [False, True], ids=["plain", "kernel"])
widths = pytest.mark.parametrize("D", [48, 256, 1100])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@ways
@widths
@dtypes
def test_the_sum_and_its_norm_equal_fp64(by_kernel, D, dtype):
    x, y = arrays(2, D, dtype)
    run = functools.partial(add_norm_by_kernel, interpret=True) if by_kernel else add_norm
    total, h, scale = run(x, y, EPS)
    assert total.dtype == h.dtype == dtype and scale.dtype == jnp.float32
    np.testing.assert_array_equal(total, x + y)
    assert_near(h, exact_norm(total), dtype)
    assert_near(scale[..., None] * np.asarray(total, np.float64), exact_norm(total), "float32")


@ways
@widths
@dtypes
@pytest.mark.parametrize("terms", [1, 2])
def test_the_gradient_equals_that_of_plain_jax(by_kernel, D, dtype, terms):
    """x goes on as it is and as h, and the gradient of h comes in terms; plain JAX is in fp32."""
    x, dx, *dhs = arrays(2 + terms, D, dtype)
    dhs = tuple(dhs)
    h, scale = rms_norm(x, EPS)
    run = norm_gradient
    if by_kernel:
        run = functools.partial(norm_gradient_by_kernel, interpret=True)
    found = run(h, scale, dhs, dx)
    assert found.dtype == dtype

    x32, dx32, *dhs32 = (a.astype(jnp.float32) for a in (x, dx, *dhs))
    _, back = jax.vjp(lambda x: rms_norm(x, EPS)[0], x32)
    assert_near(found, np.asarray(dx32 + back(sum(dhs32))[0], np.float64), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [192, 1100, 2048])
@dtypes
def test_the_kernels_on_a_gpu(D, dtype):
    skip_without_gpu()
    x, y, dx, *dhs = arrays(5, D, dtype, B=4, T=500)
    total, h, scale = jax.jit(add_norm_by_kernel, static_argnums=2)(x, y, EPS)
    np.testing.assert_array_equal(total, x + y)
    assert_near(h, exact_norm(total), dtype)
    found = jax.jit(norm_gradient_by_kernel)(h, scale, tuple(dhs), dx)
    h, scale, dx, *dhs = (np.asarray(a, np.float64) for a in (h, scale, dx, *dhs))
    along = np.mean(sum(dhs) * h, axis=-1, keepdims=True)
    assert_near(found, dx + scale[..., None] * (sum(dhs) - along * h), dtype)


@pytest.mark.compile
@pytest.mark.parametrize("chip", ["A100", "H100"])
@pytest.mark.parametrize("D", [768, 2048, 4096])
def test_the_kernels_compile_without_spills(chip, D, tmp_path):
    # Here, because it wants Triton's assembler, which the suite does without.
    from benchmarks.kernels.kernel_resources import abstract_on, resources_of_program

    wide, thin = (2, 512, D), (2, 512)

    def run(x, y, scale, dh):
        return add_norm_by_kernel(x, y, EPS), norm_gradient_by_kernel(x, scale, (dh, y), x)

    def lower():
        with abstract_on(chip) as abstract:
            x, scale = abstract(wide, "bfloat16"), abstract(thin, "float32")
            return jax.jit(run).lower(x, x, scale, x)

    found = resources_of_program(lower, tmp_path)
    assert set(found) == {"add_norm", "norm_gradient"}
    for kernel in found.values():
        assert kernel.spills == 0
        # Sixteen bytes at a time, where the width is a power of two.
        assert D == 768 or "ld.global.v4" in kernel.ptx
