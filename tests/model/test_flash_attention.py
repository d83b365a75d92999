"""The kernels, interpreted, against fp64; and the ranges that they walk over."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.exact_attention import assert_equals_exact, inputs, visible
from tinyllama_jax.model.flash_attention import column_ranges, find_documents, flash_attention
from tinyllama_jax.model.tiles import TILES, Call, Tile, Tiles

# Rows above columns, below and equal, so that tiles meet the diagonal in every way.
SMALL = Tiles(forward=Tile(16, 32, 4, 2), dkdv=Tile(32, 16, 4, 2), dq=Tile(16, 16, 4, 2))
SMALL_TMA = Tiles(
    *(dataclasses.replace(tile, tma=True) for tile in (SMALL.forward, SMALL.dkdv, SMALL.dq))
)

# Triton's own interpreter stands on torch.
every_kernel = pytest.mark.parametrize(
    "kernels", ["pallas", pytest.param("triton", marks=pytest.mark.torch)]
)


@functools.partial(jax.jit, static_argnames=("kernels", "causal"))
def forward_and_gradients(kernels, q, k, v, do, segments, causal):
    run = functools.partial(
        flash_attention,
        segment_ids_BT=segments,
        causal=causal,
        scale=0.2,
        kernels=importlib.import_module(f"tinyllama_jax.model.{kernels.split('-')[0]}_kernels"),
        tiles=SMALL_TMA if kernels == "triton-tma" else SMALL,
        interpret=True,
        compute_capability=90,
    )
    o, vjp = jax.vjp(run, q, k, v)
    return o, *vjp(do)


def interpreted(kernels, *arrays, segments=None, causal=True):
    """o, dq, dk and dv of kernels that run on the CPU."""
    if kernels == "pallas":
        return forward_and_gradients(kernels, *arrays, segments, causal)
    from support import triton_interpreter

    with triton_interpreter.interpreted():
        return jax.block_until_ready(forward_and_gradients(kernels, *arrays, segments, causal))


def check(kernels, q, k, v, do, segments=None, causal=True, smallest=0.0):
    """The outputs of an interpreted kernel begin as NaN: what is not written fails here."""
    found = interpreted(kernels, q, k, v, do, segments=segments, causal=causal)
    assert_equals_exact(found, q, k, v, do, segments, causal, 0.2, smallest)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((4, 1), "float32"), ((6, 2), "float32"), ((3, 3), "float32"), ((6, 2), "bfloat16")],
    ids=["MQA", "GQA", "MHA", "GQA-bfloat16"],
)
@pytest.mark.parametrize("documents", [False, True])
@every_kernel
def test_forward_and_gradients_equal_fp64(kernels, dtype, heads, documents):
    arrays = [x.astype(dtype) for x in inputs(2, 70, *heads, 32)]
    segments = np.cumsum(np.random.default_rng(1).random((2, 70)) < 0.1, 1) if documents else None
    check(kernels, *arrays, segments)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_that_come_by_tma(dtype):
    arrays = [x.astype(dtype) for x in inputs(2, 40, 4, 2, 32)]
    check("triton-tma", *arrays, np.repeat([[1, 2, 1]], [13, 20, 7], axis=1).repeat(2, 0))


@pytest.mark.parametrize("documents", [False, True])
@every_kernel
def test_without_causality(kernels, documents):
    segments = np.random.default_rng(2).integers(0, 3, (2, 70)) if documents else None
    check(kernels, *inputs(2, 70, 4, 2, 32), segments, causal=False)


@pytest.mark.parametrize("H", [20, 64, 128])
@every_kernel
def test_head_widths(kernels, H):
    check(kernels, *inputs(1, 33, 2, 1, H))


@pytest.mark.parametrize("documents", [False, True])
@every_kernel
def test_one_token(kernels, documents):
    check(
        kernels, *inputs(2, 1, 2, 1, 32), np.zeros((2, 1), int) if documents else None, smallest=0.1
    )


@every_kernel
def test_long_rows_of_many_short_documents(kernels):
    lengths = np.random.default_rng(3).integers(1, 9, 400)
    segments = np.repeat(np.arange(400), lengths)[:600].reshape(2, 300)
    check(kernels, *inputs(2, 300, 2, 1, 32), segments)


@every_kernel
def test_rows_of_nothing_but_padding(kernels):
    segments = np.stack([np.zeros(70, int), np.repeat([1, 2, 0], [20, 30, 20])])
    check(kernels, *inputs(2, 70, 4, 2, 32), segments)


@settings(deadline=None, max_examples=12)
@given(
    changes=st.lists(st.integers(0, 3), min_size=48, max_size=48),
    ids=st.lists(st.integers(-2, 2), min_size=4, max_size=48),
    causal=st.booleans(),
)
def test_any_layout_of_segments(changes, ids, causal):
    """Ids of any value, that may come back later."""
    runs = np.cumsum(np.array(changes) == 0)
    check("pallas", *inputs(1, 48, 2, 1, 32), np.array(ids)[runs % len(ids)][None], causal, 0.1)


@settings(deadline=None, max_examples=5)
@given(
    B=st.integers(1, 2),
    T=st.integers(2, 90),
    K=st.integers(1, 2),
    G=st.integers(1, 3),
    H=st.integers(1, 40),
    causal=st.booleans(),
)
def test_any_shape(B, T, K, G, H, causal):
    check("pallas", *inputs(B, T, K * G, K, H), causal=causal, smallest=0.1)


@every_kernel
def test_two_runs_give_the_same_bits(kernels):
    arrays = inputs(2, 70, 6, 2, 32)
    segments = jnp.asarray(np.arange(140).reshape(2, 70) // 11)
    first, second = (interpreted(kernels, *arrays, segments=segments) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@every_kernel
def test_document_b_is_blind_to_document_a_bit_by_bit(kernels):
    q, k, v, do = inputs(2, 40, 4, 2, 32)
    segments = np.broadcast_to(np.arange(40) >= 21, (2, 40)).astype(int)
    before = interpreted(kernels, q, k, v, do, segments=segments)
    q, k, v = (x.at[:, :21].multiply(3.0) for x in (q, k, v))
    after = interpreted(kernels, q, k, v, do, segments=segments)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, 21:], y[:, 21:])
        assert not np.array_equal(x[:, :21], y[:, :21])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([2, 4, 8]),
    columns=st.sampled_from([2, 4, 8]),
    length=st.integers(1, 32),
    kind=st.sampled_from(["queries", "keys"]),
    causal=st.booleans(),
    documents=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_ranges_hold_all_that_is_seen_and_mask_all_that_is_hidden(
    rows, columns, length, kind, causal, documents, seed
):
    T = -(-length // 8) * 8
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 4, (2, T))
    runs = np.cumsum(rng.random((2, T)) < rng.choice([0.05, 0.3]), axis=1)
    segments = np.take_along_axis(ids, runs % T, axis=1) if documents else None
    if documents:
        segments[:, length:] = segments[:, length - 1 : length]
    call = Call(SMALL, causal, 1.0, length, interpret=True, compute_capability=None)
    bounds = find_documents(None if segments is None else jnp.asarray(segments), T)
    ranges = np.asarray(column_ranges(bounds, call, Tile(rows, columns, 4, 2), kind))

    seen = visible(segments, T, causal)
    seen = seen if kind == "queries" else seen.swapaxes(1, 2)
    for b, i in np.ndindex(ranges.shape[:2]):
        start, full_start, full_stop, stop = ranges[b, i]
        assert start <= full_start <= full_stop <= stop or start >= stop
        # Tokens past the length are padding: nothing depends on them.
        tile = seen[b, i * rows : (i + 1) * rows][: max(0, length - i * rows), :length]
        inside = np.arange(length) // columns
        assert not tile[:, (inside < start) | (inside >= stop)].any()
        assert tile[:, (inside >= full_start) & (inside < full_stop)].all()
        if tile.any():  # and no more than that is walked over
            touched = inside[tile.any(axis=0)]
            assert (start, stop) == (touched.min(), touched.max() + 1)
            if not documents and length == T:  # nor masked where nothing is hidden
                whole = [c for c in range(T // columns) if tile[:, inside == c].all()]
                assert whole == list(range(full_start, full_stop))


def test_documents_are_skipped():
    """Rows of 2,048 with documents of 512 cost a bit over a quarter of the tiles."""

    def tiles_walked(segments):
        documents = find_documents(segments, 2048)
        call = Call(SMALL, True, 1.0, length=2048, interpret=True, compute_capability=None)
        ranges = column_ranges(documents, call, Tile(64, 64, 4, 2), "queries")
        return int(np.sum(np.asarray(ranges)[..., 3] - np.asarray(ranges)[..., 0]))

    whole = tiles_walked(None)
    assert whole == 32 * 33 // 2
    assert tiles_walked(jnp.arange(2048)[None] // 512) == 4 * (8 * 9 // 2)


def test_the_table_of_tiles_is_total():
    chips, dtypes, widths = ("A100", "H100"), ("bfloat16", "float32"), (32, 64, 128)
    rows = {
        (backend, chip, dtype, width)
        for backend in ("pallas", "triton")
        for chip in chips
        for dtype in dtypes
        for width in widths
    }
    assert set(TILES) == rows
