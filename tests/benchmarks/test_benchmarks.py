"""Benchmarks run where there is no GPU, and the search for tiles writes its table."""

import ast
import dataclasses
import gzip
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from support.paths import ROOT
from tinyllama_jax.conversion import huggingface
from tinyllama_jax.data.tokenizer import load_tokenizer
from tinyllama_jax.model.llama import init_weights
from tinyllama_jax.model.tiles import TILES, Tile, Tiles, _tiles
from tinyllama_jax.preparation.documents import Document

BENCHMARKS = ROOT / "benchmarks"
TABLE = ROOT / "tinyllama_jax" / "model" / "tiles.py"


@pytest.fixture(scope="module")
def scripts():
    """Imports a module of benchmarks/ by name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def tuning(scripts):
    return scripts("tuning")


def run(*arguments):
    command = [sys.executable, str(BENCHMARKS / "attention.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_quick_on_a_cpu(tmp_path):
    before = sorted(BENCHMARKS.rglob("*.json"))
    shown = run("--quick", "--out", str(tmp_path / "found"))
    assert shown.returncode == 0, shown.stderr
    assert "NOTHING about any GPU" in shown.stdout
    assert sorted(BENCHMARKS.rglob("*.json")) == before
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"] == "cpu" and found["versions"]["jax"] == jax.__version__
    assert {"commit", "rows"} <= set(found)

    rows = {(row["system"], row["case"]["documents"]): row for row in found["rows"]}
    assert len(rows) == 16  # 8 systems
    for system in ("pallas", "reference"):
        for documents in (False, True):
            row = rows[system, documents]
            assert row["failure"] is None and row["same_bits"] and row["error"] < 1e-2
            for which in ("forward", "backward"):
                time = row[which]
                assert 0 < time["ms_min"] <= time["ms"] <= time["ms_max"]
                assert time["tflops"] > 0 and time["calls"] > 0
        assert rows[system, True]["backward"]["over_whole"] > 0
    # A system that fails is a row with a reason.
    assert "no tiles for cpu" in rows["triton", False]["failure"]
    assert rows["triton", False]["forward"] is None
    if importlib.util.find_spec("torch"):
        assert rows["torch flash", False]["failure"] is None
        assert rows["pallas", False]["backward"]["best_peer"] == "torch flash"
        assert rows["torch flash", True]["failure"] == "takes no documents"
    table = (tmp_path / "found.md").read_text()
    assert table.count("| pallas |") == 2 and "no tiles for cpu" in table


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [((), "no GPU here"), (("--tune", "--quick"), "no GPU"), (("--systems", "mine"), "'mine'")],
)
def test_what_cannot_be_is_said_in_a_sentence(arguments, complaint):
    shown = run(*arguments)
    assert shown.returncode == 2
    assert complaint in shown.stderr and "Traceback" not in shown.stderr


def fake_timer(runs, rounds, seconds):
    """Tiles of fewer rows are faster; all of them run."""
    for call, wait in runs.values():
        wait(call(0))
    return {tile: {"ms": tile.rows / 32} for tile in runs}


def table_of(path) -> dict:
    """TILES of a copy of tiles.py."""
    namespace = {"__name__": "copy"}
    source = path.read_text().replace("@dataclasses.dataclass(frozen=True)\n", "")
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, ast.Assign)]
    exec(compile(tree, str(path), "exec"), {**namespace, "_tiles": _tiles}, namespace)
    return namespace["TILES"]


def test_tuning_finds_the_fastest_and_writes_it_over_its_row(tuning, tmp_path, monkeypatch):
    path = tmp_path / "tiles.py"
    shutil.copy(TABLE, path)
    small = tuning.Case(1, 64, 2, 1, 32)
    choices = [Tile(32, 32, 4, 1), Tile(16, 32, 4, 2)]
    monkeypatch.setattr(tuning, "tuning_case", lambda dtype, H: small)
    monkeypatch.setattr(tuning, "candidates", lambda *_: choices)
    for _ in range(2):  # the second time over what the first one wrote
        tuning.tune_table(path, ["pallas"], "A100", "bfloat16", [32], fake_timer)

    winner = Tiles(*[choices[1]] * 3)
    row = ("pallas", "A100", "bfloat16", 32)
    assert table_of(path) == TILES | {row: winner}
    comments = re.findall(r"    # \d{4}-.*", path.read_text())
    assert len(comments) == 1 + len(re.findall(r"    # \d{4}-.*", TABLE.read_text()))
    assert f"jax {jax.__version__}, {small}: 0.500, 0.500, 0.500 ms" in path.read_text()
    assert max(map(len, comments)) <= 100
    ruff = shutil.which("ruff", path=Path(sys.executable).parent)
    if ruff:
        subprocess.run([ruff, "format", "--check", "--line-length=100", path], check=True)


def test_a_new_row_and_a_long_one_are_written_as_ruff_does(tuning, tmp_path):
    path = tmp_path / "tiles.py"
    tiles = Tiles(*[Tile(128, 128, 8, 3, True)] * 3)
    path.write_text(
        tuning.rewrite(TABLE.read_text(), ("pallas", "B200", "bfloat16", 128), tiles, "x")
    )
    assert table_of(path) == TILES | {("pallas", "B200", "bfloat16", 128): tiles}
    ruff = shutil.which("ruff", path=Path(sys.executable).parent)
    if ruff:
        subprocess.run([ruff, "format", "--check", "--line-length=100", path], check=True)


def test_a_kernel_that_is_wrong_never_wins(tuning, monkeypatch):
    """However fast it is."""
    from tinyllama_jax.model import pallas_kernels

    honest = pallas_kernels.dq

    def dq(call, *arrays):
        return honest(call, *arrays) * (2 if call.tiles.dq.rows == 16 else 1)

    monkeypatch.setattr(pallas_kernels, "dq", dq)
    choices = [Tile(32, 32, 4, 1), Tile(16, 32, 4, 2)]
    case = tuning.Case(1, 64, 2, 1, 32)
    tiles, times = tuning.tune("pallas", "A100", "float32", case, lambda _: choices, fake_timer)
    assert tiles == Tiles(choices[1], choices[1], choices[0])
    assert times == [0.5, 0.5, 1.0]


def test_candidates_hold_what_the_table_has(tuning):
    """And leave out what could not be fast."""
    for row, tiles in TILES.items():
        for kernel in tuning.KERNELS:
            found = tuning.candidates(kernel, *row)
            assert getattr(tiles, kernel) in found
            assert 15 < len(found) < 120
            if row[1:3] == ("H100", "bfloat16"):  # what two groups of warps would compute twice
                assert not [t for t in found if t.rows == 64 and t.warps == 8]
            if row[3] == 128:  # more than its 4 warps can hold
                assert not [t for t in found if t.rows == t.columns == 128 and t.warps == 4]


@pytest.fixture
def one_thread():
    """PyTorch's threads wait for each other longer than they work on a model this small."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ours_of(scripts, model, rows: int, **options):
    """A `running.Spec` of ours in fp32, in micro-batches of four rows."""
    spec = scripts("running").spec_of("tiny", rows, "float32", 2, micro_rows=4)
    spec |= {"whose": "tinyllama_jax", "options": options, "flags": {}, "without": ("norm", "loss")}
    spec |= {"predict": True, "begun": time.time()}
    return spec | {"model": dataclasses.asdict(model)}


