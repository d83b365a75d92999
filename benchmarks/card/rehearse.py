"""Rehearses on a CPU what gpu.sh does on a rented GPU, by all its stages.

    make rehearse

The files of the project, without git, are copied into a folder with the wheels that travel along.
There gpu.sh is called, with an interpreter that has the packages of a rented machine
(requirements.txt). An `nvidia-smi` on PATH names a GPU that does not exist. A variable tells the
programs that this is a rehearsal: they train tiny models, and mark what they write (running.py).
Checked are the exit codes, every file in the archive, a stage that fails, and a limit that is used
up. The exit code is 1 if anything is wrong.

Only a GPU can show whether cuDNN, kernels compiled by CUDA, its profiler and its memory work, and
how long anything takes. The tests marked gpu are collected, and skipped.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
MARK, SENTENCE = "REHEARSED", "this says NOTHING about any device"
STAND_INS = {
    "nvidia-smi": '#!/bin/sh\necho "NVIDIA H100 80GB HBM3"\n',
    "compute-sanitizer": '#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n',
}
TABLE, PICTURE = (".json", ".md"), (".json", ".md", ".png")
# Stage -> (the name in its results' file names, their suffixes).
RESULTS = {
    "training": ("training-1b", TABLE),
    "breakdown": ("breakdown-1b", PICTURE),
    "peers": ("peers-1b", TABLE),
    "variants": ("variants-1b", TABLE),
    "ceilings": ("ceilings", TABLE),
    "attention": ("attention", TABLE),
    "tune": ("tiles", (".py",)),
    "repeat": ("repeat-120m", TABLE),
    "learning": ("learning-120m", PICTURE),
    "decoding": ("generation", TABLE),
}
ATTENTION = "benchmarks/kernels/attention.py"
# Systems of that file which a CPU does not have.
ELSEWHERE = ("triton", "cudnn", "torch cudnn", "tokamax mosaic_gpu", "tokamax triton")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of gpu.sh, and the exit code that it should have."""

    why: str
    stages: str
    limit: int
    code: int = 0
    broken: str = ""
    """The path of a program that is replaced by one that fails."""
    variables: dict[str, str] = dataclasses.field(default_factory=dict)


CALLS = (
    Call("without the wheels", "smoke", 170, 2),
    Call("the first command", "smoke training breakdown peers", 530),
    Call("the second command", "tests ceilings", 170),
    Call("the variants", "variants", 530),
    Call("attention", "sanitizer attention tune", 530, variables={"WIDTHS": "64"}),
    Call("equal bits and decoding", "repeat decoding", 530),
    Call("learning", "learning", 530),
    Call("a stage that fails, and the next", "sanitizer ceilings", 170, 1, ATTENTION),
    Call("a limit that is used up", "learning ceilings", 28, 1),
)


def copy_files(folder: Path) -> None:
    """Copies what is sent to a machine: the files that git knows or would add, and the wheels."""
    git = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run(
        [*git, "--exclude-standard"], check=True, capture_output=True, text=True
    )
    wheels = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob(".wheels/*.whl")]
    for name in filter(None, [*listed.stdout.split("\0"), *wheels]):
        if (REPOSITORY / name).is_file():  # git also lists files that were deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)


def commit() -> str:
    """The commit that is checked out."""
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()


def run(call: Call, files: Path, out: Path, env: dict[str, str]) -> tuple[int, str]:
    """Calls gpu.sh and shows what it prints; returns (exit code, all that it printed)."""
    own = {"STAGES": call.stages, "LIMIT": str(call.limit), "OUT": str(out)} | call.variables
    script = ["bash", str(files / "benchmarks" / "gpu.sh")]
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    printed = []
    with subprocess.Popen(script, env=env | own, **streams) as process:
        for line in process.stdout:
            print("  " + line, end="", flush=True)
            printed.append(line)
    return process.returncode, "".join(printed)


@contextlib.contextmanager
def without(files: Path, call: Call) -> Iterator[None]:
    """Takes away what the call shall lack, and brings it back: a program, or the wheels."""
    lost = files / (call.broken or ".wheels")
    aside = lost.with_suffix(".aside")
    missing = call.broken or call.code == 2
    if missing:
        lost.rename(aside)
    if call.broken:
        lost.write_text("raise SystemExit('It is meant to fail.')\n")
    yield
    if missing:
        aside.replace(lost)


