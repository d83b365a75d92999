"""The script for CUDA machines, with an interpreter that only notes what it is asked for.

`make rehearse` goes through the same with the programs themselves.
"""

import importlib
import os
import re
import shlex
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import tyro

from support.paths import ROOT
from tinyllama_jax.runtime.allocator import CARD_SHARE

BENCHMARKS = ROOT / "benchmarks"
# Stage -> the programs of benchmarks/ that it calls.
STAGES = {
    "smoke": ["smoke"],
    "training": ["training"],
    "breakdown": ["breakdown"],
    "peers": ["training"],
    "variants": ["training"],
    "tests": [],  # pytest
    "ceilings": ["ceilings"],
    "sanitizer": ["attention"],
    "attention": ["attention"],
    "tune": ["attention"],
    "repeat": ["repeat"],
    "learning": ["learning"],
    "decoding": ["generation"],
}
PYTHON = r"""#!/bin/bash
# Notes its arguments; imports nothing but says what is missing.
if [[ $* == *find_spec* ]]; then echo "$MISSING"; exit; fi
printf "%q " "$@" >>"$NOTED"; printf "# %s\n" "$XLA_FLAGS" >>"$NOTED"
sleep "$SLEEPS"
[[ "$*" != *"$FAILS"* ]] || { echo "no such luck" >&2; exit 3; }
"""
SANITIZER = '#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n'


