"""Programs compiled for GPUs that are not here: `pytest -m compile`, with the extra `plan`."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.kernels.kernel_resources import (
    KERNELS,
    OPTIMISED,
    abstract_on,
    kernel_calls,
    resources_of_program,
)
from tinyllama_jax.config import TINYLLAMA_1B, ExecutionConfig
from tinyllama_jax.model.attention import attention
from tinyllama_jax.model.llama import Block, rope_tables
from tinyllama_jax.model.tiles import TILES, Tile, Tiles
from tinyllama_jax.performance.targets import A100_40G, H100

pytestmark = pytest.mark.compile

TARGETS = {"A100": A100_40G, "H100": H100}


def lower_attention(backend, chip, dtype, H, documents, B=2, T=1024, N=8, K=1):
    """Attention and its gradients, lowered for a chip."""

    def run(q, k, v, do, segments):
        segments = segments if documents else None
        attend = functools.partial(attention, segment_ids=segments, backend=backend)
        o, vjp = jax.vjp(attend, q, k, v)
        return o, *vjp(do)

    with abstract_on(chip) as abstract:
        q, k = (abstract((B, T, heads, H), dtype) for heads in (N, K))
        return jax.jit(run).lower(q, k, k, q, abstract((B, T), "int32"))


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("row", TILES, ids=lambda row: "-".join(map(str, row)))
def test_every_tile_of_the_table_compiles_without_spills(row, documents, tmp_path):
    backend, chip, _, _ = row
    found = resources_of_program(lambda: lower_attention(*row, documents), tmp_path)
    assert set(found) == set(KERNELS)
    for name, kernel in found.items():
        assert kernel.spills == 0, f"{name}: {kernel.registers} registers"
        assert kernel.shared_memory <= TARGETS[chip].shared_memory_per_block
        # Wide products of Hopper's own, and the exponential without its slow path.
        if row[2] == "bfloat16":
            assert ("wgmma" if chip == "H100" else "mma.sync") in kernel.ptx, name
        assert "ex2.approx.ftz.f32" in kernel.ptx, name
        # The assembler of JAX's CUDA 12 reads no newer one.
        assert float(re.search(r"\.version (\S+)", kernel.ptx)[1]) < 9, name


def layer_program(backend, saved) -> str:
    """A layer of the 1.1B and its gradients under `jax.checkpoint`, compiled for the A100."""
    config = TINYLLAMA_1B
    block = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0)))
    definition, state = nnx.split(block)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*saved))
    def layer(weights, x):
        rope = rope_tables(jnp.arange(config.context)[None], config)
        return nnx.merge(definition, weights)(x, rope, None, ExecutionConfig(attention=backend))

    def run(weights, x, dy):
        y, vjp = jax.vjp(layer, weights, x)
        return y, *vjp(dy)

    with abstract_on("A100") as abstract:
        weights = jax.tree.map(lambda w: abstract(w.shape, "bfloat16"), nnx.to_pure_dict(state))
        x = abstract((8, config.context, config.width), "bfloat16")
        return jax.jit(run).lower(weights, x, x).compile(compiler_options=OPTIMISED).as_text()


@pytest.mark.parametrize("backend", ["pallas", "triton"])
def test_a_layer_with_its_output_saved_runs_each_kernel_once(backend):
    program = layer_program(backend, saved=("attn_o", "attn_lse"))
    assert {name: kernel_calls(program, name) for name in KERNELS} == dict.fromkeys(KERNELS, 1)


@pytest.mark.parametrize("backend", ["pallas", "triton"])
def test_a_layer_with_nothing_saved_runs_forward_twice(backend):
    """What the test above would see if the names were lost."""
    program = layer_program(backend, saved=())
    assert {name: kernel_calls(program, name) for name in KERNELS} == {
        "flash_forward": 2,
        "flash_dq": 1,
        "flash_dkdv": 1,
    }


def test_tma_loads_tiles_on_hopper_or_says_what_it_needs(monkeypatch, tmp_path):
    import jax_triton

    row = ("triton", "H100", "bfloat16", 64)
    tile = Tile(64, 64, 4, 2, tma=True)
    monkeypatch.setitem(TILES, row, Tiles(tile, tile, tile))
    lower = functools.partial(lower_attention, *row, documents=False)
    if not hasattr(jax_triton, "TensorDescriptor"):
        with pytest.raises(ValueError, match="need Hopper or later and jax-triton 0.4.1"):
            lower()
        return
    found = resources_of_program(lower, tmp_path)
    for name in KERNELS:
        assert found[name].spills == 0
        assert "cp.async.bulk.tensor" in found[name].ptx and "wgmma" in found[name].ptx


def test_tma_is_refused_before_hopper(monkeypatch):
    row = ("triton", "A100", "bfloat16", 64)
    tile = Tile(64, 64, 4, 2, tma=True)
    monkeypatch.setitem(TILES, row, Tiles(tile, tile, tile))
    with pytest.raises(ValueError, match="need Hopper or later"):
        lower_attention(*row, documents=False)
