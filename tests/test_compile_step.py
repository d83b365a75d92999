"""The 3T run's step, compiled for the sixteen A100-40GB that it is meant for; none is here."""

import re
import time
from pathlib import Path

import jax
import pytest
from kernel_resources import KERNELS, OPTIMISED, kernel_calls

from tinyllama_jax.config import load_config
from tinyllama_jax.runtime.mesh import WEIGHT_AXES, batch_sharding, make_mesh
from tinyllama_jax.runtime.targets import A100_40G, absent_devices
from tinyllama_jax.training.step import abstract_state, make_step

pytestmark = pytest.mark.compile

ROOT = Path(__file__).parents[1]
GIB, MIB = 2**30, 2**20
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
COLLECTIVES = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"


@pytest.fixture(scope="module")
def compiled():
    """(the compiled step, seconds that lowering and compiling took, bytes of a device's state)."""
    config = load_config(str(ROOT / "configs" / "tinyllama_1b.py"))
    mesh = make_mesh(devices=absent_devices(A100_40G, hosts=2, per_host=8))
    rows = batch_sharding(mesh, rows_axis=1)
    shape = (config.micro_batches, config.batch_rows // config.micro_batches)
    context = config.model.context
    tokens = jax.ShapeDtypeStruct((*shape, context + 1), "int32", sharding=rows)
    weights = jax.ShapeDtypeStruct((*shape, context), "float32", sharding=rows)
    state = abstract_state(config, mesh)
    state_bytes = sum(
        leaf.dtype.itemsize * int(leaf.size) // (mesh.size if leaf.shape else 1)
        for leaf in jax.tree.leaves(state)
    )
    with jax.set_mesh(mesh):
        start = time.monotonic()
        lowered = make_step(config, mesh).lower(state, tokens, weights)
        program = lowered.compile(compiler_options=OPTIMISED)
    return program, time.monotonic() - start, state_bytes


@pytest.fixture(scope="module")
def text(compiled):
    return compiled[0].as_text()


def collectives(text):
    """(kind, whether it runs beside other work, arrays as (dtype, shape), name of its computation).

    One of several arrays counts each; of an all-gather what it gives, of a reduce-scatter what it
    takes.
    """
    found, computation = [], None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[0].lstrip("%")
        match = re.search(rf" = (.*?) ({COLLECTIVES})(-start)?\(", line)
        if not match:
            continue
        result, kind, start = match.groups()
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        arrays = [(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in shapes if dims]
        if start and kind != "all-reduce":  # such a one names what it takes, then what it gives
            half = len(arrays) // 2
            arrays = arrays[half:] if kind == "all-gather" else arrays[:half]
        found.append((kind, bool(start), arrays, computation))
    return found


def bytes_of(arrays):
    total = 0
    for dtype, shape in arrays:
        size = BYTES[dtype]
        for n in shape:
            size *= n
        total += size
    return total


def loops(text):
    """Names of the computations that loops run."""
    return set(re.findall(r"body=%?([\w.-]+)", text))


def test_it_compiles_within_a_minute(compiled):
    assert compiled[1] < 60


def test_it_fits_with_room_to_spare(compiled):
    memory = compiled[0].memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    print(f"peak {peak / GIB:.2f} GiB a device")
    assert 15 * GIB < peak < 30 * GIB


def test_the_state_is_donated(compiled):
    program, _, state_bytes = compiled
    donated = program.memory_analysis().alias_size_in_bytes
    assert state_bytes <= donated <= 1.001 * state_bytes  # and some padding of small arrays


def test_every_weight_is_gathered_once_a_step_in_bf16(text):
    gathers = [c for c in collectives(text) if c[0] == "all-gather" and bytes_of(c[2]) > MIB]
    arrays = [array for c in gathers for array in c[2]]
    assert len(arrays) == len(WEIGHT_AXES)
    assert {dtype for dtype, _ in arrays} == {"bf16"}
    assert bytes_of(arrays) == 2 * 1_100_048_384
    assert not {c[3] for c in gathers} & loops(text)


def test_gradients_are_scattered_once_a_step_in_fp32(text):
    scatters = [c for c in collectives(text) if c[0] == "reduce-scatter"]
    arrays = [array for c in scatters for array in c[2]]
    assert len(arrays) == len(WEIGHT_AXES)
    assert {dtype for dtype, _ in arrays} == {"f32"}
    assert bytes_of(arrays) == 4 * 1_100_048_384
    assert not {c[3] for c in scatters} & loops(text)


def test_nothing_large_is_reduced_on_all_devices_or_moved_otherwise(text):
    others = [c for c in collectives(text) if c[0] not in ("all-gather", "reduce-scatter")]
    assert others, "the loss is summed over all devices"
    assert sum(bytes_of(c[2]) for c in others) < 1024


def test_no_matrix_product_runs_twice(text):
    """Seven a layer, two for each of them in the backward pass, and three of the head.

    The compiler of JAX 0.12 makes one of q, k and v, forward and for the gradients of weights.
    """
    assert len(re.findall(r" dot\(|__cublas", text)) in (7 + 14 + 3, 5 + 12 + 3)


def test_each_kernel_runs_once_a_layer(text):
    assert {name: kernel_calls(text, name) for name in KERNELS} == dict.fromkeys(KERNELS, 1)