class Machine:
    """A PATH, an OUT and an environment for gpu.sh."""

    def __init__(self, folder: Path):
        self.out, self.noted = folder / "out", folder / "noted"
        self.noted.touch()
        for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.env = os.environ | {
            "PYTHON": str(folder / "python"),
            "PATH": f"{folder}:{os.environ['PATH']}",
            "TMPDIR": str(folder),
            "CACHES": str(folder / "caches"),
            "OUT": str(self.out),
            "NOTED": str(self.noted),
            "MISSING": "",
            "SLEEPS": "0",
            "FAILS": "nothing fails",
            "XLA_FLAGS": "",
        }

    def start(self, **variables) -> subprocess.Popen:
        return subprocess.Popen(
            [BENCHMARKS / "gpu.sh"],
            env=self.env | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, **variables) -> tuple[int, str]:
        """(exit code, all that it printed)"""
        process = self.start(**variables)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed

    def calls(self) -> list[tuple[str, list[str]]]:
        """(program of benchmarks/, its options), in order."""
        lines = [shlex.split(line, comments=True) for line in self.noted.read_text().splitlines()]
        return [(Path(x[0]).stem, x[1:]) for x in lines if x[0].startswith("benchmarks/")]

    def archived(self) -> set[str]:
        assert [path.name for path in self.out.iterdir()] == ["results.tar.gz"]
        with tarfile.open(self.out / "results.tar.gz") as archive:
            return set(archive.getnames())


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_all_stages_call_programs_with_options_that_they_take(machine, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    code, printed = machine.call(STAGES=" ".join(STAGES), DATA="rows", WIDTHS="32 64")
    assert code == 0, printed
    assert [name for name, _ in machine.calls()] == sum(STAGES.values(), [])
    for name, options in machine.calls():
        # Exits where one is not taken.
        assert tyro.cli(importlib.import_module(name).Options, args=options)
    assert "-m gpu tests/model/test_gpu_attention.py" in machine.noted.read_text()
    logs = {f"{stage}.{kind}" for stage in STAGES for kind in ("log", "out")}
    assert machine.archived() == logs


def test_the_rehearsal_goes_through_all_stages(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rehearse = importlib.import_module("rehearse")
    whole = " ".join(call.stages for call in rehearse.CALLS if call.code == 0).split()
    assert sorted(whole) == sorted(STAGES)
    assert set(rehearse.RESULTS) == set(STAGES) - {"smoke", "tests", "sanitizer"}


def test_the_rehearsal_sees_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rehearse = importlib.import_module("rehearse")
    call = rehearse.Call("a call", "ceilings", 170)
    told = f"# REHEARSED: x\n{rehearse.SENTENCE}\n"
    good = {"ceilings.log": "", "REHEARSED-1-ceilings-cpu.md": told}
    good["REHEARSED-1-ceilings-cpu.json"] = '{"commit": "abc", "rows": []}'

    def faults(printed="", code=0, **changed):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
            for name, text in (good | changed).items():
                if text is not None:
                    (tmp_path / name).write_text(text)
                    archive.add(tmp_path / name, name)
        return rehearse.faults(call, code, printed, out, "abc")

    assert faults() == []
    assert faults(code=1) == ["exit code 1 instead of 0"]
    assert faults("== ceilings: no time left\n") == ["ceilings had no time left"]
    assert faults(**{"ceilings.log": None}) == ["there is no ceilings.log"]
    assert faults(**{"REHEARSED-1-ceilings-cpu.md": None}) == ["there is no ceilings.md"]
    assert faults(**{"2026-ceilings-cpu.md": told})[0].endswith("not say that it is rehearsed")
    assert "in its table" in faults(**{"REHEARSED-1-ceilings-cpu.md": "# x"})[0]
    other = (
        '{"commit": null, "rows": [{"system": "torch", "failure": "no luck"}, {"failure": null}]}'
    )
    wrong = faults(**{"REHEARSED-1-ceilings-cpu.json": other})
    assert "names the commit None" in wrong[0] and wrong[1].endswith("torch: no luck")
    (tmp_path / "out" / "more").touch()
    assert "not one archive" in faults()[0]


def test_by_default_ours_and_the_peers_are_measured_within_the_limit(machine):
    code, printed = machine.call()
    assert code == 0, printed
    assert [name for name, _ in machine.calls()] == ["smoke", "training", "breakdown", "training"]
    trainings = zip(machine.calls()[1::2], ("ours peer ours", "peers ours"), strict=True)
    for (_, options), parts in trainings:
        assert f"--systems {parts}" in " ".join(options)
        assert 300 < int(options[options.index("--seconds") + 1]) < 400
        assert options[options.index("--caches") + 1] == machine.env["CACHES"]


def test_what_a_call_wrote_comes_back_and_nothing_older(machine):
    """Of the real results/, where the committed tables are."""
    fresh = BENCHMARKS / "results" / f"test-{os.getpid()}.json"
    touch = Path(machine.env["PYTHON"])
    touch.write_text(touch.read_text() + f"echo {{}} >{shlex.quote(str(fresh))}\n")
    try:
        assert machine.call(STAGES="ceilings")[0] == 0
        assert machine.archived() == {"ceilings.log", "ceilings.out", fresh.name}
    finally:
        fresh.unlink(missing_ok=True)


def test_a_failure_is_shown_and_does_not_stop_the_rest(machine):
    code, printed = machine.call(STAGES="repeat ceilings", FAILS="repeat.py")
    assert code == 1 and "no such luck" in printed and "repeat: exit code 3" in printed
    assert [name for name, _ in machine.calls()] == ["repeat", "ceilings"]
    assert "repeat.log" in machine.archived()


def test_a_failed_smoke_test_ends_the_call(machine):
    code, printed = machine.call(STAGES="smoke ceilings", FAILS="smoke.py")
    assert code == 1 and "no such luck" in printed
    assert [name for name, _ in machine.calls()] == ["smoke"]
    assert machine.archived() == {"smoke.log", "smoke.out"}


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"STAGES": "ceilings warmup"}, "no stage warmup"),
        ({"LIMIT": "0"}, "LIMIT is 0"),
        ({"LIMIT": "24"}, "at least 25"),  # in which not even the smoke test would run
        ({"LIMIT": "9 minutes"}, "LIMIT is 9 minutes"),
        ({"MISSING": "tyro typeguard"}, "no tyro, typeguard here"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_begun(machine, variables, sentence):
    code, printed = machine.call(**variables)
    assert code == 2 and sentence in printed
    assert machine.calls() == []


def test_no_stage_outlasts_the_limit_or_is_begun_at_its_end(machine, tmp_path):
    limit = tmp_path / "limit"
    (tmp_path / "timeout").write_text(f'#!/bin/sh\necho "$2" >>{limit}\nshift 2\nexec "$@"\n')
    (tmp_path / "timeout").chmod(0o755)
    code, printed = machine.call(STAGES="ceilings repeat smoke", LIMIT="25", SLEEPS="2")
    assert code == 0 and limit.read_text() == "25\n"  # `timeout 0` would be no limit
    assert "repeat: no time left" in printed and "smoke: no time left" in printed
    assert [name for name, _ in machine.calls()] == ["ceilings"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_call_leaves_what_was_measured(machine, how):
    process = machine.start(STAGES="ceilings repeat", SLEEPS="1")
    deadline = time.monotonic() + 30
    while len(machine.calls()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    if how is signal.SIGKILL:  # which nothing can hand on
        process.wait()
        assert "ceilings.log" in machine.archived()
        return
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 143, printed
    assert {"ceilings.log", "repeat.log"} <= machine.archived()


def test_a_compiler_is_found_beside_nvcc(machine, tmp_path):
    cuda = tmp_path / "cuda"
    for file in ("nvvm/libdevice/libdevice.10.bc", "bin/ptxas", "bin/nvcc"):
        (cuda / file).parent.mkdir(parents=True, exist_ok=True)
        (cuda / file).touch(0o755)
    (tmp_path / "nvcc").symlink_to(cuda / "bin" / "nvcc")
    asked = {"STAGES": "ceilings", "CUDA_HOME": "/nowhere", "XLA_FLAGS": "--xla_a=b"}
    assert machine.call(**asked)[0] == 0
    assert machine.noted.read_text().endswith(f"# --xla_a=b --xla_gpu_cuda_data_dir={cuda}\n")


def test_or_in_triton(machine, tmp_path):
    triton = tmp_path / "triton"
    for file in ("lib/libdevice.10.bc", "bin/ptxas"):
        path = triton / "backends" / "nvidia" / file
        path.parent.mkdir(parents=True)
        path.touch(0o755)
    python = Path(machine.env["PYTHON"])
    first, rest = python.read_text().split("\n", 1)
    says = f"[[ $* != *triton* ]] || {{ echo {triton}; exit; }}"
    python.write_text(f"{first}\n{says}\n{rest}")
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert machine.call(STAGES="ceilings", CUDA_HOME="/nowhere")[0] == 0
    (flags,) = machine.noted.read_text().splitlines()
    folder = Path(flags.split("--xla_gpu_cuda_data_dir=")[1])
    assert (folder / "bin" / "ptxas").resolve() == triton / "backends/nvidia/bin/ptxas"
    assert (folder / "nvvm/libdevice/libdevice.10.bc").exists()


def test_commit_says_what_the_files_are_and_git_where_it_is_silent(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    running = importlib.import_module("running")
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


WORKER = """
import ctypes, os, sys
sys.path.insert(0, {benchmarks!r})
import running

def work(spec):
    kind = spec["kind"]
    print("a library's line")
    if kind == "none":
        os._exit(0)
    if kind == "killed":
        os.kill(os.getpid(), 9)
    if kind == "memory":
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying\\nto allocate: a table")
    if kind == "fails":
        raise ValueError("no such thing")
    if kind == "tells nothing":
        return {{"bytes": running.if_known("memory", lambda: None.size), "seconds": 1.5}}
    if kind == "share":
        return {{"share": float(os.environ["XLA_CLIENT_MEM_FRACTION"])}}
    return {{"seconds": 1.5}}

if sys.argv[1] == "--worker":
    import atexit, json
    kind = json.loads(sys.argv[2])["kind"]
    if kind == "good-bye":
        atexit.register(print, "good-bye")
    if kind == "dies when done":
        atexit.register(os.kill, os.getpid(), 11)
    if kind == "sleeps":
        import time
        time.sleep(60)
running.command(object, None, lambda _: 0, work)
"""


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("good-bye", {"seconds": 1.5}),
        ("dies when done", {"seconds": 1.5}),
        ("tells nothing", {"bytes": None, "seconds": 1.5}),
        ("share", {"share": CARD_SHARE}),
        ("none", {"failure": "a library's line"}),
        ("killed", {"failure": "killed by SIGKILL: a library's line"}),
        ("fails", {"failure": "ValueError: no such thing"}),
        (
            "memory",
            {
                "failure": "out of memory: RuntimeError: RESOURCE_EXHAUSTED: Out of memory while "
                "trying"
            },
        ),
        ("sleeps", {"failure": "not done within 3 s"}),
    ],
)
def test_what_a_worker_found_survives_all_that_it_prints(kind, found, monkeypatch, tmp_path, capfd):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    running = importlib.import_module("running")
    script = tmp_path / "script.py"
    script.write_text(WORKER.format(benchmarks=str(BENCHMARKS)))
    path = f"{BENCHMARKS.parent}:{os.environ.get('PYTHONPATH', '')}"
    seconds = 3 if kind == "sleeps" else 60
    own = {"PYTHONPATH": path}
    assert running.in_own_process(str(script), {"kind": kind}, seconds, own) == found
    told = capfd.readouterr().err
    assert ("NOT KNOWN: memory: AttributeError" in told) == (kind == "tells nothing")
    assert ("a library's line" in told) == ("failure" in found and kind != "sleeps")
