"""The decoder: its size, its start, and what a token can see."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from support.models import SMALL
from tinyllama_jax import config as configs
from tinyllama_jax.model import attention as attention_module
from tinyllama_jax.model import embedding, llama, loss, norm
from tinyllama_jax.model.products import dense
from tinyllama_jax.runtime.mesh import make_mesh, named_leaves, shardings
from tinyllama_jax.training.gradients import make_gradients
from tinyllama_jax.training.step import init_state


@pytest.fixture(scope="module")
def weights():
    return llama.init_weights(SMALL, jax.random.key(1))


@pytest.fixture(scope="module")
def tokens_BT():
    return jax.random.randint(jax.random.key(2), (3, 20), 0, SMALL.vocab_size)


@pytest.mark.parametrize("name", ["TINYLLAMA_1B", "TINYLLAMA_CODE_8K", "TINYLLAMA_120M", "DEMO"])
def test_the_tree_has_as_many_weights_as_the_arithmetic_says(name):
    preset = getattr(configs, name)
    leaves = jax.tree.leaves(llama.abstract_weights(preset))
    assert sum(leaf.size for leaf in leaves) == preset.parameters()
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("devices", [1, 8])
def test_initial_standard_deviations_are_the_originals(devices, config):
    # Measured on the state as training makes it: the original lost its scheme when sharded.
    model = dataclasses.replace(configs.TINYLLAMA_120M, layers=3, vocab_size=1000)
    config = dataclasses.replace(config, model=model)
    mesh = make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        weights = init_state(config, mesh)["weights"]
    into, out = np.sqrt(2 / (5 * 768)), 1 / (np.sqrt(768) * 3)
    for name, weight in named_leaves(weights).items():
        if "norm" in name:
            np.testing.assert_array_equal(weight, 1)
            continue
        wanted = out if name in ("blocks.output_NHD", "blocks.down_FD") else into
        # A standard deviation of n samples is off by 1 / sqrt(2 n); five times that is rare.
        layers = weight if name.startswith("blocks.") else weight[None]
        for layer in np.asarray(layers):
            assert abs(layer.std() / wanted - 1) < 5 / np.sqrt(2 * layer.size), name
            assert abs(layer.mean() / wanted) < 5 / np.sqrt(layer.size), name


def test_the_published_constants_of_the_1b():
    assert llama.init_std(configs.TINYLLAMA_1B) == pytest.approx(0.0139754, abs=5e-8)
    assert llama.residual_init_std(configs.TINYLLAMA_1B) == pytest.approx(0.00100441, abs=5e-9)


def test_every_mesh_starts_from_the_same_weights(config):
    states = []
    for devices in (1, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            states.append(jax.tree.map(np.asarray, init_state(config, mesh)))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_layers_start_apart(weights):
    query = weights["blocks"]["query_DNH"]
    assert not np.array_equal(query[0], query[1])


def test_no_token_sees_a_later_one(weights, tokens_BT):
    """By gradient: nonzero for every embedding up to the target, zero after it."""

    def target_logit(embedded_TD):
        ids = jnp.arange(20)[None]
        wide = weights | {"embedding_VD": embedded_TD}
        return llama.apply(SMALL, wide, ids)[0, 11].sum()

    embedded_TD = weights["embedding_VD"][tokens_BT[0]]
    grads_T = np.abs(jax.grad(target_logit)(embedded_TD)).max(axis=-1)
    assert (grads_T[:12] > 0).all() and (grads_T[12:] == 0).all()


def test_a_packed_document_reads_as_if_alone(weights, tokens_BT):
    # RoPE is relative: the second document starts at position 8 and gives what it gives at 0.
    segments = jnp.broadcast_to(jnp.where(jnp.arange(20) < 8, 0, 1), tokens_BT.shape)
    packed = llama.apply(SMALL, weights, tokens_BT, segments)
    alone = llama.apply(SMALL, weights, tokens_BT[:, 8:])
    np.testing.assert_allclose(packed[:, 8:], alone, atol=1e-5)
    assert not np.allclose(llama.apply(SMALL, weights, tokens_BT)[:, 8:], alone, atol=1e-3)


def test_rope_depends_on_its_base_and_factor(weights, tokens_BT):
    logits = [
        llama.apply(dataclasses.replace(SMALL, **fields), weights, tokens_BT)
        for fields in ({}, {"rope_base": 500.0}, {"rope_factor": 4.0})
    ]
    for other in logits[1:]:
        assert np.abs(logits[0] - other).max() > 1e-4


def test_bf16_is_near_fp32(weights, tokens_BT):
    exact = llama.apply(SMALL, weights, tokens_BT)
    halved = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    found = llama.apply(SMALL, halved, tokens_BT)
    assert found.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(found, np.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 2e-2


def test_every_weight_has_a_row_in_the_table_of_axes(mesh):
    weights = llama.abstract_weights(SMALL)
    shardings(weights, mesh)
    with pytest.raises(KeyError, match="no row"):
        shardings({"weights": weights | {"bias_D": weights["norm_D"]}}, mesh)


def test_positions_begin_anew_in_each_document():
    segments = np.array([[1, 1, 1, 2, 2, 0, 0, 4], [7, 3, 3, 3, 3, 3, 3, 3]])
    found = llama.positions(8, segments)
    assert found.tolist() == [[0, 1, 2, 0, 1, 0, 1, 0], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert llama.positions(3, None).tolist() == [[0, 1, 2]]


def test_the_gradient_of_a_product_copies_nothing_on_a_cpu(optimised_instructions):
    """As `x @ w` does, whose gradient sums over rows and tokens."""
    x_BTD, w_DF = jnp.ones((4, 64, 48)), jnp.ones((48, 96))
    for product, copies in ((dense, False), (jnp.matmul, True)):

        def gradients(x_BTD, w_DF, product=product):
            y_BTF, vjp = jax.vjp(product, x_BTD, w_DF)
            return vjp(y_BTF)

        found = optimised_instructions(gradients, x_BTD, w_DF)
        assert any(opcode in ("copy", "transpose") for opcode, _ in found) == copies


def test_a_product_takes_weights_of_any_shape_behind_the_width():
    x_BTD = jax.random.normal(jax.random.key(0), (2, 5, 8))
    w_DNH = jax.random.normal(jax.random.key(1), (8, 3, 4))
    expected = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DNH)
    np.testing.assert_allclose(dense(x_BTD, w_DNH), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("recompute", "gather", "times"),
    [
        ("nothing", "step", 1),
        ("elementwise", "step", 1),
        ("layers", "step", 2),
        ("elementwise", "layer", 1),
        ("layers", "layer", 2),
    ],
)
def test_cudnns_attention_runs_once_where_matrix_products_are_kept(
    config, monkeypatch, recompute, gather, times
):
    """Lowered for a GPU that is not here."""
    pretend_hopper(monkeypatch)
    execution = configs.ExecutionConfig("cudnn", recompute, gather)
    config = dataclasses.replace(config, model=SMALL, execution=execution)
    weights = llama.abstract_weights(SMALL)
    tokens_ABS = jax.ShapeDtypeStruct((1, 2, SMALL.context + 1), jnp.int32)
    weights_ABT = jax.ShapeDtypeStruct((1, 2, SMALL.context), jnp.float32)
    mesh = make_mesh(devices=jax.devices()[:1])
    gradients = jax.jit(make_gradients(config, mesh, jnp.bfloat16))
    traced = gradients.trace(weights, tokens_ABS, weights_ABT)
    calls = count_calls(traced.lower(lowering_platforms=("cuda",)).as_text())
    names = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    assert [calls[name] for name in names] == [times * SMALL.layers, SMALL.layers]


def pretend_hopper(monkeypatch):
    """An H100, and what JAX would ask of it to lower cuDNN's attention."""
    answers = {"check_cudnn_version": 91_000, "check_compute_capability": True}
    answers["is_cuda_compute_capability_equal"] = False
    for name, answer in answers.items():
        monkeypatch.setattr(fused_attention_stablehlo, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(attention_module, "device_chip", lambda: "H100")
    # Kernels of ours would be lowered too, for which JAX from 0.12 on wants to see a GPU.
    for module in (embedding, loss, norm):
        monkeypatch.setattr(module, "has_kernels", lambda: False)


@pytest.mark.parametrize("H", [8, 64, 128])
@pytest.mark.parametrize("T", [1, 2, 17, 18, 333, 334])
def test_auto_takes_what_has_gradients_on_hopper(T, H, monkeypatch):
    """cuDNN refuses odd rows when their gradients are lowered, and no sooner."""
    pretend_hopper(monkeypatch)
    q, k = (jax.ShapeDtypeStruct((2, T, heads, H), jnp.bfloat16) for heads in (4, 2))

    def gradients(q, k, v, do):
        return jax.vjp(attention_module.attention, q, k, v)[1](do)

    traced = jax.jit(gradients).trace(q, k, k, q)
    if T % 2:
        assert "flash_dq" in str(traced.jaxpr)
    else:
        assert "__cudnn$fmha" in traced.lower(lowering_platforms=("cuda",)).as_text()


def count_calls(program: str) -> Counter[str]:
    """How often each custom call is made, in StableHLO: functions alike are written once."""
    bodies = dict(re.findall(r"func\.func \w+ (@[\w.$]+)(.*?)\n  }", program, re.DOTALL))

    def count(name):
        found = Counter()
        for custom, called in re.findall(r"(custom_)?call (@[\w.$]+)\(", bodies[name]):
            found.update([called[1:]] if custom else count(called))
        return found

    return count("@main")
