"""gpu.sh starts the right programs, keeps to its time and leaves its results.

The interpreter here only notes what it is asked to run; `make rehearse` runs the programs.
"""

import importlib
import os
import shlex
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import tyro

from benchmarks.step.training import Options
from support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
# Stage -> the module that it runs.
STAGES = {
    "smoke": "benchmarks.card.smoke",
    "training": "benchmarks.step.training",
    "breakdown": "benchmarks.step.breakdown",
    "peers": "benchmarks.step.training",
    "variants": "benchmarks.step.training",
    "tests": "pytest",
    "ceilings": "benchmarks.kernels.ceilings",
    "sanitizer": "benchmarks.kernels.attention",
    "attention": "benchmarks.kernels.attention",
    "tune": "benchmarks.kernels.attention",
    "repeat": "benchmarks.step.repeat",
    "learning": "benchmarks.step.learning",
    "decoding": "benchmarks.generation",
}
PYTHON = r"""#!/bin/bash
# Notes its arguments, and tells which packages are missing without importing any.
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
        """(module, its options) of each program that was started, in order.

        Not counted are the installation of .wheels/ and questions to the interpreter (-c).
        """
        lines = [shlex.split(line, comments=True) for line in self.noted.read_text().splitlines()]
        return [(line[1], line[2:]) for line in lines if line[0] == "-m" and line[1] != "pip"]

    def modules(self) -> list[str]:
        return [module for module, _ in self.calls()]

    def archived(self) -> set[str]:
        assert [path.name for path in self.out.iterdir()] == ["results.tar.gz"]
        with tarfile.open(self.out / "results.tar.gz") as archive:
            return set(archive.getnames())


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_every_stage_runs_its_program_with_options_that_it_takes(machine):
    code, printed = machine.call(STAGES=" ".join(STAGES), DATA="rows", WIDTHS="32 64")
    assert code == 0, printed
    assert machine.modules() == list(STAGES.values())
    for module, options in machine.calls():
        if module != "pytest":
            # Exits if an option is not taken.
            assert tyro.cli(importlib.import_module(module).Options, args=options)
    logs = {f"{stage}.{kind}" for stage in STAGES for kind in ("log", "out")}
    assert machine.archived() == logs


def test_the_stage_of_tests_names_all_files_that_have_tests_for_a_gpu(machine):
    assert machine.call(STAGES="tests")[0] == 0
    ((_, options),) = machine.calls()
    assert options[options.index("-m") + 1] == "gpu"
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text() and path != Path(__file__)
    }
    assert {option for option in options if option.endswith(".py")} == marked


def test_by_default_ours_and_the_peers_are_measured_within_the_limit(machine):
    code, printed = machine.call()
    assert code == 0, printed
    stages = ("smoke", "training", "breakdown", "peers")
    assert machine.modules() == [STAGES[stage] for stage in stages]
    (_, first), _, (_, second) = machine.calls()[1:]
    training, peers = (tyro.cli(Options, args=options) for options in (first, second))
    assert "peer" in training.systems and "peers" in peers.systems
    for options in (training, peers):
        assert "ours" in options.systems  # a ratio needs both sides from one call
        assert 300 < options.seconds < 400
        assert options.caches == Path(machine.env["CACHES"])


def test_the_archive_holds_what_this_call_wrote_and_nothing_older(machine):
    """The folder is the real results/, where the committed tables are."""
    fresh = BENCHMARKS / "results" / f"test-{os.getpid()}.json"
    touch = Path(machine.env["PYTHON"])
    touch.write_text(touch.read_text() + f"echo {{}} >{shlex.quote(str(fresh))}\n")
    try:
        assert machine.call(STAGES="ceilings")[0] == 0
        assert machine.archived() == {"ceilings.log", "ceilings.out", fresh.name}
    finally:
        fresh.unlink(missing_ok=True)


def test_a_failure_is_shown_and_does_not_stop_the_rest(machine):
    code, printed = machine.call(STAGES="repeat ceilings", FAILS="benchmarks.step.repeat")
    assert code == 1 and "no such luck" in printed and "repeat: exit code 3" in printed
    assert machine.modules() == [STAGES["repeat"], STAGES["ceilings"]]
    assert "repeat.log" in machine.archived()


def test_a_failed_smoke_test_ends_the_call(machine):
    code, printed = machine.call(STAGES="smoke ceilings", FAILS="benchmarks.card.smoke")
    assert code == 1 and "no such luck" in printed
    assert machine.modules() == [STAGES["smoke"]]
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
def test_what_cannot_be_done_is_said_before_anything_is_started(machine, variables, sentence):
    code, printed = machine.call(**variables)
    assert code == 2 and sentence in printed
    assert machine.calls() == []


def test_no_stage_runs_longer_than_the_limit_or_starts_at_its_end(machine, tmp_path):
    limit = tmp_path / "limit"
    (tmp_path / "timeout").write_text(f'#!/bin/sh\necho "$2" >>{limit}\nshift 2\nexec "$@"\n')
    (tmp_path / "timeout").chmod(0o755)
    code, printed = machine.call(STAGES="ceilings repeat smoke", LIMIT="25", SLEEPS="2")
    assert code == 0 and limit.read_text() == "25\n"  # `timeout 0` would be no limit
    assert "repeat: no time left" in printed and "smoke: no time left" in printed
    assert machine.modules() == [STAGES["ceilings"]]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_call_leaves_what_was_measured(machine, how):
    process = machine.start(STAGES="ceilings repeat", SLEEPS="1")
    deadline = time.monotonic() + 30
    while len(machine.calls()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(how)
    if how is signal.SIGKILL:  # the stage goes on: this signal cannot be passed on
        process.wait()
        assert "ceilings.log" in machine.archived()
        return
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 143, printed
    assert {"ceilings.log", "repeat.log"} <= machine.archived()


def test_cuda_s_compiler_is_found_beside_nvcc(machine, tmp_path):
    cuda = tmp_path / "cuda"
    for file in ("nvvm/libdevice/libdevice.10.bc", "bin/ptxas", "bin/nvcc"):
        (cuda / file).parent.mkdir(parents=True, exist_ok=True)
        (cuda / file).touch(0o755)
    (tmp_path / "nvcc").symlink_to(cuda / "bin" / "nvcc")
    asked = {"STAGES": "ceilings", "CUDA_HOME": "/nowhere", "XLA_FLAGS": "--xla_a=b"}
    assert machine.call(**asked)[0] == 0
    assert machine.noted.read_text().endswith(f"# --xla_a=b --xla_gpu_cuda_data_dir={cuda}\n")


def test_cuda_s_compiler_is_found_in_triton(machine, tmp_path):
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