def test_a_training_step_is_timed_and_reported(scripts, tmp_path, capsys):
    training, tiny = scripts("training"), scripts("running").TINY
    options = training.Options(steps=2, quick=True, out=tmp_path / "found")
    system = training.System("tinyllama_jax", "float32", 4, {"recompute": "elementwise"})
    row = {"system": system.whose, "name": str(system), "precision": system.precision}
    row |= training.run(ours_of(scripts, tiny, 8, **system.options))
    assert len(row["seconds"]) == 2 and len(row["losses"]) == 2 + training.WARMUP
    assert abs(row["losses"][0] - 6.24) < 0.3  # ln 512
    assert row["first_step_seconds"] > row["compile_seconds"] > 0
    training.complete(row, tiny, 8)
    failed = {"system": "torch", "name": "torch", "precision": "float32", "failure": "no torch"}
    training.report([row, failed], "tiny", options)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["steps"][0]["tokens_per_s"] == 8 * 64 / (sum(row["seconds"]) / 2)
    assert "| torch | float32 | no torch |" in (tmp_path / "found.md").read_text()

    # A GPU's numbers and options are longer; nothing of them is cut in 80 columns.
    row |= {"name": str(training.gpu_systems(("ours",))[0]), "first_step_seconds": 81.4}
    row |= {"tokens_per_s": 123_456, "tokens_per_s_range": [119_999, 124_001]}
    row |= {"mfu_full": 0.581, "mfu_causal": 0.539, "peak_gib": 46.51}
    row |= {"predicted_tokens_per_s": 131_072}
    training.report([row, failed], "1b", options)
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80 and shown.count(scripts("running").QUICK) == 2
    numbers = ["1", "123,456", "(119,999-124,001)", "58.1%", "53.9%", "46.5", "131,072", "81", "s"]
    assert numbers in [line.split() for line in shown]
    assert "2: torch, float32: no torch" in shown


