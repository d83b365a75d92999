"""Where a step's time goes: events become rows, and instructions their kinds."""

import dataclasses
import json
import re
import types

import jax
import pytest

from benchmarks.kernels.kernel_resources import KERNELS, OPTIMISED
from tinyllama_jax.config import TINYLLAMA_1B, Config, DataConfig, ExecutionConfig
from tinyllama_jax.performance.breakdown import (
    NAMES,
    Event,
    make_breakdown,
    roofline_by_kind,
    share_time,
)
from tinyllama_jax.performance.breakdown_table import cells, draw, write
from tinyllama_jax.performance.program import kernel_kind, read_kinds, read_program, read_traffic
from tinyllama_jax.performance.targets import H100, absent_devices
from tinyllama_jax.planning.plan import lower_step
from tinyllama_jax.runtime.mesh import make_mesh

MS = 1e6  # in ns
EVENTS = [
    Event("unknown", 0 * MS, 60 * MS),  # a loop, and what is in it:
    Event("matmul", 0 * MS, 20 * MS),
    Event("memory", 10 * MS, 30 * MS),  # beside the product for 10 ms
    Event("communication", 15 * MS, 40 * MS),  # beside both for 5 ms, then one, then none
    Event("matmul", 40 * MS, 50 * MS),
    Event("matmul", 45 * MS, 50 * MS),  # a second one at the same time
    Event("other", 62 * MS, 64 * MS),
    Event("optimizer", 70 * MS, 130 * MS),  # cut by a pause and by the end
    Event("attention", 90 * MS, 95 * MS),  # inside the pause
]
WINDOWS = [(0 * MS, 80 * MS), (100 * MS, 110 * MS)]
EXPECTED = {
    "matmul": 10 + 5 / 2 + 5 / 3 + 10,
    "attention": 0,
    "memory": 5 / 2 + 5 / 3 + 10 / 2,
    "optimizer": 10 + 10,
    "communication": 5 / 3 + 10 / 2 + 10,
    "other": 2,
    "unknown": 10,
    "idle": 2 + 6,
}


def test_every_moment_is_counted_once():
    shares = share_time(EVENTS, WINDOWS)
    assert shares == pytest.approx({kind: ms * MS for kind, ms in EXPECTED.items()})
    assert sum(shares.values()) == pytest.approx(90 * MS)
    assert share_time([], [(5.0, 7.0)])["idle"] == 2.0


def test_a_table_a_file_and_a_picture_tell_the_same(tmp_path):
    least = {"matmul": 0.010, "attention": 0.0, "memory": 0.004, "optimizer": 0.008}
    found = make_breakdown("NVIDIA H100 80GB HBM3", range(10, 12), WINDOWS, EVENTS, least)
    assert found.step_seconds == pytest.approx(0.045)
    assert found.roofline_seconds == pytest.approx(0.022)
    write(found, tmp_path)
    text = (tmp_path / "breakdown.txt").read_text()
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"matrix products +12.08 +26.9% +10.00 +2.08 *\n", text), text
    assert re.search(r"step +45.00 +100.0% +22.00 +23.00 *\n", text), text
    assert ["optimizer", "10.00", "22.2%", "8.00", "2.00"] in cells(found)

    assert "H100 80GB HBM3, steps 10 to 11" in text
    kept = json.loads((tmp_path / "breakdown.json").read_text())
    assert [row["kind"] for row in kept["rows"]] == list(NAMES)
    assert kept["step_seconds"] == pytest.approx(0.045)
    assert (tmp_path / "breakdown.png").read_bytes().startswith(b"\x89PNG")
    # A device of unknown speed has no column of what nobody knows.
    unknown = make_breakdown("cpu", range(10, 12), WINDOWS, EVENTS, {})
    assert unknown.roofline_seconds is None
    assert {len(row) for row in cells(unknown)} == {3}
    draw(unknown, tmp_path / "cpu.png")


PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused (p.1: bf16[8,4], p.2: bf16[4,2]) -> bf16[8,2] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %p.2 = bf16[4,2]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,2]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%graph (q.1: bf16[8,4], q.2: bf16[4,2]) -> bf16[8,2] {
  %q.1 = bf16[8,4]{1,0} parameter(0)
  %q.2 = bf16[4,2]{1,0} parameter(1)
  %gemm = bf16[8,2]{1,0} fusion(%q.1, %q.2), kind=kCustom, calls=%fused, metadata={op_name="a"}
  ROOT %neg = bf16[8,2]{1,0} negate(%gemm), metadata={op_name="jit(step)/neg"}
}

