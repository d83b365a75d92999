"""Compiled programs are kept for later processes, on GPUs."""

import dataclasses
import os
import subprocess
import sys

import pytest

from tinyllama_jax.config import DataConfig
from tinyllama_jax.errors import UserError
from tinyllama_jax.training import loop

# The folder is chosen by the platform of a mesh, and a process has one before it compiles anything;
# JAX keeps programs of CPUs too where it is told to.
WORK = """
import sys
from types import SimpleNamespace

import jax
import numpy as np
from jax import monitoring
from tinyllama_jax.runtime.compiler import keep_programs

hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
keep_programs(SimpleNamespace(devices=np.array([SimpleNamespace(platform=sys.argv[1])])))
jax.block_until_ready(jax.jit(lambda x: x @ x)(np.ones((4, 4))))
print(sum(hits), jax.config.jax_compilation_cache_dir)
"""


def work(platform, cache, **environment):
    """(programs found, folder) of a process that compiles something."""
    others = {name: os.environ[name] for name in os.environ if "CACHE" not in name}
    given = others | {"XDG_CACHE_HOME": str(cache)} | environment
    command = [sys.executable, "-c", WORK, platform]
    shown = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    hits, folder = shown.stdout.split()
    return int(hits), folder


def test_programs_for_gpus_are_found_by_the_next_process(tmp_path):
    folder = tmp_path / "tinyllama-jax"
    assert work("gpu", tmp_path) == (0, str(folder))
    assert folder.stat().st_mode & 0o77 == 0, "nobody else writes what is run from there"
    assert work("gpu", tmp_path)[0] > 0


def test_a_named_folder_and_a_cpu_are_left_alone(tmp_path):
    named = str(tmp_path / "named")
    assert work("gpu", tmp_path, JAX_COMPILATION_CACHE_DIR=named)[1] == named
    assert work("cpu", tmp_path) == (0, "None")
    assert not (tmp_path / "tinyllama-jax").exists()
    # A home that nobody can write to: the run goes on without.
    (tmp_path / "file").touch()
    assert work("gpu", tmp_path / "file") == (0, "None")


def test_a_run_keeps_its_programs_before_it_compiles_any(config, mesh, monkeypatch):
    kept = []
    monkeypatch.setattr(loop, "keep_programs", kept.append)
    with pytest.raises(UserError):
        loop.run(dataclasses.replace(config, data=DataConfig()), mesh)
    assert kept == [mesh]