def measured(scripts, monkeypatch, answers, systems, seconds=1000.0):
    """Rows of `systems`, of which each in its turn finds an answer: tokens/s, or a failure. And how
    many rows were there each time that they were told, and what was asked for."""
    training, running = scripts("training"), scripts("running")
    told, asked, answers = [], [], iter(answers)

    def answer(script, spec, seconds, environment=None):
        asked.append(spec)
        found = next(answers)
        if isinstance(found, str):
            return {"failure": found}
        tokens = spec["rows"] * spec["model"]["context"]
        return {"seconds": [tokens / found], "first_step_seconds": 1.0}

    monkeypatch.setattr(running, "in_own_process", answer)
    monkeypatch.setattr(running, "device_kind", lambda: "cpu")
    options = training.Options(quick=True, seconds=seconds)
    rows = training.measure(systems, "tiny", options, lambda rows: told.append(len(rows)))
    return rows, told, asked


def test_a_peer_without_memory_is_tried_with_half_the_rows_and_is_not_beaten(scripts, monkeypatch):
    training = scripts("training")
    ours, peer = (training.System(whose, "bfloat16", 4) for whose in (training.OURS, "torch"))
    other = training.System("torch transformers", "bfloat16", 4)
    short = "out of memory: CUDA out of memory."

    rows, told, asked = measured(
        scripts,
        monkeypatch,
        [300.0, short, 200.0, "no such thing", 300.0],
        [ours, peer, other, ours],
    )
    assert [spec["micro_rows"] for spec in asked] == [4, 4, 2, 4, 4]
    assert [spec["rows"] for spec in asked] == [8] * 5 and told == [1, 2, 3, 4, 5]
    (line,) = training.ratio(rows)
    assert "tinyllama_jax, 4 rows over torch, 2 rows" in line and ": 1.50. " in line
    assert f"NOT beaten: torch, 4 rows ({short}); torch transformers, 4 rows (no such" in line

    # Once more, and that is all; with no peer at all there is no number.
    rows, _, asked = measured(scripts, monkeypatch, [300.0, short, short], [ours, peer])
    assert [spec["micro_rows"] for spec in asked] == [4, 4, 2]
    (line,) = training.ratio(rows)
    assert line.startswith("Peers that did not run are NOT beaten") and "over" not in line

    # Ours is not tried again in silence, nor is what failed begun again.
    rows, _, asked = measured(scripts, monkeypatch, [short, 200.0], [ours, peer, ours])
    assert [spec["whose"] for spec in asked] == ["tinyllama_jax", "torch"]
    assert [row.get("failure") for row in rows] == [short, None, short]
    assert training.ratio(rows) == []

    # What another turn found counts.
    assert training.ratio([{**rows[1], "failure": "no time left"}, rows[1]]) == []


def test_no_system_begins_that_would_not_be_done_in_time(scripts, monkeypatch, tmp_path):
    training = scripts("training")
    ours, peer = (training.System(whose, "bfloat16", 4) for whose in (training.OURS, "torch"))
    rows, _, asked = measured(scripts, monkeypatch, [], [ours], seconds=training.COLD - 1)
    assert rows[0]["failure"] == training.NO_TIME and not asked
    training.report(rows, "tiny", training.Options(quick=True, out=tmp_path / "found"), last=False)
    assert not list(tmp_path.iterdir()), "the table of an earlier call would be lost"

    # One that has run needs as long as it took: `times` are those of the clock.
    times = iter([0, 0, 40, 60, 60, 61])
    clock = types.SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr(training, "time", clock)
    rows, _, asked = measured(scripts, monkeypatch, [1.0, 1.0], [ours, ours], seconds=120)
    assert len(asked) == 2 and not any("failure" in row for row in rows)
    times = iter([0, 0, 40, 61])
    rows, _, asked = measured(scripts, monkeypatch, [1.0], [ours, ours], seconds=120)
    assert len(asked) == 1 and rows[1]["failure"] == training.NO_TIME