ENTRY %main (a: bf16[8,4], b: bf16[4,2]) -> bf16[8,2] {
  %a = bf16[8,4]{1,0} parameter(0), metadata={op_name="state[\'optimizer\'][0]"}
  %b = bf16[4,2]{1,0} parameter(1)
  %call.1 = bf16[8,2]{1,0} call(%a, %b), to_apply=%graph
  %mha = bf16[8,2]{1,0} custom-call(%call.1), custom_call_target="__cudnn$fmhaSoftmax"
  %mul.1 = bf16[8,2]{1,0} multiply(%mha, %mha), metadata={op_name="jit(step)/optimizer/mul"}
  %mul.2 = bf16[8,2]{1,0} multiply(%mul.1, %mul.1), metadata={op_name="state[\'optimizer\']"}
  ROOT %sum = bf16[8,2]{1,0} all-reduce(%mul.2), replica_groups={{0,1}}, to_apply=%add
}
"""


def test_a_program_is_read_through_its_graphs():
    """What the driver is given as one graph stands in a computation of its own."""
    memory = types.SimpleNamespace(
        argument_size_in_bytes=0,
        output_size_in_bytes=0,
        alias_size_in_bytes=0,
        temp_size_in_bytes=0,
    )
    compiled = types.SimpleNamespace(as_text=lambda: PROGRAM, memory_analysis=lambda: memory)
    name, kinds = read_kinds(compiled)
    assert name == "jit_step"
    assert kinds == {
        "dot.1": "matmul",
        "gemm": "matmul",
        "neg": "memory",
        "mha": "attention",
        "mul.1": "optimizer",
        "mul.2": "memory",
        "sum": "communication",
    }
    program = read_program(compiled)
    assert program.matmul_flops == 2 * 8 * 4 * 2
    assert program.optimizer_bytes == 3 * 2 * 8 * 2
    assert program.other_bytes == 2 * program.optimizer_bytes + 2 * 2 * 8 * 2
    moved = program.optimizer_bytes
    assert read_traffic(compiled) == [
        ("jit(step)/neg", 2 * 2 * 8 * 2),
        ("jit(step)/optimizer/mul", moved),
        ("state['optimizer']", moved),
    ]


def test_a_program_that_tells_no_memory_is_read_all_the_same():
    """As one that comes from a cache on disk may."""

    def refuse():
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    for analysis in (lambda: None, refuse):
        compiled = types.SimpleNamespace(as_text=lambda: PROGRAM, memory_analysis=analysis)
        program = read_program(compiled)
        assert program.peak_bytes is None and program.donated_bytes is None
        assert program.matmul_flops == 2 * 8 * 4 * 2


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["pallas", "reference"])
def test_every_product_and_kernel_of_the_step_for_an_h100_is_found(backend):
    model = dataclasses.replace(TINYLLAMA_1B, layers=2)
    config = Config(
        run_folder="",
        model=model,
        data=DataConfig(),
        steps=10_000,
        batch_rows=8,
        micro_batches=2,
        execution=ExecutionConfig(attention=backend, recompute="elementwise"),
    )
    mesh = make_mesh(devices=absent_devices(H100))
    compiled = lower_step(config, mesh).compile(compiler_options=OPTIMISED)
    program, (_, kinds) = read_program(compiled), read_kinds(compiled)
    tokens = config.batch_rows * model.context
    weights = model.parameters() - model.vocab_size * model.width - model.norm_gains()
    assert program.matmul_flops == 6 * weights * tokens
    # Of products of T x T x H: nine of their causal halves in the kernels; eight in plain JAX, two
    # of them a second time.
    pairs = tokens * model.layers * model.query_heads * model.head_width * model.context
    assert program.attention_flops == (9 if backend == "pallas" else 16) * pairs
    for kernel in KERNELS if backend == "pallas" else ():
        call = rf"%([\w.-]+) = .* custom-call\(.*op_name=\"[^\"]*/{kernel}/"
        names = re.findall(call, compiled.as_text())
        assert len(names) == model.layers and {kinds[name] for name in names} == {"attention"}
        assert kernel_kind(kernel, kinds) == "attention"
    assert kernel_kind("norm_gradient__1", kinds) == kernel_kind("add_norm", kinds) == "memory"
    moved = read_traffic(compiled)
    assert sum(size for _, size in moved) == program.other_bytes
    # A loop's share is that of all its rounds, and SwiGLU's backward pass reads three arrays of it
    # and writes two, or three.
    swiglu = sum(size for name, size in moved if "swiglu" in name and name.endswith("add_any"))
    array = 2 * tokens * model.layers * model.swiglu_width
    assert 5 * array <= swiglu <= 6 * array
    # AdamW in fp32 reads four numbers of each weight and writes three; and a little beside it.
    assert 28 < program.optimizer_bytes / model.parameters() < 40

    least = roofline_by_kind(compiled, config, tokens, H100.device_kind)
    assert set(least) == {"matmul", "attention", "memory", "optimizer"}
    assert least["matmul"] == pytest.approx(program.matmul_flops / 794.5e12)
    bandwidth = 0.9 * H100.bandwidth
    assert least["memory"] + least["optimizer"] == pytest.approx(program.other_bytes / bandwidth)
    assert not roofline_by_kind(compiled, config, tokens, "cpu")
