"""The 3T run's step, compiled for the sixteen A100-40GB that it is meant for; none is here."""

import dataclasses
import re
import time

import jax
import pytest

from benchmarks.kernels.kernel_resources import KERNELS, OPTIMISED, kernel_calls
from support.paths import ROOT
from tinyllama_jax.config_file import load_config
from tinyllama_jax.performance.program import Program, read_program
from tinyllama_jax.performance.targets import A100_40G, H100, absent_devices
from tinyllama_jax.planning.plan import lower_step
from tinyllama_jax.runtime.compiler import (
    GPU_OPTIONS,
    SINGLE_GPU_OPTIONS,
    compiler_options,
    is_known,
)
from tinyllama_jax.runtime.mesh import make_mesh
from tinyllama_jax.training.step import abstract_state

pytestmark = pytest.mark.compile

GIB, MIB = 2**30, 2**20
NODE_NETWORK = 400e9 / 8  # bytes a second, each way
A100_TOKENS_PER_SEC = 30_700  # excellent; a slower step hides more


def crossing(model) -> int:
    """Weights that cross the network: all but the norms' gains, which are in the others."""
    return model.parameters() - model.norm_gains()


def compile_step(config, hosts, data=1):
    mesh = make_mesh(data=data, devices=absent_devices(A100_40G, hosts=hosts, per_host=8))
    return lower_step(config, mesh).compile(compiler_options=OPTIMISED)


@pytest.fixture(scope="module")
def config():
    return load_config(str(ROOT / "configs" / "tinyllama_1b.py"))


@pytest.fixture(scope="module")
def compiled(config):
    """(the compiled step, seconds that lowering and compiling took)."""
    start = time.monotonic()
    return compile_step(config, hosts=2), time.monotonic() - start


@pytest.fixture(scope="module")
def program(compiled) -> Program:
    return read_program(compiled[0])


@pytest.fixture(scope="module")
def text(compiled):
    return compiled[0].as_text()


def of_kind(program, kind):
    return [collective for collective in program.collectives if collective.kind == kind]


def test_it_compiles_within_a_minute(compiled):
    print(f"lowered and compiled in {compiled[1]:.0f} s")
    assert compiled[1] < 60


def test_it_fits_with_room_to_spare(program):
    print(f"peak {program.peak_bytes / GIB:.2f} GiB a device")
    assert 15 * GIB < program.peak_bytes < 22.5 * GIB


def test_the_state_is_donated(config, program):
    mesh = make_mesh(devices=absent_devices(A100_40G, hosts=2, per_host=8))
    state_bytes = sum(
        leaf.dtype.itemsize * int(leaf.size) // (mesh.size if leaf.shape else 1)
        for leaf in jax.tree.leaves(abstract_state(config, mesh))
    )
    # And some padding of small arrays.
    assert state_bytes <= program.donated_bytes <= 1.001 * state_bytes


def test_every_weight_is_gathered_once_a_step_in_bf16(config, program):
    gathers = of_kind(program, "all-gather")
    assert {(c.dtype, c.devices, c.times) for c in gathers} == {("bf16", 16, 1)}
    assert sum(c.bytes for c in gathers) == 2 * crossing(config.model)
    assert len(gathers) == config.model.layers + 2  # and embedding, and head


def test_gradients_are_scattered_once_a_step_in_fp32(config, program):
    scatters = of_kind(program, "reduce-scatter")
    assert {(c.dtype, c.devices, c.times) for c in scatters} == {("f32", 16, 1)}
    assert sum(c.bytes for c in scatters) == 4 * crossing(config.model)
    assert len(scatters) == config.model.layers + 2


def test_no_gradient_is_added_up_in_any_order(text):
    """What XLA scatters it adds by atomics, in another order each time."""
    assert "embedding_gradient" in text
    assert not re.search(r" scatter\(", text)


def test_the_head_is_never_gathered_in_fp32(program):
    assert not [c for c in of_kind(program, "all-gather") if c.dtype != "bf16"]


def test_nothing_large_is_reduced_on_all_devices_or_moved_otherwise(program):
    others = [c for c in program.collectives if c.kind not in ("all-gather", "reduce-scatter")]
    assert others, "the loss is summed over all devices"
    assert sum(c.bytes * c.times for c in others) < 1024


def test_no_large_collective_is_synchronous(program):
    assert not [c for c in program.collectives if c.bytes > MIB and not c.asynchronous]


def wire_seconds(collective):
    """In a ring over both nodes every byte but one device's share enters a node once."""
    return collective.bytes * (collective.devices - 1) / collective.devices / NODE_NETWORK


def seconds_beside(collective):
    """Work takes at least its FLOPs at the A100's peak, and its bytes at peak bandwidth."""
    return collective.overlapped_flops / 312e12 + collective.overlapped_bytes / A100_40G.bandwidth