def test_what_only_foretells_costs_no_result(scripts, monkeypatch, capsys):
    training, tiny = scripts("training"), scripts("running").TINY

    def untold(*_):
        raise AttributeError("'NoneType' object has no attribute 'argument_size_in_bytes'")

    monkeypatch.setattr("tinyllama_jax.performance.breakdown.roofline_by_kind", untold)
    found = training.run(ours_of(scripts, tiny, 8))
    assert len(found["seconds"]) == 2 and found["predicted_seconds"] is None
    assert "NOT KNOWN: the roofline: AttributeError" in capsys.readouterr().err


@pytest.mark.parametrize("rehearsed", [False, True])
def test_what_is_rehearsed_says_so_and_stays_out_of_the_results(rehearsed, tmp_path):
    """In a process of its own: programs learn it as they start."""
    code = f"""
import sys, types
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
import running
options = types.SimpleNamespace(quick=False, out=None)
out = running.results_path(options, "training-1b", "NVIDIA H100")
print(out.relative_to(running.REPOSITORY / "benchmarks"))
asked = types.SimpleNamespace(quick=False, out=running.REPOSITORY / "benchmarks/results/x")
print(running.results_path(asked, "training", "cpu").relative_to(running.REPOSITORY))
print(running.MODELS["1b"] == running.TINY)
running.write_results(Path(sys.argv[1], "x"), "NVIDIA H100", "A title", [], [["a"], ["1|2"]], {{}})
"""
    env = {**os.environ, "TINYLLAMA_REHEARSED": "1" if rehearsed else ""}
    env["PYTHONPATH"] = str(BENCHMARKS.parent)
    command = [sys.executable, "-c", code, tmp_path]
    shown = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    out, asked, tiny = shown.stdout.split()
    folder, name = out.split("/")
    assert (folder, name.startswith("REHEARSED-")) == (
        ("rehearsed", True) if rehearsed else ("results", False)
    )
    expected = "rehearsed/REHEARSED-x" if rehearsed else "results/x"
    assert asked == f"benchmarks/{expected}" and tiny == str(rehearsed)
    text = (tmp_path / "x.md").read_text()
    assert ("NOTHING about any device" in text) == text.startswith("# REHEARSED: ") == rehearsed
    assert json.loads((tmp_path / "x.json").read_text())["rehearsed"] == rehearsed
    assert "| 1/2 |" in text


def test_a_breakdown_of_the_step_is_measured_and_written(scripts, tmp_path, capsys, monkeypatch):
    breakdown = scripts("breakdown")
    end, done = breakdown.Profiler.end, []

    def noted_end(self, step, state, batch):
        done.append(all(leaf.is_ready() for leaf in jax.tree.leaves(state)))
        return end(self, step, state, batch)

    monkeypatch.setattr(breakdown.Profiler, "end", noted_end)
    kept = tmp_path / "kept"
    breakdown.main(breakdown.Options(steps=2, keep=kept, quick=True, out=tmp_path / "found"))
    assert done == [True] and "matrix products" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    seconds = {row["kind"]: row["seconds"] for row in found["rows"]}
    assert seconds["matmul"] > 0 and seconds["optimizer"] > 0
    assert sum(seconds.values()) == pytest.approx(found["step_seconds"])
    assert found["spec"]["micro_rows"] == 4 and found["versions"]["jax"] == jax.__version__
    assert "| matrix products |" in (tmp_path / "found.md").read_text()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"found.json", "found.md", "found.png", "kept"}
    step, trace = sorted(kept.iterdir(), key=lambda path: ".xplane." in path.name)
    assert gzip.decompress(step.read_bytes()).startswith(b"HloModule jit_step")
    assert b"dot" in gzip.decompress(trace.read_bytes())


@pytest.mark.torch
def test_the_torch_peer_is_the_same_model_and_update(scripts, one_thread):
    import torch

    training, peer = scripts("training"), scripts("torch_peer")
    model = dataclasses.replace(scripts("running").TINY, rope_base=3e3, norm_eps=1e-3)
    spec = ours_of(scripts, model, 8)
    trainer = peer.Trainer(
        model,
        device="cpu",
        precision="float32",
        optimizer=training.OPTIMIZER,
        steps=training.SCHEDULED,
        compiled=False,
    )
    weights = init_weights(model, jax.random.key(0))
    flat = traverse_util.flatten_dict(weights, sep=".")
    tensors = {
        name: torch.from_numpy(row.to_hf(np.asarray(flat[row.path][row.index])).copy())
        for name, row in huggingface.tensors(model).items()
    }
    peer.load_hf_tensors(trainer.model, tensors)
    theirs = peer.timed_steps(trainer, training.token_batches(spec), spec["begun"])
    ours = training.run_ours(spec)  # begins with the same weights, those of seed 0
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=2e-5)
    assert ours["losses"][-1] != pytest.approx(ours["losses"][0], rel=1e-3), "it moves"


