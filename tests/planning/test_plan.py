"""`tinyllama plan`: its arithmetic, what it says without a compiler, and its programs with one."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.paths import ROOT
from support.runs import config_file
from tinyllama_jax.cli import main
from tinyllama_jax.config import TINYLLAMA_120M, ExecutionConfig
from tinyllama_jax.config_file import load_config
from tinyllama_jax.errors import UserError
from tinyllama_jax.performance import roofline, targets
from tinyllama_jax.performance.program import Collective, read_program
from tinyllama_jax.performance.targets import (
    A100_40G,
    A100_80G,
    H100,
    H200,
    CompilerMissing,
    absent_devices,
    parse_mesh_name,
)
from tinyllama_jax.planning.memory import estimated_peak, most_rows
from tinyllama_jax.planning.plan import compile_step, plan
from tinyllama_jax.runtime.mesh import make_mesh

CONFIG = ROOT / "configs" / "tinyllama_1b.py"
GIB = 2**30
CROSSING = 1_100_048_384 - 45 * 2048  # weights that are gathered: all but the gains of norms


@pytest.fixture(scope="module")
def config_1b():
    return load_config(str(CONFIG))


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without JAX's CUDA plugin."""

    def fail(**kwargs):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", fail)


def estimate(config, mesh_name, **options):
    return plan(config, mesh_name, compiler=False, **options)


@pytest.mark.parametrize(
    ("name", "card", "devices"),
    [
        ("a100_16", A100_40G, 16),
        ("a100_80g_16", A100_80G, 16),
        ("h100_1", H100, 1),
        ("h200_8", H200, 8),
        ("h100_128", H100, 128),
    ],
)
def test_a_mesh_is_a_card_and_a_count(name, card, devices):
    assert parse_mesh_name(name) == (card, devices)


@pytest.mark.parametrize("name", ["a100", "b200_8", "a100_0", "h100_12", "h100_-8", "a100_80g", ""])
def test_any_other_mesh_is_refused_with_the_forms(name):
    with pytest.raises(UserError, match="CARD_COUNT, a card of a100, a100_80g, h100, h200 and 1"):
        parse_mesh_name(name)


def test_a_token_of_the_1b_takes_what_its_formula_says(config_1b):
    """6.2065 GFLOP of matrix products; attention 0.1845 forward and 2.5 times that backward."""
    work = roofline.work_by_formula(config_1b, 16, 16)
    tokens = 1024 * 2048 / 16  # of a device
    assert work.matmul_flops / tokens == pytest.approx(6.2065e9, rel=1e-4)
    assert work.attention_flops / tokens == pytest.approx(3.5 * 0.18455e9, rel=1e-4)
    assert work.other_bytes / tokens == pytest.approx(4.82e6, rel=1e-2)
    execution = ExecutionConfig(recompute="layers")
    again = roofline.work_by_formula(dataclasses.replace(config_1b, execution=execution), 16, 16)
    forward = 2 * 22 * (9_437_184 + 34_603_008 - 2048 * 5632)  # but for the last product
    assert (again.matmul_flops - work.matmul_flops) / tokens == pytest.approx(forward)
    assert (again.attention_flops - work.attention_flops) / tokens == pytest.approx(
        0.18455e9, rel=1e-4
    )


@pytest.mark.parametrize(
    ("mesh", "low", "high"), [("a100_1", 24_000, 32_200), ("h100_1", 80_974, 85_700)]
)
def test_the_1b_is_predicted_between_measured_runs_and_the_roofline(config_1b, mesh, low, high):
    found = estimate(config_1b, mesh).tokens_per_second_per_device
    assert found == pytest.approx((low, high), rel=0.04)


def test_days_and_dollars_follow_from_tokens_a_second(config_1b):
    found = estimate(config_1b, "a100_16", price=1.5)
    assert found.tokens == 1_430_512 * 1024 * 2048
    for rate, days, hours, dollars in zip(
        found.tokens_per_second[::-1], found.days, found.gpu_hours, found.dollars, strict=True
    ):
        assert rate * days * 86400 == pytest.approx(found.tokens)
        assert hours == pytest.approx(16 * 24 * days)
        assert dollars == pytest.approx(1.5 * hours)
    assert estimate(config_1b, "a100_16").dollars is None