def failures(result: Any) -> list[str]:
    """All failures anywhere in a result, except those of systems that only run on a GPU."""
    if isinstance(result, list):
        return [failure for each in result for failure in failures(each)]
    if not isinstance(result, dict):
        return []
    why, system = result.get("failure"), result.get("system", "")
    # PyTorch's attention takes no documents on a GPU either.
    known = system in ELSEWHERE or why == "takes no documents"
    own = [f"{system}: {why}"] if why and not known else []
    return own + [failure for each in result.values() for failure in failures(each)]


def faults(call: Call, code: int, printed: str, out: Path, sha: str) -> list[str]:
    """Checks what a call left and printed; returns a sentence for each fault."""
    wrong = [] if code == call.code else [f"exit code {code} instead of {call.code}"]
    if call.code == 2:  # nothing was started
        return wrong + ["it names no command that helps"] * ("make wheels" not in printed)
    names = {path.name for path in out.iterdir()}
    kept = {name for name in names if name.startswith("breakdown-")}
    if len(kept) != 2 * ("breakdown" in call.stages):
        wrong.append(f"breakdown kept {sorted(kept)} and not a trace and a compiled step")
    if names - kept != {"results.tar.gz"}:
        return [*wrong, f"{out} holds {sorted(names)} and not one archive"]
    with tarfile.open(out / "results.tar.gz") as archive:
        files = {x.name: archive.extractfile(x).read().decode(errors="replace") for x in archive}
    for stage in call.stages.split():
        if f"{stage}.log" not in files and (call.code == 0 or stage != "ceilings"):
            wrong.append(f"there is no {stage}.log")
        if call.code == 0:
            if f"{stage}: no time left" in printed:
                wrong.append(f"{stage} had no time left")
            name, suffixes = RESULTS.get(stage, ("", ()))
            for suffix in suffixes:
                if not any(f"-{name}" in file and file.endswith(suffix) for file in files):
                    wrong.append(f"there is no {name}{suffix}")
    for name, text in files.items():
        if name.endswith((".log", ".out")):
            continue
        if not name.startswith(MARK):
            wrong.append(f"{name} does not say that it is rehearsed")
        if name.endswith(".md") and SENTENCE not in text:
            wrong.append(f"{name} does not say in its table that it is rehearsed")
        if name.endswith(".json"):
            result = json.loads(text)
            if result["commit"] != sha:
                wrong.append(f"{name} names the commit {result['commit']}")
            if call.code == 0:
                wrong += [f"{name}: {failure}" for failure in failures(result)]
    return wrong


def main() -> int:
    sha, wrong, started = commit(), [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        folder = Path(temporary)
        files, stand_ins = folder / "files", folder / "stand-ins"
        copy_files(files)
        stand_ins.mkdir()
        for name, text in STAND_INS.items():
            (stand_ins / name).write_text(text)
            (stand_ins / name).chmod(0o755)
        env = os.environ | {
            "PATH": f"{stand_ins}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "COMMIT": sha,
            "CACHES": str(folder / "caches"),
            "TMPDIR": temporary,
            "JAX_PLATFORMS": "cpu",
            # PyTorch's threads wait for each other longer than they work on a model this small.
            "OMP_NUM_THREADS": "1",
            "TINYLLAMA_REHEARSED": "1",
        }
        committed = {path.name for path in (files / "benchmarks" / "results").iterdir()}
        for number, call in enumerate(CALLS):
            print(f"{call.why}: STAGES='{call.stages}' LIMIT={call.limit}", flush=True)
            out, start = folder / f"out-{number}", time.monotonic()
            with without(files, call):
                code, printed = run(call, files, out, env)
            own = [f"{call.why}: {fault}" for fault in faults(call, code, printed, out, sha)]
            print("\n".join([f"  WRONG: {fault}" for fault in own] or ["  as it should be"]))
            print(f"  {time.monotonic() - start:.0f} s\n", flush=True)
            wrong += own
        written = {path.name for path in (files / "benchmarks" / "results").iterdir()} - committed
        wrong += [f"benchmarks/results/ was written to: {name}" for name in sorted(written)]
    minutes = (time.monotonic() - started) / 60
    print(f"Rehearsed in {minutes:.0f} minutes: {len(wrong)} faults.", *wrong, sep="\n")
    print("Not rehearsed: cuDNN, kernels that CUDA compiles, its profiler, memory, and any time.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
