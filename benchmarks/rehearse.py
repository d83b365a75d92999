"""The minutes on a rented card, rehearsed on a CPU: gpu.sh by all its stages, as it is run there.

    make rehearse

The files without git go into a folder of their own, with the wheels that travel along, and gpu.sh
is called there by an interpreter that has what a card's machine has (card_requirements.txt). An
`nvidia-smi` on PATH names a card that is not there, and a variable tells the programs, which train
tiny models and mark what they write (running.py). Looked at are the exit codes, every file of the
archive, a stage that fails, and a limit that is used up. Exit code 1 says what is not as it should
be.

What a card alone can show: cuDNN, kernels that CUDA compiles, its profiler, memory, and any time.
The tests marked gpu are collected, and skipped.
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

REPOSITORY = Path(__file__).parents[1]
MARK, SENTENCE = "REHEARSED", "this says NOTHING about any device"
STAND_INS = {
    "nvidia-smi": '#!/bin/sh\necho "NVIDIA H100 80GB HBM3"\n',
    "compute-sanitizer": '#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n',
}
TABLE, PICTURE = (".json", ".md"), (".json", ".md", ".png")
# Stage -> (how its results are named, their suffixes).
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
# Of attention, what a CPU does not have.
ELSEWHERE = ("triton", "cudnn", "torch cudnn", "tokamax mosaic_gpu", "tokamax triton")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of gpu.sh."""

    why: str
    stages: str
    limit: int
    code: int = 0
    broken: str = ""
    """A program that fails, in a way of its own."""
    variables: dict[str, str] = dataclasses.field(default_factory=dict)


CALLS = (
    Call("without the wheels", "smoke", 170, 2),
    Call("the first command", "smoke training breakdown peers", 530),
    Call("the second command", "tests ceilings", 170),
    Call("the variants", "variants", 530),
    Call("attention", "sanitizer attention tune", 530, variables={"WIDTHS": "64"}),
    Call("equal bits and decoding", "repeat decoding", 530),
    Call("learning", "learning", 530),
    Call("a stage that fails, and the next", "sanitizer ceilings", 170, 1, "attention.py"),
    Call("a limit that is used up", "learning ceilings", 28, 1),
)


def copy_files(folder: Path) -> None:
    """What git knows or would add, and the wheels: what travels."""
    git = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run(
        [*git, "--exclude-standard"], check=True, capture_output=True, text=True
    )
    wheels = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob(".wheels/*.whl")]
    for name in filter(None, [*listed.stdout.split("\0"), *wheels]):
        if (REPOSITORY / name).is_file():  # and not deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)


def commit() -> str:
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()


def run(call: Call, files: Path, out: Path, env: dict[str, str]) -> tuple[int, str]:
    """(exit code, all that gpu.sh printed), shown on the way."""
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
    """Takes away what the call shall miss: a program, or the wheels."""
    lost = files / ("benchmarks/" + call.broken if call.broken else ".wheels")
    aside = lost.with_suffix(".aside")
    missing = call.broken or call.code == 2
    if missing:
        lost.rename(aside)
    if call.broken:
        lost.write_text("raise SystemExit('it is meant to fail')\n")
    yield
    if missing:
        aside.replace(lost)


def failures(found: Any) -> list[str]:
    """All that is called a failure, anywhere in a result, but for what a card alone can do."""
    if isinstance(found, list):
        return [failure for each in found for failure in failures(each)]
    if not isinstance(found, dict):
        return []
    why, system = found.get("failure"), found.get("system", "")
    known = system in ELSEWHERE or why == "takes no documents"  # which PyTorch's does nowhere
    own = [f"{system}: {why}"] if why and not known else []
    return own + [failure for each in found.values() for failure in failures(each)]


def faults(call: Call, code: int, printed: str, out: Path, sha: str) -> list[str]:
    """What is not as it should be after a call."""
    found = [] if code == call.code else [f"exit code {code} instead of {call.code}"]
    if call.code == 2:  # nothing is begun
        return found + ["it names no command that helps"] * ("make wheels" not in printed)
    names = {path.name for path in out.iterdir()}
    kept = {name for name in names if name.startswith("breakdown-")}
    if len(kept) != 2 * ("breakdown" in call.stages):
        found.append(f"breakdown kept {sorted(kept)} and not a trace and a compiled step")
    if names - kept != {"results.tar.gz"}:
        return [*found, f"{out} holds {sorted(names)} and not one archive"]
    with tarfile.open(out / "results.tar.gz") as archive:
        files = {x.name: archive.extractfile(x).read().decode(errors="replace") for x in archive}
    for stage in call.stages.split():
        if f"{stage}.log" not in files and (call.code == 0 or stage != "ceilings"):
            found.append(f"there is no {stage}.log")
        if call.code == 0:
            if f"{stage}: no time left" in printed:
                found.append(f"{stage} had no time left")
            name, suffixes = RESULTS.get(stage, ("", ()))
            for suffix in suffixes:
                if not any(f"-{name}" in file and file.endswith(suffix) for file in files):
                    found.append(f"there is no {name}{suffix}")
    for name, text in files.items():
        if name.endswith((".log", ".out")):
            continue
        if not name.startswith(MARK):
            found.append(f"{name} does not say that it is rehearsed")
        if name.endswith(".md") and SENTENCE not in text:
            found.append(f"{name} does not say in its table that it is rehearsed")
        if name.endswith(".json"):
            result = json.loads(text)
            if result["commit"] != sha:
                found.append(f"{name} names the commit {result['commit']}")
            if call.code == 0:
                found += [f"{name}: {failure}" for failure in failures(result)]
    return found


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
            found = [f"{call.why}: {fault}" for fault in faults(call, code, printed, out, sha)]
            print("\n".join([f"  WRONG: {fault}" for fault in found] or ["  as it should be"]))
            print(f"  {time.monotonic() - start:.0f} s\n", flush=True)
            wrong += found
        written = {path.name for path in (files / "benchmarks" / "results").iterdir()} - committed
        wrong += [f"benchmarks/results/ was written to: {name}" for name in sorted(written)]
    minutes = (time.monotonic() - started) / 60
    print(f"Rehearsed in {minutes:.0f} minutes: {len(wrong)} faults.", *wrong, sep="\n")
    print("Not rehearsed: cuDNN, kernels that CUDA compiles, its profiler, memory, and any time.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
