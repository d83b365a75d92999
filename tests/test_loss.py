"""The fused loss, held against logits that are written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.model import loss as loss_module
from tinyllama_jax.model.loss import next_token_loss


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
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", tokens * 3 * 23)
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
    """Of 64 tokens and 1,000 pieces in chunks of 4 tokens, no array has more than a chunk's."""
    x, head, targets, weights = inputs("float32", B=1, T=64, D=8, V=1000)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 4000)
    gradient = jax.grad(lambda x, head: next_token_loss(x, head, targets, weights)[0], (0, 1))
    text = jax.jit(gradient).lower(x, head).compile().as_text()
    assert "4,1000]" in text
    assert "64,1000]" not in text and "16,4,1000]" not in text