def test_communication_is_exposed_for_three_percent_of_the_step_at_most(config, program):
    """At 400 Gb/s a node: what a collective needs beyond the work that stands beside it."""
    exposed, whole = 0.0, 0.0
    for c in program.collectives:
        exposed += c.times * max(0.0, wire_seconds(c) - seconds_beside(c))
        whole += c.times * wire_seconds(c)
    tokens = config.batch_rows * config.model.context / 16
    share, unhidden = (seconds * A100_TOKENS_PER_SEC / tokens for seconds in (exposed, whole))
    print(f"exposed {share:.2%} of a step, {unhidden:.2%} if nothing were beside it")
    assert share < 0.03
    assert share < unhidden / 5, "most of it is hidden"


def test_all_layers_but_the_outermost_hide_their_communication(program):
    """The first bucket to arrive and the last to leave have nothing to hide behind.

    The compiler puts no more beside a collective than it thinks is needed, so that the longest, the
    head's, may stick out.
    """
    for kind, inner in (("all-gather", slice(2, None)), ("reduce-scatter", slice(None, -2))):
        buckets = of_kind(program, kind)[inner]
        hidden = [min(1, seconds_beside(c) / wire_seconds(c)) for c in buckets]
        print(kind, [f"{share:.2f}" for share in hidden])
        assert sorted(hidden)[1] > 0.9
        assert min(hidden) > 0.5


def test_no_matrix_product_runs_twice(config, program):
    """Forward and backward are six FLOPs for each weight but the embedding's, and no more."""
    multiplied = config.model.parameters() - config.model.vocab_size * config.model.width
    tokens = config.batch_rows * config.model.context // 16
    assert program.matmul_flops == 6 * (multiplied - config.model.norm_gains()) * tokens


def test_attention_runs_forward_once_a_layer(config, program, text):
    """Three micro-batches stand in the program: the first, the loop's and the last."""
    calls = {name: kernel_calls(text, name) for name in KERNELS}
    assert calls == dict.fromkeys(KERNELS, 3 * config.model.layers)
    # Two products forward and seven backward, of the causal half.
    pairs = config.model.context * config.model.query_heads * config.model.head_width
    tokens = config.batch_rows * config.model.context // 16
    assert program.attention_flops == 9 * config.model.layers * pairs * tokens


def test_traffic_beside_products_and_attention_is_low(config, program):
    per_token = program.other_bytes / (config.batch_rows * config.model.context // 16)
    print(f"{per_token / 1e6:.2f} MB a token")
    assert per_token < 5.0e6


@pytest.fixture(scope="module")
def alone(config):
    """(config, compiled step) of one H100: four micro-batches of 16 rows, as
    benchmarks/step/training.py has them."""
    execution = dataclasses.replace(config.execution, attention="pallas")
    one = dataclasses.replace(config, batch_rows=64, micro_batches=4, execution=execution)
    mesh = make_mesh(devices=absent_devices(H100))
    return one, lower_step(one, mesh).compile(compiler_options=OPTIMISED)


def test_traffic_and_memory_of_one_h100_are_low(alone):
    config, compiled = alone
    program = read_program(compiled)
    per_token = program.other_bytes / (config.batch_rows * config.model.context)
    print(f"{per_token / 1e6:.2f} MB a token, peak {program.peak_bytes / GIB:.2f} GiB")
    assert per_token < 5.0e6
    assert program.peak_bytes < 47.5 * GIB


def test_gradients_of_layers_add_onto_their_sums_inside_the_products(alone):
    """An addition of its own would read a gradient, and read and write its sum: 10 bytes a weight;
    only query, key and value, which are one product, and the embedding have one."""
    added = re.findall(r"= f32\[([\d,]+)\]\S* fusion\(.*kind=kLoop.*/add\"", alone[1].as_text())
    assert added and not {"2048,5632", "5632,2048", "2048,32000"} & set(added)


def test_every_compiler_option_is_known():
    mesh = make_mesh(devices=absent_devices(A100_40G))
    assert compiler_options(mesh) == GPU_OPTIONS | SINGLE_GPU_OPTIONS
    several = make_mesh(devices=absent_devices(A100_40G, hosts=1, per_host=2))
    assert compiler_options(several) == GPU_OPTIONS
    assert not is_known("xla_gpu_make_it_fast", True, mesh)


def test_a_data_axis_keeps_the_gathers_inside_a_node(config):
    """2 x 8: weights and gradients cross the network of a node as sums over `data` alone."""
    few = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=4))
    program = read_program(compile_step(few, hosts=2, data=2))
    devices = {(c.kind, c.devices) for c in program.collectives if c.bytes > MIB}
    assert devices == {("all-gather", 8), ("reduce-scatter", 8), ("all-reduce", 2)}
    sums = of_kind(program, "all-reduce")
    state = sum(c.bytes for c in sums if c.bytes > MIB)
    assert state == 4 * crossing(few.model) / 8


def test_plain_fsdp_gathers_each_layer_where_it_is_used(config):
    """Forward and backward, in the loop over all micro-batches; embedding and head once in it."""
    execution = dataclasses.replace(config.execution, gather="layer")
    program = read_program(compile_step(dataclasses.replace(config, execution=execution), hosts=2))
    gathers = of_kind(program, "all-gather")
    assert {(c.dtype, c.times) for c in gathers} == {("bf16", config.micro_batches)}
    assert len(gathers) == 2 * config.model.layers + 2