def in_this_process(monkeypatch, scripts, run):
    """Benchmarks that start processes run their work here, and by `run(spec)`."""
    running = scripts("running")

    def fake(script, spec, seconds, environment=None):
        return run(spec | {"begun": time.time()})

    monkeypatch.setattr(running, "in_own_process", fake)
    monkeypatch.setattr(running, "device_kind", lambda: "cpu")


@pytest.mark.torch
def test_it_learns_the_same_unless_it_begins_with_other_weights(
    scripts, data, one_thread, tmp_path, monkeypatch, capsys
):
    learning = scripts("learning")
    runs = {}

    def run(spec):
        key = spec["whose"], spec.get("seed")
        if key not in runs or spec["whose"] == "files":
            runs[key] = learning.run(spec)
        return runs[key]

    in_this_process(monkeypatch, scripts, run)
    source = Path(data.sources[0].path)
    options = learning.Options(data=source, steps=12, rows=4, quick=True, out=tmp_path / "found")
    assert learning.main(options) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["same"] and len(found["runs"]) == 4
    for systems, seeds in found["apart_in_halves"]:
        assert systems < 1e-3 < 1e-2 < seeds
    losses = found["runs"]["ours, seed 1"]["losses"]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.1
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "found.md").read_text()
    assert "It learns the same." in table and f"| {losses[-1]:.4f} |" in table
    assert table.count("\n| ") == 11 and "(found.png)" in table

    # Its second run begins with the weights of the first: no seeds are apart.
    runs["ours", 1] = runs["ours", 0]
    assert learning.main(options) == 1
    assert "DOES NOT LEARN THE SAME" in " ".join(capsys.readouterr().out.split())
    runs["ours", 1] = {**runs["ours", 1], "losses": [math.nan] * 12}
    assert learning.main(options) == 1


def test_rows_of_the_library_and_batches_of_them(scripts, data, tmp_path, monkeypatch):
    learning, tiny = scripts("learning"), scripts("running").TINY
    documents = [Document("a", "the cat sat on the mat\n" * 2000), Document("b", "a dog\n" * 3000)]
    library = {"prose": {"train": documents[:1]}, "code": {"train": documents[1:]}}
    monkeypatch.setattr("tinyllama_jax.preparation.library.standard_library", lambda: library)
    config = dataclasses.replace(tiny, vocab_size=280)
    rows_NS = learning.library_rows(config, tmp_path / "tokenizer.model")
    assert rows_NS.shape[1] == config.context + 1 and len(rows_NS) % 128 == 0
    ids = load_tokenizer(tmp_path / "tokenizer.model").encode(documents[0].text)
    np.testing.assert_array_equal(rows_NS[0], ids[: config.context + 1])

    np.save(tmp_path / "rows.npy", np.arange(30)[:, None] * np.ones(5, np.int32))
    spec = {"folder": str(tmp_path), "steps": 10, "rows": 6, "micro_rows": 3}
    found = np.stack(list(learning.batches(spec)))
    assert found.shape == (10, 2, 3, 5)
    for epoch in np.split(found[..., 0], 2):
        assert sorted(epoch.ravel()) == list(range(30))
    assert (found[:5] != found[5:]).any()


def test_a_difference_between_two_runs_is_found(scripts, tmp_path, monkeypatch, capsys):
    repeat = scripts("repeat")
    asked, kept = [], []

    def run(spec):
        asked.append(spec)
        if spec["repeatable"]:
            kept.append(repeat.run(spec))
        return kept[-1]

    in_this_process(monkeypatch, scripts, run)
    options = repeat.Options(steps=6, rows=2, quick=True, out=tmp_path / "found")
    assert repeat.main(options) == 0
    assert [spec["repeatable"] for spec in asked] == [True, False, True, False]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["same_bits"] and "weights.embedding_VD" in found["runs"][0]["bits"]

    # In bf16 JAX's own gradient of the embedding rounds more often than ours.
    begun = {"precision": "bfloat16", "begun": time.time()}
    ordered, other = (repeat.run(spec | begun) for spec in asked[:2])
    results = iter([ordered, other, other, other])
    in_this_process(monkeypatch, scripts, lambda spec: next(results))
    assert repeat.main(options) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Runs 1 and 3: THEY DIFFER in the loss from step [2-6] on and", shown), shown
    assert "without what that needs: the same bits" in shown


