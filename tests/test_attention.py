"""The attention contract, held against a plain fp64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.model.attention import attention


def inputs(B, T, N, K, H, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_hand(q, k, v, segments, causal=True):
    """Head by head and token by token, in fp64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            kv = n // (N // k.shape[2])
            for t in range(T):
                seen = [
                    s
                    for s in range(T)
                    if (s <= t or not causal) and segments[b, s] == segments[b, t]
                ]
                scores = k[b, seen, kv] @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ v[b, seen, kv] / weights.sum()
    return out


@settings(deadline=None, max_examples=20)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 9),
    K=st.integers(1, 3),
    G=st.integers(1, 3),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_a_loop_by_hand(B, T, K, G, causal, seed):
    q, k, v, _ = inputs(B, T, K * G, K, 6, seed)
    segments = np.cumsum(np.random.default_rng(seed).random((B, T)) < 0.3, axis=1)
    found = attention(q, k, v, causal=causal, segment_ids=jnp.asarray(segments))
    np.testing.assert_allclose(found, by_hand(q, k, v, segments, causal), atol=2e-6)


def test_document_b_is_blind_to_document_a_bit_by_bit():
    q, k, v, do = inputs(2, 12, 4, 2, 8)
    segments = jnp.broadcast_to(jnp.where(jnp.arange(12) < 5, 0, 1), (2, 12))

    def run(q, k, v):
        out, vjp = jax.vjp(lambda *qkv: attention(*qkv, segment_ids=segments), q, k, v)
        return out, *vjp(do)

    before = run(q, k, v)
    after = run(*(x.at[:, :5].multiply(3.0) for x in (q, k, v)))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, 5:], y[:, 5:])
    assert not np.array_equal(before[0][:, :5], after[0][:, :5])


def test_softmax_is_fp32_under_bf16():
    q, k, v, _ = inputs(1, 64, 2, 1, 16)
    exact = by_hand(q, k, v, np.zeros((1, 64)))
    found = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert found.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)
    assert error < 1e-2


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)],
        [(1, 4, 4, 8), (1, 5, 2, 8), (1, 5, 2, 8)],
        [(1, 4, 4, 8), (1, 4, 2, 8), (1, 4, 2, 6)],
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError):
        attention(*(jnp.ones(shape) for shape in shapes))


def test_segment_ids_of_another_shape_are_refused():
    q, k, v, _ = inputs(1, 4, 2, 1, 8)
    with pytest.raises(ValueError, match="segment_ids"):
        attention(q, k, v, segment_ids=jnp.zeros((1, 3), int))