def test_memory_adds_up_and_decides_whether_it_fits(config_1b):
    for mesh, fits in (("a100_16", True), ("a100_8", False), ("a100_80g_8", True)):
        found = estimate(config_1b, mesh)
        parts = (
            found.weights_bytes_per_device,
            found.optimizer_bytes_per_device,
            found.activation_bytes_per_device,
        )
        assert parts[0] == 4 * 1_100_048_384 // found.devices and parts[1] == 2 * parts[0]
        assert sum(parts) == found.peak_bytes_per_device
        assert found.fits is fits
        assert fits == (found.peak_bytes_per_device + 1.5 * GIB <= 0.9 * found.card_bytes)
    # What NCCL and cuBLAS need is decisive here.
    tight = dataclasses.replace(config_1b, batch_rows=15 * 16 * 2, micro_batches=2)
    found = estimate(tight, "a100_16")
    assert found.peak_bytes_per_device < 0.9 * found.card_bytes and not found.fits


def gather(**facts):
    facts = {
        "kind": "all-gather", "dtype": "bf16", "bytes": 2_200_096_768, "devices": 16,
        "asynchronous": True, "overlapped_flops": 0, "overlapped_bytes": 0, "times": 1,
    } | facts  # fmt: skip
    return Collective(**facts)


def test_collectives_take_nvlink_in_a_node_and_the_network_beyond():
    def seconds(mesh, fsdp, **facts):
        return roofline.wire_seconds(gather(**facts), A100_40G, mesh, fsdp, 50e9)

    assert seconds(16, 16) == pytest.approx(2.2001e9 * 15 / 16 / 50e9, rel=1e-4)
    assert seconds(8, 8, devices=8) == pytest.approx(2.2001e9 * 7 / 8 / 300e9, rel=1e-4)
    assert seconds(16, 8, devices=8) == seconds(8, 8, devices=8)
    # Eight rings leave a node side by side, each with one device's part of the gradient.
    reduced = {"kind": "all-reduce", "devices": 2, "bytes": 10**9}
    assert seconds(16, 8, **reduced) == pytest.approx(8 * 2 * 10**9 / 2 / 50e9)
    assert seconds(8, 4, **reduced) == pytest.approx(2 * 10**9 / 2 / 300e9)


def test_work_beside_a_collective_hides_it_unless_it_is_synchronous():
    flops, traffic = int(271.2e12 * 0.01), int(0.9 * 1555.2e9 * 0.01)

    def exposed(**facts):
        return roofline.exposed_seconds(gather(**facts), 0.05, A100_40G)

    assert exposed() == 0.05
    assert exposed(overlapped_flops=flops) == pytest.approx(0.04)
    assert exposed(overlapped_flops=flops, overlapped_bytes=traffic) == pytest.approx(0.03)
    assert exposed(overlapped_flops=9 * flops) == 0
    assert exposed(overlapped_flops=flops, asynchronous=False) == 0.05


@given(
    base=st.integers(0, 50_000),
    row=st.integers(100, 9_000),
    one_row_guess=st.integers(0, 50_000),
    a_row_guess=st.integers(100, 9_000),
    most=st.integers(1, 200),
)
def test_the_search_ends_at_a_measured_number_that_fits(
    base, row, one_row_guess, a_row_guess, most
):
    def peak_of(rows):
        assert 1 <= rows <= most
        return base + row * rows

    known = {}
    found = most_rows(peak_of, known, 40_000, most, one_row_guess, a_row_guess)
    last = max((rows for rows in range(1, most + 1) if peak_of(rows) <= 40_000), default=0)
    assert (found in known or found == 0) and found <= last
    if found < last:  # only because a row was guessed to take more than it does
        assert a_row_guess > row
    known = {}
    assert most_rows(peak_of, known, 40_000, most, base + row, row) == last
    assert len(known) == 1, "a true guess is measured once"


def test_a_good_guess_costs_one_measurement():
    known = {8: 23_500}
    assert most_rows(lambda rows: 9_000 + 1_810 * rows, known, 34_000, 64, 10_800, 1_800) == 13
    assert set(known) == {8, 13}


