"""Workers give their results or a reason, and results are written where they belong."""

import json
import os
import re
import subprocess
import sys
import types

import pytest

from benchmarks import running
from support.paths import ROOT
from tinyllama_jax.runtime.allocator import CARD_SHARE

WORKER = """
import atexit, json, os, sys, time
from benchmarks import running

def work(spec):
    kind = spec["kind"]
    print("a library's line")
    if kind == "no result":
        os._exit(0)
    if kind == "killed":
        os.kill(os.getpid(), 9)
    if kind == "out of memory":
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying\\nto allocate: a table")
    if kind == "fails":
        raise ValueError("no such thing")
    if kind == "sleeps":
        time.sleep(60)
    if kind == "prints as it exits":
        atexit.register(print, "good-bye")
    if kind == "crashes after its work":
        atexit.register(os.kill, os.getpid(), 11)
    if kind == "cannot tell its memory":
        return {"bytes": running.if_known("memory", lambda: None.size), "seconds": 1.5}
    if kind == "share of the card":
        return {"share": float(os.environ["XLA_CLIENT_MEM_FRACTION"])}
    if kind == "where modules come from":
        return {"benchmarks": running.__file__}
    return {"seconds": 1.5}

running.command(object, None, lambda _: 0, work)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Calls WORKER's `work` in a process of its own; the user is in another folder."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "a_benchmark.py").write_text(WORKER)
    elsewhere = tmp_path / "elsewhere" / "benchmarks"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("raise ImportError('this is not the project')")
    monkeypatch.chdir(elsewhere.parent)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))

    def call(kind: str, seconds: float = 60):
        return running.in_own_process("a_benchmark", {"kind": kind}, seconds)

    return call


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ("prints as it exits", {"seconds": 1.5}),
        ("crashes after its work", {"seconds": 1.5}),
        ("share of the card", {"share": CARD_SHARE}),
        ("where modules come from", {"benchmarks": running.__file__}),
    ],
)
def test_a_worker_s_result_survives_all_else_that_it_does(kind, result, work, capfd):
    assert work(kind) == result
    assert "a library's line" not in capfd.readouterr().err


def test_a_worker_names_what_it_could_not_tell(work, capfd):
    assert work("cannot tell its memory") == {"bytes": None, "seconds": 1.5}
    assert "NOT KNOWN: memory: AttributeError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no result", "a library's line"),
        ("killed", "killed by SIGKILL: a library's line"),
        ("fails", "ValueError: no such thing"),
        (
            "out of memory",
            "out of memory: RuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying",
        ),
    ],
)
def test_a_worker_without_a_result_leaves_a_reason_and_its_output(kind, reason, work, capfd):
    assert work(kind) == {"failure": reason}
    assert "a library's line" in capfd.readouterr().err


def test_a_worker_that_takes_too_long_is_stopped(work):
    assert work("sleeps", seconds=3) == {"failure": "not done within 3 s"}
    assert work("sleeps", seconds=0) == {"failure": running.NO_TIME}


@pytest.mark.parametrize("rehearsed", [False, True])
def test_a_rehearsal_says_so_and_stays_out_of_the_results(rehearsed, tmp_path):
    """This needs a new process, since programs read the variable as they start."""
    code = """
import json, sys, types
from pathlib import Path
from benchmarks import running
by_default, asked = (
    running.results_path(types.SimpleNamespace(quick=False, out=out), "training-1b", "NVIDIA H100")
    for out in (None, running.REPOSITORY / "benchmarks/results/x")
)
running.write_results(Path(sys.argv[1], "x"), "NVIDIA H100", "A title", [], [["a"], ["1|2"]], {})
tiny = running.MODELS["1b"] == running.TINY
print(json.dumps({"default": str(by_default), "asked": str(asked), "tiny": tiny}))
"""
    env = os.environ | {"TINYLLAMA_REHEARSED": "1" if rehearsed else "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, tmp_path]
    shown = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    answer = json.loads(shown.stdout)
    start = f"{ROOT}/benchmarks/" + ("rehearsed/REHEARSED-" if rehearsed else "results/")
    name = r"\d{4}-\d\d-\d\d-training-1b-NVIDIA-H100"
    assert re.fullmatch(re.escape(start) + name, answer["default"])
    assert answer["asked"] == f"{start}x" and answer["tiny"] == rehearsed
    text = (tmp_path / "x.md").read_text()
    assert ("NOTHING about any device" in text) == text.startswith("# REHEARSED: ") == rehearsed
    assert json.loads((tmp_path / "x.json").read_text())["rehearsed"] == rehearsed
    assert "| 1/2 |" in text


def test_a_quick_run_writes_nothing_unless_it_is_asked_to(tmp_path):
    quick = types.SimpleNamespace(quick=True, out=None)
    assert running.results_path(quick, "training", "cpu") is None
    quick.out = tmp_path / "x"
    assert running.results_path(quick, "training", "cpu") == tmp_path / "x"


def test_the_commit_is_that_of_the_variable_or_else_that_of_git(monkeypatch, tmp_path):
    monkeypatch.setenv("COMMIT", "a commit")
    assert running.commit() == "a commit"
    monkeypatch.delenv("COMMIT")
    if (running.REPOSITORY / ".git").exists():
        assert re.match(r"[0-9a-f]{40}(-dirty)?$", running.commit())
    # The files alone, inside another repository.
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "other"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "files").mkdir()
    monkeypatch.setattr(running, "REPOSITORY", tmp_path / "files")
    assert running.commit() is None
