"""The backends of attention on an NVIDIA GPU, against fp64.

    JAX_PLATFORMS=cuda pytest -m gpu tests/test_gpu_attention.py

where the project is installed. Where it is not, --noconftest leaves out what other tests need.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.exact_attention import (
    assert_equals_exact,
    assert_second_document_is_blind_to_first,
    inputs,
)
from support.on_gpu import skip_without_gpu
from tinyllama_jax.model import attention as attention_module
from tinyllama_jax.model.attention import attention, why_not

pytestmark = pytest.mark.gpu

DTYPES, KERNELS = ("float32", "bfloat16"), ("pallas", "triton")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """NaN in the device memory that a test's programs are given.

    A kernel that leaves out part of its output would otherwise show what happened to lie there,
    which after an equal run is the right numbers. JAX keeps the memory that arrays leave, and hands
    it out again; blocks of every size fill the small holes too.
    """
    skip_without_gpu()
    blocks = [jnp.full(2**power, jnp.nan) for power in range(6, 27) for _ in range(4)]
    jax.block_until_ready(blocks)


def every(*lengths: int, documents: bool = False):
    """Runs a test by each backend, in each dtype and row length (T) that it can do."""
    cases = [
        (backend, dtype, T)
        for dtype in DTYPES
        for backend in (*KERNELS, "cudnn")
        for T in lengths
        if why_not(backend, "H100", jnp.dtype(dtype), 64, T, documents) is None
    ]
    return pytest.mark.parametrize(("backend", "dtype", "T"), cases)


@functools.partial(jax.jit, static_argnames=("backend", "causal"))
def forward_and_gradients(backend, q, k, v, do, segments=None, causal=True):
    attend = functools.partial(
        attention, segment_ids=segments, causal=causal, scale=0.2, backend=backend
    )
    o, vjp = jax.vjp(attend, q, k, v)
    return o, *vjp(do)


def check(backend, dtype, arrays, segments=None, causal=True, smallest=0.0):
    arrays = [x.astype(dtype) for x in arrays]
    found = forward_and_gradients(backend, *arrays, segments, causal)
    assert_equals_exact(found, *arrays, segments, causal, 0.2, smallest)


@every(333, 334, 512)
@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (3, 3)], ids=["MQA", "GQA", "MHA"])
def test_forward_and_gradients_equal_fp64(backend, dtype, T, heads):
    check(backend, dtype, inputs(2, T, *heads, 64))


@every(333, 512, documents=True)
@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (3, 3)], ids=["MQA", "GQA", "MHA"])
def test_documents(backend, dtype, T, heads):
    segments = np.cumsum(np.random.default_rng(1).random((2, T)) < 0.02, axis=1)
    check(backend, dtype, inputs(2, T, *heads, 64), segments)


@every(333, 334)
def test_without_causality(backend, dtype, T):
    check(backend, dtype, inputs(2, T, 4, 2, 64), causal=False)


@every(333, documents=True)
def test_segments_that_come_back_without_causality(backend, dtype, T):
    segments = np.random.default_rng(2).integers(0, 3, (2, T))
    check(backend, dtype, inputs(2, T, 4, 2, 64), segments, causal=False)


@every(257, 258)
@pytest.mark.parametrize("H", [32, 48, 128])
def test_head_widths(backend, dtype, T, H):
    check(backend, dtype, inputs(1, T, 4, 1, H))


@every(1, 2, 17, documents=True)
def test_a_few_tokens(backend, dtype, T):
    check(backend, dtype, inputs(2, T, 2, 1, 64), np.zeros((2, T), int), smallest=0.1)


@every(2048, documents=True)
def test_long_rows_of_many_short_documents(backend, dtype, T):
    lengths = np.random.default_rng(3).integers(1, 9, 1500)
    segments = np.repeat(np.arange(1500), lengths)[: 2 * T].reshape(2, T)
    check(backend, dtype, inputs(2, T, 4, 1, 64), segments)


@every(333, documents=True)
def test_rows_of_nothing_but_padding(backend, dtype, T):
    segments = np.stack([np.zeros(T, int), np.repeat([1, 2, 0], [60, 200, T - 260])])
    check(backend, dtype, inputs(2, T, 4, 2, 64), segments)


@every(512, documents=True)
@pytest.mark.parametrize("first", [100, 256])
def test_document_b_is_blind_to_document_a_bit_by_bit(backend, dtype, T, first):
    q, k, v, do = (x.astype(dtype) for x in inputs(2, T, 8, 2, 64))
    segments = jnp.broadcast_to(jnp.where(jnp.arange(T) < first, 0, 1), (2, T))

    def run(q, k, v):
        return forward_and_gradients(backend, q, k, v, do, segments)

    assert_second_document_is_blind_to_first(run, q, k, v, first)


@pytest.mark.parametrize("backend", KERNELS)  # cuDNN adds gradients up in no fixed order
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [False, True])
def test_two_runs_give_the_same_bits(backend, dtype, documents):
    """At a size that keeps all of the chip busy: what races needs company."""
    arrays = [x.astype(dtype) for x in inputs(4, 2048, 16, 4, 64)]
    segments = jnp.arange(4 * 2048).reshape(4, 2048) // 300 if documents else None
    first, second = (forward_and_gradients(backend, *arrays, segments) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@every(512)
def test_every_number_of_the_outputs_is_written(backend, dtype, T):
    """Donated arrays full of NaN: XLA lays the outputs over them, where nothing is padded."""
    arrays = [x.astype(dtype) for x in inputs(2, T, 8, 2, 64)]
    q, k, v, do = arrays
    poison = [jnp.full_like(x, jnp.nan) for x in (do, q, k, v)]  # shaped as o, dq, dk and dv
    run = jax.jit(
        lambda poison, *arrays: forward_and_gradients(backend, *arrays),
        donate_argnums=0,
        keep_unused=True,
    )
    assert run.lower(poison, *arrays).compile().as_text().count("may-alias") == len(poison)
    found = run(poison, *arrays)
    assert all(x.is_deleted() for x in poison)
    assert_equals_exact(found, *arrays, scale=0.2)


@pytest.mark.parametrize("documents", [False, True])
def test_auto_says_what_it_takes(documents, capsys):
    attention_module._say_once.cache_clear()
    arrays = [x.astype("bfloat16") for x in inputs(1, 256, 4, 1, 64)]
    segments = jnp.zeros((1, 256), int) if documents else None
    found = forward_and_gradients("auto", *arrays, segments)
    said = capsys.readouterr().err
    print(f"{'with' if documents else 'without'} documents: {said}", end="")  # pytest -rP shows it
    assert said.count("attention on") == 1
    assert_equals_exact(found, *arrays, segments, scale=0.2)
