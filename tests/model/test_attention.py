"""The attention contract: what every backend gives, refuses and falls back to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from support.exact_attention import (
    assert_second_document_is_blind_to_first,
    exact_attention,
    frobenius_error,
    inputs,
)
from tinyllama_jax.model import attention as attention_module
from tinyllama_jax.model.attention import (
    AUTO,
    CHIPS,
    attention,
    cached_attention,
    choose_backend,
    why_not,
)
from tinyllama_jax.runtime.mesh import make_mesh


@settings(deadline=None, max_examples=4)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 9),
    K=st.integers(1, 3),
    G=st.integers(1, 3),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_reference_equals_fp64_and_so_do_its_gradients(B, T, K, G, causal, seed):
    q, k, v, do = inputs(B, T, K * G, K, 6, seed)
    segments = np.cumsum(np.random.default_rng(seed).random((B, T)) < 0.3, axis=1)
    run = functools.partial(attention, causal=causal, segment_ids=segments, backend="reference")
    o, vjp = jax.vjp(run, q, k, v)
    exact = exact_attention(q, k, v, do, segments, causal)
    for found, expected in zip((o, *vjp(do)), exact, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "pallas"])
def test_document_b_is_blind_to_document_a_bit_by_bit(backend):
    q, k, v, do = inputs(2, 12, 4, 2, 8)
    segments = jnp.broadcast_to(jnp.where(jnp.arange(12) < 5, 0, 1), (2, 12))

    @jax.jit
    def run(q, k, v):
        attend = functools.partial(attention, segment_ids=segments, backend=backend)
        o, vjp = jax.vjp(attend, q, k, v)
        return o, *vjp(do)

    assert_second_document_is_blind_to_first(run, q, k, v, first=5)


@pytest.mark.parametrize("backend", ["reference", "pallas"])
def test_softmax_is_fp32_under_bf16(backend):
    q, k, v, do = (x.astype(jnp.bfloat16) for x in inputs(1, 64, 2, 1, 16))
    found = attention(q, k, v, backend=backend)
    assert found.dtype == jnp.bfloat16
    assert frobenius_error(found, exact_attention(q, k, v, do)[0]) < 1e-2


@pytest.mark.parametrize("lengths", [[1, 1], [5, 12], [12, 7]])
def test_cached_attention_is_the_last_row_of_attention(lengths):
    """Wherever in the cache the tokens are."""
    q, k, v, _ = inputs(2, 12, 6, 2, 8)
    newest = np.array(lengths) - 1
    places = np.random.default_rng(0).permutation(17)[:12]
    cached_k, cached_v = (np.full((2, 2, 17, 8), 1e3, np.float32) for _ in range(2))
    cached_k[:, :, places], cached_v[:, :, places] = k.swapaxes(1, 2), v.swapaxes(1, 2)
    filled = np.zeros((2, 17), bool)
    filled[:, places] = np.arange(12) < np.array(lengths)[:, None]
    found = cached_attention(
        q[np.arange(2), newest][:, None], cached_k, cached_v, filled, scale=0.3
    )
    for row, length in enumerate(lengths):
        alone = attention(*(x[row : row + 1, :length] for x in (q, k, v)), scale=0.3)
        np.testing.assert_allclose(found[row, 0], alone[0, -1], atol=1e-6)


@pytest.mark.parametrize("rows", [16, 3])
def test_on_a_mesh_each_device_runs_the_kernel_on_its_own_rows(rows):
    q, k, v, do = inputs(rows, 8, 2, 1, 32)
    mesh = make_mesh(data=2)

    @jax.jit
    def run(q, k, v, do):
        o, vjp = jax.vjp(functools.partial(attention, backend="pallas"), q, k, v)
        return o, *vjp(do)

    alone = run(q, k, v, do)
    with jax.set_mesh(mesh):
        split = P(("data", "fsdp")) if rows == 16 else P()
        shards = jax.device_put((q, k, v, do), jax.NamedSharding(mesh, split))
        found = run(*shards)
        program = run.lower(*shards).compile().as_text()
    assert found[0].sharding.spec == split
    if rows == 16:
        assert "all-gather" not in program
    for x, y in zip(found, alone, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_inside_shard_map():
    q, k, v, _ = inputs(8, 8, 2, 1, 32)
    run = functools.partial(attention, backend="pallas")
    with jax.set_mesh(make_mesh()):
        spec = P("fsdp")
        mapped = jax.shard_map(run, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
        np.testing.assert_allclose(jax.jit(mapped)(q, k, v), attention(q, k, v), atol=1e-6)


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


def test_segment_ids_that_would_wrap_are_refused():
    q, k, v, _ = inputs(1, 4, 2, 1, 8)
    with pytest.raises(ValueError, match="beyond 32 bits"):
        attention(q, k, v, segment_ids=np.array([[0, 0, 2**32, 2**32]]))


def test_a_scale_that_is_not_positive_is_refused():
    q, k, v, _ = inputs(1, 4, 2, 1, 8)
    with pytest.raises(ValueError, match="above 0"):
        attention(q, k, v, scale=0.0)


@pytest.mark.parametrize(
    ("backend", "change", "complaint"),
    [
        ("cudnn", {"chip": "cpu"}, "GPU"),
        ("cudnn", {"documents": True}, "segment_ids"),
        ("cudnn", {"dtype": jnp.float32}, "bfloat16"),
        ("cudnn", {"head_width": 20}, "multiple of 8"),
        ("cudnn", {"T": 333}, "even number of tokens"),
        ("pallas", {"head_width": 192}, "192"),
        ("triton", {"chip": "cpu"}, "cpu"),
        ("pallas", {"chip": "NVIDIA GeForce RTX 4090"}, "RTX 4090"),
        ("triton", {"dtype": jnp.float16}, "float16"),
    ],
)
def test_a_backend_says_what_it_cannot_do(backend, change, complaint):
    asked = {"chip": "H100", "dtype": jnp.bfloat16, "head_width": 64, "T": 8, "documents": False}
    assert why_not(backend, **asked) is None
    assert complaint in why_not(backend, **asked | change)


def test_what_a_backend_cannot_do_is_an_error_and_never_another_backend():
    q, k, v, _ = inputs(1, 4, 2, 1, 8)
    with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU"):
        attention(q, k, v, backend="cudnn")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("T", [333, 2048])
@pytest.mark.parametrize("head_width", [48, 192])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("chip", ["cpu", "A100", "H100", "NVIDIA GeForce RTX 4090", "TPU v5"])
def test_auto_never_takes_what_cannot_do_it(chip, dtype, head_width, T, documents):
    backend, reason = choose_backend(chip, dtype, head_width, T, documents)
    assert why_not(backend, chip, dtype, head_width, T, documents) is None
    assert reason
    assert backend != "cudnn" or chip == "H100" or "NVIDIA" in chip
    if dtype == jnp.bfloat16 and (head_width, T) == (48, 2048) and (chip, documents) in AUTO:
        assert backend == AUTO[chip, documents][0]


def test_auto_covers_every_chip():
    assert set(AUTO) == {(chip, docs) for chip in CHIPS.values() for docs in (False, True)}


def test_auto_says_once_what_it_took(capsys, monkeypatch):
    q, k, v, _ = inputs(1, 4, 2, 1, 8)
    attention(q, k, v)
    assert not capsys.readouterr().err, "a CPU leaves nothing to choose"
    monkeypatch.setattr(attention_module, "device_chip", lambda: "chip of this test alone")
    attention(q, k, v)
    attention(q, k, v)
    assert capsys.readouterr().err.count("attention on chip of this test alone: reference") == 1


def test_on_a_cpu_no_square_of_scores_is_turned_around(optimised_instructions):
    T = 64

    def gradients(q, k, v):
        o, vjp = jax.vjp(functools.partial(attention, backend="reference"), q, k, v)
        return vjp(o)

    q, k = jnp.ones((2, T, 4, 16)), jnp.ones((2, T, 2, 16))
    found = optimised_instructions(gradients, q, k, k)
    squares = [opcode for opcode, shape in found if shape.count(T) == 2]
    assert "exponential" in squares, "the scores are seen"
    assert not {"copy", "transpose"} & set(squares)
