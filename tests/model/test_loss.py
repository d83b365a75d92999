"""The fused loss, held against logits that are written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.on_gpu import skip_without_gpu
from tinyllama_jax.model import cross_entropy as cross_entropy_module
from tinyllama_jax.model import loss as loss_module
from tinyllama_jax.model.cross_entropy import cross_entropy
from tinyllama_jax.model.loss import next_token_gradients, next_token_loss


def plain(x_BTD, head_DV, targets_BT, weights_BT):
    logits_BTV = (x_BTD @ head_DV).astype(jnp.float32)
    log_probabilities_BTV = jax.nn.log_softmax(logits_BTV)
    chosen_BT = jnp.take_along_axis(log_probabilities_BTV, targets_BT[..., None], -1)[..., 0]
    return -jnp.sum(chosen_BT * weights_BT)


def inputs(dtype, B=3, T=12, D=16, V=23):
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD = 3 * jax.random.normal(keys[0], (B, T, D))
    head_DV = jax.random.normal(keys[1], (D, V))
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weights_BT = jax.random.uniform(keys[3], (B, T)) * (jnp.arange(T) % 5 > 0)
    return x_BTD.astype(dtype), head_DV.astype(dtype), targets_BT, weights_BT


@pytest.mark.parametrize("tokens", [1, 4, 12])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_value_and_gradients_equal_the_plain_loss(monkeypatch, dtype, tolerance, tokens):
    jax.clear_caches()  # or a chunk of another size may have been traced before
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", {False: tokens * 3 * 23})
    x, head, targets, weights = inputs(dtype)
    jaxpr = str(jax.make_jaxpr(next_token_loss)(x, head, targets, weights))
    assert f"length={12 // tokens}" in jaxpr

    def scaled(loss):  # a cotangent that is not 1
        return lambda x, head, weights: 0.7 * loss(x, head, targets, weights)

    fused = scaled(lambda *arguments: next_token_loss(*arguments)[0])
    found = jax.value_and_grad(fused, argnums=(0, 1, 2))(x, head, weights)
    expected = jax.value_and_grad(scaled(plain), argnums=(0, 1, 2))(x, head, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(y, np.float64) for y in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_without_gradients_it_is_the_same_value():
    arguments = inputs("float32")
    loss, count = next_token_loss(*arguments)
    assert float(loss) == pytest.approx(float(plain(*arguments)), rel=1e-6)
    assert float(count) == pytest.approx(float(arguments[3].sum()))


def test_no_gradient_holds_all_logits(monkeypatch):
    """64 tokens, 1,000 pieces, chunks of 4 tokens: no array holds more than a chunk's logits."""
    x, head, targets, weights = inputs("float32", B=1, T=64, D=8, V=1000)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", {False: 4000})
    gradient = jax.grad(lambda x, head: next_token_loss(x, head, targets, weights)[0], (0, 1))
    text = jax.jit(gradient).lower(x, head).compile().as_text()
    assert "4,1000]" in text
    assert "64,1000]" not in text and "16,4,1000]" not in text


def rows(M, V, dtype):
    keys = jax.random.split(jax.random.key(V), 3)
    # Far from 0, yet near enough for fp32 to tell a loss within the tolerance.
    logits_MV = 4 * jax.random.normal(keys[0], (M, V)) + 30 * (jnp.arange(M) % 6)[:, None]
    targets_M = jax.random.randint(keys[1], (M,), 0, V).at[:2].set(jnp.array([0, V - 1]))
    return logits_MV.astype(dtype), targets_M, jax.random.uniform(keys[2], (M,)).at[3].set(0)


def check_rows(found, logits_MV, targets_M, weights_M):
    """Losses and gradients against fp64."""
    losses_M, dlogits_MV = found
    logits_MV, weights_M = np.asarray(logits_MV, np.float64), np.asarray(weights_M, np.float64)
    peaks_M1 = logits_MV.max(axis=1, keepdims=True)
    lse_M = np.log(np.exp(logits_MV - peaks_M1).sum(axis=1)) + peaks_M1[:, 0]
    chosen_M = np.take_along_axis(logits_MV, np.asarray(targets_M)[:, None], 1)[:, 0]
    np.testing.assert_allclose(losses_M, lse_M - chosen_M, rtol=1e-5, atol=1e-4)
    exact_MV = np.exp(logits_MV - lse_M[:, None])
    exact_MV[np.arange(len(exact_MV)), targets_M] -= 1
    exact_MV *= weights_M[:, None]
    tolerance = 2**-8 if dlogits_MV.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
        np.asarray(dlogits_MV, np.float64), exact_MV, rtol=tolerance, atol=1e-5
    )


@pytest.mark.parametrize("V", [23, 512, 1000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_gives_losses_and_gradients_of_rows(monkeypatch, V, dtype):
    monkeypatch.setattr(cross_entropy_module, "COLUMNS", 256)  # several steps, the last not full
    arguments = rows(6, V, dtype)
    found = cross_entropy(*arguments, interpret=True)
    assert found[1].dtype == dtype and not np.asarray(found[1][3]).any()
    check_rows(found, *arguments)


@pytest.mark.parametrize("target", [-1, 300, 100_000])
def test_a_target_outside_the_vocabulary_shows(target):
    """A step whose loss is not finite changes nothing."""
    logits_MV, targets_M, weights_M = rows(6, 300, "bfloat16")
    losses_M, _ = cross_entropy(logits_MV, targets_M.at[4].set(target), weights_M, interpret=True)
    assert np.isfinite(losses_M).tolist() == [True] * 4 + [False, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_kernel_they_are_the_same(dtype):
    arguments = rows(6, 100, dtype)
    check_rows(loss_module._losses_and_dlogits(*arguments), *arguments)


def test_the_heads_gradient_is_added_onto_what_is_there():
    x, head, targets, weights = inputs("float32")
    onto = jax.random.normal(jax.random.key(9), head.shape)
    loss, dx, dhead, _ = next_token_gradients(x, head, targets, weights, onto)
    expected = jax.value_and_grad(plain, argnums=(0, 1))(x, head, targets, weights)
    found = loss, (dx, dhead - onto)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("V", [1000, 32_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_on_a_gpu(V, dtype):
    skip_without_gpu()
    arguments = rows(300, V, dtype)
    check_rows(jax.jit(cross_entropy)(*arguments), *arguments)


@pytest.mark.compile
@pytest.mark.parametrize("chip", ["A100", "H100"])
@pytest.mark.parametrize("V", [32_000, 128_256])
def test_the_kernel_compiles_without_spills_and_works_in_place(chip, V, tmp_path):
    from benchmarks.kernels.kernel_resources import abstract_on, resources_of_program

    def lower():
        with abstract_on(chip) as abstract:
            logits = abstract((1024, V), "bfloat16")
            rows = abstract((1024,), "int32"), abstract((1024,), "float32")
            return jax.jit(cross_entropy, donate_argnums=0).lower(logits, *rows)

    found = resources_of_program(lower, tmp_path)
    assert found["cross_entropy"].spills == 0
    memory = lower().compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * 1024 * V > memory.temp_size_in_bytes
