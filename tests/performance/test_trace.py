"""The profiler over some steps of a run."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from support.paths import GOLDEN
from support.runs import losses, stop_at
from tinyllama_jax.config import BatchStageConfig
from tinyllama_jax.errors import UserError
from tinyllama_jax.performance import trace
from tinyllama_jax.performance.breakdown import Event
from tinyllama_jax.performance.trace import parse_steps, read_trace
from tinyllama_jax.training import loop, reports


def test_a_traced_run_says_where_its_steps_went_and_is_the_same_run(
    config, mesh, monkeypatch, capsys
):
    """Steps 5 to 8; validation and a checkpoint after step 6 are no part of them."""
    start, stop, times = jax.profiler.start_trace, jax.profiler.stop_trace, []
    evaluate, pauses = reports.evaluate, iter([1])

    def timed_start(*args, **options):
        start(*args, **options)
        times.append(time.monotonic())

    def timed_stop():
        times.append(time.monotonic())
        stop()

    def slow_at_first(*args):
        time.sleep(next(pauses, 0))
        return evaluate(*args)

    monkeypatch.setattr(jax.profiler, "start_trace", timed_start)
    monkeypatch.setattr(jax.profiler, "stop_trace", timed_stop)
    monkeypatch.setattr(reports, "evaluate", slow_at_first)
    # The step is done, or its time would be missing from the speed that is told.
    end, done = trace.Profiler.end, []

    def noted_end(self, step, state, batch):
        done.append(all(leaf.is_ready() for leaf in jax.tree.leaves(state)))
        return end(self, step, state, batch)

    monkeypatch.setattr(trace.Profiler, "end", noted_end)
    assert loop.run(config, mesh, "5:9")
    assert done == [True]
    folder = Path(config.run_folder) / "profile"
    found = json.loads((folder / "breakdown.json").read_text())
    assert (found["first_step"], found["steps"], found["device"]) == (5, 4, "cpu")
    seconds = {row["kind"]: row["seconds"] for row in found["rows"]}
    assert sum(seconds.values()) == pytest.approx(found["step_seconds"])
    assert 4 * found["step_seconds"] <= times[1] - times[0] - 1, "without the pause"
    for kind in ("matmul", "attention", "memory", "optimizer", "idle"):
        assert seconds[kind] > 0, kind
    assert {row["roofline_seconds"] for row in found["rows"]} == {None}
    table = (folder / "breakdown.txt").read_text()
    assert (
        "cpu, steps 5 to 8" in table and table.splitlines()[3].rstrip() in capsys.readouterr().out
    )
    assert (folder / "breakdown.png").stat().st_size > 10_000
    assert len(list((folder / "plugins" / "profile").glob("*/*.xplane.pb"))) == 1  # TensorBoard's
    assert not list(Path(config.run_folder).glob(".profile*"))

    recorded = json.loads((GOLDEN / "losses.json").read_text())
    np.testing.assert_allclose(list(losses(config).values()), recorded, rtol=2e-4)


def test_a_trace_that_fails_is_said_and_the_run_goes_on(config, mesh, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace, "write", full)
    assert loop.run(config, mesh, "3:4")
    assert "NOTHING IS TRACED: OSError: [Errno 28] No space" in capsys.readouterr().out
    assert not list(Path(config.run_folder).glob("*profile*"))


def test_times_are_told_where_the_roofline_is_not_found(config, mesh, monkeypatch, capsys):
    def unreadable(*_):
        raise ValueError("the compiler does not say how often while.7 runs")

    monkeypatch.setattr(trace, "roofline_by_kind", unreadable)
    assert loop.run(config, mesh, "3:5")
    assert "There is no roofline: ValueError: the compiler does not say" in capsys.readouterr().out
    assert (Path(config.run_folder) / "profile" / "breakdown.json").exists()


def test_a_cut_trace_leaves_nothing_and_the_same_command_goes_on(config, mesh, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert not loop.run(config, mesh, "5:11")
    assert not list(Path(config.run_folder).glob("*profile*"))
    assert "The same command again goes on" in capsys.readouterr().out
    assert loop.run(config, mesh, "5:11")
    out = capsys.readouterr().out
    assert "NOTHING IS TRACED: --profile 5:11 begins before step" in out and "later range" in out
    assert not (Path(config.run_folder) / "profile").exists()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("5", "give START:STOP"),
        ("5:", "give START:STOP"),
        ("-2:3", "give START:STOP"),
        ("7:7", "give START:STOP"),
        ("9:4", "give START:STOP"),
        ("9:14", "the run with step 12"),
        ("1:3", "begin at step 2"),
        ("5:9", "begin at step 8"),
    ],
)
def test_a_mistaken_range_costs_one_sentence_and_nothing_on_disk(config, mesh, asked, words):
    config = dataclasses.replace(config, batch_stages=(BatchStageConfig(6, 4),))
    with pytest.raises(UserError, match=words):
        loop.run(config, mesh, asked)
    assert not Path(config.run_folder).exists()


def test_ranges_up_to_the_last_step_are_taken(config):
    assert parse_steps(None, config) == range(0)
    assert parse_steps("2:13", config) == range(2, 13)


def xplane(path, planes):
    """A file as the profiler writes it, of {plane: {line: [(name, start, end in ns, facts)]}}."""
    text = ""
    for plane, lines in planes.items():
        events = [event for line in lines.values() for event in line]
        names = sorted({name for name, *_ in events})
        keys = sorted({key for *_, facts in events for key in facts})
        text += f'planes {{ name: "{plane}" '
        for field, known in (("event_metadata", names), ("stat_metadata", keys)):
            for index, name in enumerate(known, start=1):
                text += f'{field} {{ key: {index} value {{ id: {index} name: "{name}" }} }} '
        for line, events in lines.items():
            text += f'lines {{ name: "{line}" timestamp_ns: 1000 '
            for name, start, end, facts in events:
                text += f"events {{ metadata_id: {names.index(name) + 1} "
                text += f"offset_ps: {start}000 duration_ps: {end - start}000 "
                for key, value in facts.items():
                    value = f'str_value: "{value}"' if key[:3] == "hlo" else f"int64_value: {value}"
                    text += f"stats {{ metadata_id: {keys.index(key) + 1} {value} }} "
                text += "} "
            text += "} "
        text += "} "
    path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
    return path


KINDS = {"dot.1": "matmul", "add.2": "memory"}
MAIN = [("traced steps", 0, 100, {}), ("between steps", 40, 60, {}), ("between steps", 70, 75, {})]
WINDOWS = [(1000, 1040), (1060, 1070), (1075, 1100)]


def of_step(instruction, **facts):
    return {"hlo_op": instruction, "hlo_module": "jit_step", **facts}


def test_streams_of_the_first_gpu_are_read(tmp_path):
    streams = {
        "Stream #13(Compute)": [
            ("nvjet_tst_128x256", 5, 20, of_step("dot.1")),
            ("loop_add_fusion", 20, 30, of_step("add.2")),
            ("memset", 30, 31, of_step("while.3")),
            ("score", 45, 50, of_step("dot.1") | {"hlo_module": "jit_score"}),
        ],
        "Stream #14(MemcpyH2D)": [("MemcpyH2D", 10, 12, {})],
        "XLA Ops": [("dot.1", 5, 20, of_step("dot.1"))],  # what other tools derive from the streams
    }
    second = {"Stream #13(Compute)": [("nvjet", 0, 90, of_step("dot.1"))]}
    planes = {"/device:GPU:1": second, "/host:CPU": {"main": MAIN}, "/device:GPU:0": streams}
    windows, events = read_trace(xplane(tmp_path / "x", planes), "jit_step", KINDS)
    assert windows == WINDOWS
    assert events == [
        Event("matmul", 1005, 1020),
        Event("memory", 1020, 1030),
        Event("memory", 1030, 1031),
        Event("other", 1045, 1050),
        Event("other", 1010, 1012),
    ]


GRAPH = KINDS | {
    "loop_add_fusion.12": "memory",
    "input_reduce_fusion": "optimizer",
    "pallas_call.7": "memory",
    "norm_gradient": "memory",
}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("loop_add_fusion_12", "memory"),
        ("input_reduce_fusion", "optimizer"),
        ("norm_gradient__1", "memory"),
        ("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT", "matmul"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x32", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*)", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memset 3", "memory"),
        ("memcpy32_post", "memory"),
        ("loop_add_fusion_13", "unknown"),
    ],
)
def test_kernels_of_a_graph_tell_by_their_own_names_what_they_are(tmp_path, kernel, kind):
    """All have the graph's name where others have their instruction's; names as an H100 gave them,
    but for the A100's product and NCCL's."""
    streams = {"Stream #14(Compute)": [(kernel, 5, 20, of_step("command_buffer_54"))]}
    planes = {"/host:CPU": {"main": MAIN}, "/device:GPU:0": streams}
    _, events = read_trace(xplane(tmp_path / "x", planes), "jit_step", GRAPH)
    assert events == [Event(kind, 1005, 1020)]


def test_what_threads_of_a_cpu_go_on_with_is_a_part_of_the_instruction(tmp_path):
    """The first of two devices; the product was handed to other threads, which end it."""
    threads = {
        "main": MAIN,
        "first": [
            ("dot.1", 5, 6, of_step("dot.1", device_ordinal=0, _pt=0, _p=77)),
            ("add.2", 30, 34, of_step("add.2", device_ordinal=0, _pt=0, _p=78)),
            ("dot.1", 7, 8, of_step("dot.1", device_ordinal=1, _pt=0, _p=79)),
        ],
        "second": [
            ("end: dot.1", 19, 20, {"_ct": 0, "_c": 77}),
            ("task", 90, 95, {"_ct": 15, "_c": 78}),  # another kind of number
            ("end: dot.1", 94, 95, {"_ct": 0, "_c": 79}),
        ],
    }
    windows, events = read_trace(xplane(tmp_path / "x", {"/host:CPU": threads}), "jit_step", KINDS)
    assert windows == WINDOWS
    assert events == [Event("matmul", 1005, 1020), Event("memory", 1030, 1034)]
