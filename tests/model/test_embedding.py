"""The embedding's gradient: fp32 sums in the order of the tokens, by a kernel on GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.on_gpu import skip_without_gpu
from tinyllama_jax.model.embedding import embedding, sums_by_token


def exact_sums(tokens_BT, x_BTD, pieces):
    sums_VD = np.zeros((pieces, x_BTD.shape[-1]))
    np.add.at(sums_VD, tokens_BT, np.asarray(x_BTD, np.float64))
    return sums_VD


def random_case(B, T, D, V, dtype="float32"):
    """Ids as frequent as in text: one of them makes up a fifth, many never come."""
    rng = np.random.default_rng(D)
    frequency = 1 / np.arange(1, V + 1)
    tokens_BT = rng.choice(V, size=(B, T), p=frequency / frequency.sum())
    return tokens_BT, jnp.asarray(rng.normal(size=(B, T, D)), dtype)


def gradient(tokens_BT, dx_BTD, pieces):
    table_VD = jnp.zeros((pieces, dx_BTD.shape[-1]), dx_BTD.dtype)
    return jax.jit(lambda *args: jax.vjp(lambda w: embedding(w, args[0]), table_VD)[1](args[1]))(
        jnp.asarray(tokens_BT), dx_BTD
    )[0]


@pytest.mark.parametrize("D", [48, 192, 1100])  # no power of two, and more than one program's
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_adds_up_each_pieces_rows(D, dtype):
    tokens_BT, x_BTD = random_case(3, 41, D, 29, dtype)
    found = sums_by_token(jnp.asarray(tokens_BT), x_BTD, 29, interpret=True)
    assert found.dtype == dtype
    exact = exact_sums(tokens_BT, x_BTD, 29)
    assert (np.bincount(tokens_BT.ravel(), minlength=29) == 0).any()
    np.testing.assert_allclose(found, exact, rtol=2**-8 if dtype == "bfloat16" else 1e-5, atol=1e-5)


def test_a_token_that_comes_often_keeps_all_that_is_added_to_it():
    """In bf16 a sum of 256 no longer notices a 1."""
    dx_BTD = jnp.ones((4, 1000, 8), jnp.bfloat16)
    found = gradient(np.full((4, 1000), 5), dx_BTD, 7)
    np.testing.assert_array_equal(found[5], np.full(8, 4000).astype(jnp.bfloat16))
    assert not np.asarray(found)[[0, 1, 2, 3, 4, 6]].any()


def test_the_gradient_is_that_of_indexing():
    tokens_BT, dx_BTD = random_case(2, 30, 12, 20)
    exact = exact_sums(tokens_BT, dx_BTD, 20)
    np.testing.assert_allclose(gradient(tokens_BT, dx_BTD, 20), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [192, 1100, 2048])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_on_a_gpu(D, dtype):
    skip_without_gpu()
    tokens_BT, x_BTD = random_case(4, 2048, D, 32_000, dtype)
    found = np.asarray(gradient(tokens_BT, x_BTD, 32_000))
    exact = exact_sums(tokens_BT, x_BTD, 32_000)
    rtol, atol = (2**-8, 1e-3) if dtype == "bfloat16" else (1e-4, 1e-4)
    np.testing.assert_allclose(found.astype(float), exact, rtol=rtol, atol=atol)
    np.testing.assert_array_equal(found, gradient(tokens_BT, x_BTD, 32_000))


@pytest.mark.compile
@pytest.mark.parametrize("chip", ["A100", "H100"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_compiles_without_spills_and_nothing_is_scattered(chip, dtype, tmp_path):
    # Here, because it wants Triton's assembler, which the suite does without.
    from benchmarks.kernels.kernel_resources import abstract_on, resources_of_program

    def run(table_VD, tokens_BT, dx_BTD):
        return jax.vjp(lambda w: embedding(w, tokens_BT), table_VD)[1](dx_BTD)

    V, B, T, D = 32_000, 4, 2048, 2048
    with abstract_on(chip) as abstract:
        arguments = abstract((V, D), dtype), abstract((B, T), "int32"), abstract((B, T, D), dtype)
        lowered = jax.jit(run).lower(*arguments)
    assert " scatter(" not in lowered.compile().as_text()
    found = resources_of_program(lambda: lowered, tmp_path)
    assert set(found) == {"embedding_gradient"}
    assert found["embedding_gradient"].spills == 0
