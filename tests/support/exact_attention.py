"""Attention and its gradients in fp64, for the backends to be held against."""

import jax
import numpy as np
from numpy.typing import ArrayLike

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def inputs(B: int, T: int, N: int, K: int, H: int, seed: int = 0) -> list[jax.Array]:
    """Random q, k, v, and the cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def visible(segments_BT: ArrayLike | None, T: int, causal: bool) -> np.ndarray:
    """Which query sees which key, (B or 1, T, T)."""
    seen_BTS = np.tri(T, dtype=bool)[None] if causal else np.ones((1, T, T), bool)
    if segments_BT is not None:
        segments_BT = np.asarray(segments_BT)
        seen_BTS = seen_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    return seen_BTS


def exact_attention(q, k, v, do, segments_BT=None, causal=True, scale=None):
    """o, dq, dk and dv of softmax(scale q k^T) v, with everything written out."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    B, T, N, H = q.shape
    K = k.shape[2]
    scale = 1 / np.sqrt(H) if scale is None else scale
    q, do = (x.reshape(B, T, K, N // K, H) for x in (q, do))
    scores = scale * np.einsum("btkgh,bskh->bkgts", q, k)
    scores = np.where(visible(segments_BT, T, causal)[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = np.einsum("bkgts,bskh->btkgh", p, v)
    dp = np.einsum("btkgh,bskh->bkgts", do, v)
    ds = scale * p * (dp - np.sum(p * dp, -1, keepdims=True))
    dq = np.einsum("bkgts,bskh->btkgh", ds, k)
    dk = np.einsum("bkgts,btkgh->bskh", ds, q)
    dv = np.einsum("bkgts,btkgh->bskh", p, do)
    return o.reshape(B, T, N, H), dq.reshape(B, T, N, H), dk, dv


def frobenius_error(found: ArrayLike, exact: np.ndarray, smallest: float = 0.0) -> float:
    """||found - exact|| / ||exact||, the latter as of entries that are `smallest` at least.

    NaN where anything is.
    """
    found = np.asarray(found, np.float64)
    return float(
        np.linalg.norm(found - exact) / max(np.linalg.norm(exact), smallest * np.sqrt(exact.size))
    )


def assert_equals_exact(
    found, q, k, v, do, segments_BT=None, causal=True, scale=None, smallest: float = 0.0
):
    """o, dq, dk and dv are off by rounding, relative to entries of `smallest` at least.

    Few tokens give gradients near 0 as differences of numbers near 1, where rounding is all.
    """
    exact = exact_attention(q, k, v, do, segments_BT, causal, scale)
    for name, x, y in zip(("o", "dq", "dk", "dv"), found, exact, strict=True):
        assert x.dtype == q.dtype
        assert frobenius_error(x, y, smallest) < TOLERANCE[str(q.dtype)], name


def assert_second_document_is_blind_to_first(run, q, k, v, first: int):
    """`run(q, k, v)` gives arrays (B, T, ...) whose tokens from `first` on stay the same bits when
    those before it change; the others, of the first document, do change."""
    before = run(q, k, v)
    after = run(*(x.at[:, :first].multiply(3.0) for x in (q, k, v)))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, first:], y[:, first:])
        assert not np.array_equal(x[:, :first], y[:, :first])