def test_larger_micro_batches_fit_when_more_is_computed_again(config_1b):
    found = estimate(config_1b, "a100_16").largest_micro_batches
    assert [(one.recompute, one.rows, one.whole_batch) for one in found] == [
        ("nothing", 11, False),
        ("elementwise", 14, False),
        ("layers", 64, True),
    ]
    layered = ExecutionConfig(recompute="layers", gather="layer")
    found = estimate(dataclasses.replace(config_1b, execution=layered), "a100_16")
    assert [one.recompute for one in found.largest_micro_batches] == ["elementwise", "layers"]


def test_epochs_come_from_manifests_or_from_the_user(config, config_1b):
    found = estimate(config, "a100_1").sources
    for source, share in zip(found, (0.7, 0.3), strict=True):
        assert source.tokens_read == pytest.approx(12 * 16 * 64 * share, abs=64)
        assert source.tokens_available > 8192 and source.tokens_available % 8192 == 0
        assert source.epochs == source.tokens_read / source.tokens_available
    unknown, given_ = estimate(config_1b, "a100_16", tokens={"starcoder": 2e11}).sources
    assert unknown.epochs is None and unknown.tokens_read > 2e12
    assert given_.epochs == pytest.approx(0.306416 * 3e12 / 2e11, rel=1e-4)


def test_padding_is_neither_read_nor_there(config, tmp_path):
    padded = config.data.sources[0]
    folder = shutil.copytree(padded.path, tmp_path / "padded")
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest["splits"]["train"]
    facts["padding_tokens"] = facts["records"] * 8192 // 4
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sources = (dataclasses.replace(padded, path=str(folder)),)
    data = dataclasses.replace(config.data, sources=sources)
    (found,) = estimate(dataclasses.replace(config, data=data), "a100_1").sources
    assert found.tokens_available == facts["records"] * 8192 * 3 / 4
    assert found.tokens_read == 12 * 16 * 64 * 3 / 4


def test_more_than_four_epochs_are_warned_of(config_1b):
    def notes(tokens):
        return [
            line for line in estimate(config_1b, "a100_16", tokens=tokens).notes if "read" in line
        ]

    assert notes({"starcoder": 2.3e11}) == []
    (line,) = notes({"starcoder": 2e11, "slimpajama": 6e11})
    assert "starcoder is read 4.6 times" in line


def test_without_the_plugin_it_says_what_to_install_and_that_it_guesses(
    no_compiler, config, tmp_path, capsys
):
    file = config_file(config, tmp_path / "config.py")
    assert main(["plan", file, "--mesh", "a100_2"]) == 0
    out, err = capsys.readouterr()
    assert "ESTIMATE WITHOUT THE COMPILER" in out and "dollars" not in out
    assert "pip install -e '.[plan]'" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_json_is_all_of_stdout_and_exit_code_3_says_that_it_does_not_fit(no_compiler, capfd):
    argv = ["plan", str(CONFIG), "--json"]
    assert main([*argv, "--mesh", "a100_8", "--price", "2"]) == 3
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["fits"] is found["compiled"] is False
    assert found["parameters"] == 1_100_048_384
    assert found["flops_per_token_full"] == pytest.approx(7.314e9, rel=1e-4)
    assert found["flops_per_token_causal"] == pytest.approx(6.761e9, rel=1e-4)
    assert found["peak_bytes_per_device"] > 35 * GIB
    assert 0 < found["exposed_communication_fraction"] < 0.01
    gathered, scattered = found["collectives"]
    assert (gathered["kind"], gathered["dtype"]) == ("all-gather", "bf16")
    assert scattered["bytes"] == 2 * gathered["bytes"] == 4 * CROSSING
    assert gathered["async"] is gathered["overlapped_flops"] is None
    assert found["dollars"][0] == 2 * found["gpu_hours"][0]
    # What is changed on the command line is planned.
    assert main([*argv, "--mesh", "a100_8", "--micro-batches", "16"]) == 0
    assert json.loads(capfd.readouterr().out)["rows_per_device"] == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--mesh"),
        (["--mesh", "tpu_8"], "CARD_COUNT"),
        (["--mesh", "a100_48"], "128 rows (batch_rows / micro_batches) is not divisible by the 48"),
        (["--mesh", "a100_16", "--data-axis", "3"], "data axis of 3"),
        (["--mesh", "a100_16", "--data-axis", "0"], "data axis of 0"),
        (["--mesh", "a100_16", "--network", "0"], "--network is 0"),
        (["--mesh", "a100_16", "--price", "-1"], "--price is -1"),
        (["--mesh", "a100_16", "--tokens", "pile", "3e11"], "sources are slimpajama, starcoder"),
        (["--mesh", "a100_16", "--tokens", "starcoder", "0"], "above 0"),
        (["--mesh", "a100_16", "--model.head-width", "160", "--execution.attention", "pallas"],
         "up to 128 wide"),
        (["--mesh", "a100_16", "--steps", "many"], "steps"),
    ],
)  # fmt: skip
def test_a_mistaken_option_costs_one_message(options, words, capsys):
    try:
        code = main(["plan", str(CONFIG), *options])
    except SystemExit as stop:  # tyro's own
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert words in " ".join((out + err).split()) and "Traceback" not in out + err


