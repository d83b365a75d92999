"""The scripts for CUDA machines, with an interpreter that only notes what it is asked for."""

import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CALLS = {
    "gpu.sh": ["ceilings", "training", "breakdown"],
    "gpu.sh, variants": ["training"],
    "gpu_learning.sh": ["repeat", "learning"],
    "attention.sh": ["attention", "attention", "attention"],  # the first by the sanitizer
}


def call(script, tmp_path, **variables):
    """(Exit code, programs of benchmarks/ that it called with their arguments, all it printed)."""
    noted, python = tmp_path / "noted", tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nprintf "%q " "$@" >>{noted}; echo >>{noted}\n'
        '[[ "$1" != *"$FAILS"* ]] || { echo "no such luck" >&2; exit 3; }\n'
    )
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n')
    for tool in (python, sanitizer):
        tool.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "FAILS": "none", "TMPDIR": str(tmp_path)}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = subprocess.run(
        [BENCHMARKS / script],
        env=env | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    calls = [shlex.split(line) for line in noted.read_text().splitlines()]
    programs = [(Path(c[0]).stem, c[1:]) for c in calls if c[0].startswith("benchmarks/")]
    return done.returncode, programs, done.stdout


@pytest.mark.parametrize("case", CALLS)
def test_programs_are_called_with_options_that_they_take(case, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script, _, variants = case.partition(", ")
    out = tmp_path / "out"
    asked = {"OUT": str(out), "DATA": "rows", "WIDTHS": "32 64", "VARIANTS": variants}
    code, programs, printed = call(script, tmp_path, **asked)
    assert code == 0, printed
    assert [name for name, _ in programs] == CALLS[case]
    for name, options in programs:
        # Exits where one is not taken.
        assert tyro.cli(importlib.import_module(name).Options, args=options)
    assert any(out.glob("*.log"))


@pytest.mark.parametrize("script", ["gpu.sh", "gpu_learning.sh", "attention.sh"])
def test_a_failure_is_shown_and_does_not_stop_the_rest(script, tmp_path):
    code, programs, printed = call(script, tmp_path, FAILS=f"{CALLS[script][0]}.py")
    assert code == 1 and "no such luck" in printed
    assert [name for name, _ in programs] == CALLS[script]