def test_a_run_that_fails_leaves_those_beside_it(scripts, tmp_path, monkeypatch, capsys):
    repeat = scripts("repeat")
    done = {"seconds": [0.1] * 8, "losses": [2.0] * 8, "bits": {"a": "1"}}
    done |= {"first_step_seconds": 3.0, "compile_seconds": 1.0}
    failed = {"failure": "not done within 9 s"}
    options = repeat.Options(steps=8, quick=True, out=tmp_path / "found")
    for answers, compared in (
        ([done, failed, done, failed], ["Runs 1 and 3: the same bits.", "is not known"]),
        ([done, done, failed, done], ["Runs 1 and 3: NOT COMPARED", "costs +0.00% of a step."]),
        ([failed] * 4, ["Runs 1 and 3: NOT COMPARED", "is not known"]),
    ):
        results = iter(answers)
        in_this_process(monkeypatch, scripts, lambda spec, results=results: next(results))
        assert repeat.main(options) == 1
        shown = " ".join(capsys.readouterr().out.split())
        assert all(words in shown for words in compared), shown
        found = json.loads((tmp_path / "found.json").read_text())
        assert len(found["runs"]) == 4 and found["runs"][0]["repeatable"]
        assert found["same_bits"] == (answers[0] == answers[2] == done)
        assert "not done within 9 s" in (tmp_path / "found.md").read_text()


@pytest.mark.torch
def test_generation_is_compared_with_transformers(scripts, tmp_path, capsys, monkeypatch):
    generation = scripts("generation")
    options = generation.Options(quick=True, batch=(1, 3), out=tmp_path / "found")
    assert generation.main(options) == 0
    assert "NOTHING about any device" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    turns = [(turn["batch"], turn["side"]) for turn in found["turns"]]
    assert turns == [(b, s) for b in (1, 3) for s in ("ours", "transformers", "ours")]
    for turn in found["turns"]:
        assert 0 < turn["first_seconds"] < turn["seconds"] and turn["same_tokens"] == 1
        assert turn["tokens_per_s"] == turn["batch"] * turn["new"] / turn["seconds"]
    table = (tmp_path / "found.md").read_text()
    assert table.count("| ours |") == 4 and table.count("100.0%") == 6
    assert "tiny at batch 1 " in table and "tiny at batch 3 " in table

    # A side that fails costs nothing of the other.
    def out_of_memory(*_):
        raise RuntimeError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setitem(generation.SIDES, "transformers", out_of_memory)
        options = generation.Options(quick=True, batch=(1,), out=tmp_path / "half")
        assert generation.main(options) == 1
    turns = json.loads((tmp_path / "half.json").read_text())["turns"]
    assert [turn.get("failure", "") for turn in turns] == [
        "",
        "RuntimeError: CUDA out of memory.",
        "",
    ]
    assert turns[0]["tokens_per_s"] > 0 and "ids" not in turns[0]
    assert "tiny at batch 1 NOT COMPARED" in (tmp_path / "half.md").read_text()

    # Another text ends in exit code 1.
    monkeypatch.setattr(generation, "save_random", lambda config, folder: None)
    for last, side in enumerate(generation.SIDES):
        made = [generation.timed(1, 0, lambda ids=last: (1.0, 2.0, [[7, ids]]))]
        monkeypatch.setitem(generation.SIDES, side, lambda *_, made=made: list(map(dict, made)))
    assert generation.main(generation.Options(quick=True, batch=(1,))) == 1
    assert "The texts differ" in capsys.readouterr().err


def test_ceilings_are_measured_and_written(scripts, tmp_path, capsys):
    ceilings = scripts("ceilings")
    options = ceilings.Options(seconds=0.001, quick=True, out=tmp_path / "found")
    assert ceilings.main(options) == 0
    table = (tmp_path / "found.md").read_text()
    assert table.count("TFLOP/s") == 5 and "| x + 1 over" in table
    assert "q/k/v: 64 x 64 x 80" in table and "of cpu" in capsys.readouterr().out