def test_a_missing_compiler_is_a_user_error(no_compiler):
    with pytest.raises(CompilerMissing, match="CUDA plugin"):
        absent_devices(H100)


@pytest.fixture(scope="module")
def command():
    """What `tinyllama plan` says of the 3T run: as users run it, with optimised programs."""
    unset = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    argv = [sys.executable, "-m", "tinyllama_jax.cli", "plan", str(CONFIG), "--mesh", "a100_16"]
    return subprocess.run([*argv, "--json"], env=environment, capture_output=True, text=True)


@pytest.mark.compile
def test_the_command_compiles_the_3t_run_in_silence(command):
    assert command.returncode == 0 and command.stderr == ""
    found = json.loads(command.stdout)
    assert found["compiled"] and found["fits"]
    assert 15 * GIB < found["peak_bytes_per_device"] < 30 * GIB
    for kind, dtype, size in (("all-gather", "bf16", 2), ("reduce-scatter", "f32", 4)):
        of_kind = [one for one in found["collectives"] if one["kind"] == kind]
        assert {one["dtype"] for one in of_kind} == {dtype}
        assert sum(one["bytes"] * one["times"] for one in of_kind) == size * CROSSING
    assert found["tokens_per_second_per_device"] == pytest.approx((24_000, 32_200), rel=0.04)


@pytest.mark.compile
def test_what_is_compiled_and_what_is_estimated_agree(command, config_1b):
    compiled, guess = json.loads(command.stdout), estimate(config_1b, "a100_16")
    assert guess.peak_bytes_per_device == pytest.approx(compiled["peak_bytes_per_device"], rel=0.1)
    for one, other in zip(
        compiled["largest_micro_batches"], guess.largest_micro_batches, strict=True
    ):
        assert one["peak_bytes_per_device"] <= (
            compiled["usable_bytes_per_device"] - compiled["reserve_bytes_per_device"]
        )
        assert one["rows"] == pytest.approx(other.rows, rel=0.1, abs=1)  # rows are whole
    assert guess.step_seconds == pytest.approx(compiled["step_seconds"], rel=0.1)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("model", "recompute", "gather", "rows", "micro_batches"),
    [
        ("1b", "nothing", "step", 4, 1),
        ("1b", "layers", "step", 8, 2),
        ("1b", "elementwise", "layer", 4, 2),
        ("120m", "elementwise", "step", 16, 4),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_compiled_peak(
    config_1b, model, recompute, gather, rows, micro_batches
):
    config = dataclasses.replace(
        config_1b,
        model=config_1b.model if model == "1b" else TINYLLAMA_120M,
        batch_rows=rows * micro_batches * 8,
        micro_batches=micro_batches,
        execution=ExecutionConfig("pallas", recompute, gather),
    )
    program = read_program(compile_step(config, make_mesh(devices=absent_devices(H100, 1, 8))))
    guess = estimated_peak(config, 8, 8)
    print(f"{guess / GIB:.2f} GiB estimated, {program.peak_bytes / GIB:.2f} compiled")
    assert guess == pytest.approx(program.peak_bytes, rel=0.1)
