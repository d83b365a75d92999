"""How the processes of a run find each other, and the scripts that start them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from support.paths import ROOT
from support.runs import config_file
from tinyllama_jax.config import Launch
from tinyllama_jax.errors import UserError
from tinyllama_jax.runtime import processes


def test_what_must_be_equal_is_compared_and_the_process_named(monkeypatch):
    def every(text):
        host, facts = json.loads(text)
        return [text, text, json.dumps([host, facts | {"config": {"seed": 1, "steps": 3}}])]

    monkeypatch.setattr(processes, "every", every)
    facts = {"config": {"seed": 0, "steps": 2}, "version": {"jax": "0.10.2"}}
    with pytest.raises(UserError, match=r"Process 2 on .*config.seed: 0 -> 1; config.steps: 2 ->"):
        processes.check_alike(facts)
    monkeypatch.setattr(processes, "every", lambda text: [text, text])
    processes.check_alike(facts)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node007", "node007"),
        ("node007,other3", "node007"),
        ("node[007-010,012],other3", "node007"),
        ("gpu-a[3,5]", "gpu-a3"),
    ],
)
def test_a_slurm_step_says_who_is_who(nodes, host):
    step = {
        "SLURM_JOB_ID": "1234567", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": nodes,
        "SLURM_PROCID": "1", "SLURM_NTASKS": "2",
    }  # fmt: skip
    assert processes.slurm_step(step) == (f"{host}:24567", 2, 1)
    # A batch script or a step of one task, which have most of these variables too, are alone.
    assert processes.slurm_step(step | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    del step["SLURM_STEP_NUM_TASKS"]
    assert processes.slurm_step(step) is None


def test_a_step_of_slurm_needs_no_options(monkeypatch):
    """What JAX is asked for: all devices of the machine, and one address to listen at."""
    step = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2",
    }  # fmt: skip
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: asked.append((a, k)))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(jax.config, "update", lambda *a: None)
    with processes.joined(Launch(), None):
        pass
    ((place, options),) = asked
    assert place == ("localhost:20001", 2, 0)
    assert options["coordinator_bind_address"] == "127.0.0.1:20001"
    assert options["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("coordinator", "words"),
    [
        ("node1", "give HOST:PORT"),
        ("localhost:99999", "give HOST:PORT"),
        ("no.such.host.invalid:23456", "has no address"),
        ("192.0.2.1:23456", "cannot listen"),  # of documentation: no machine has it
    ],
)
def test_an_address_that_cannot_serve_is_refused(coordinator, words):
    with pytest.raises(UserError, match=words):
        processes.address_to_bind(coordinator)


def test_the_address_that_is_bound_is_one_alone(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="a free port"):
            processes.address_to_bind(f"127.0.0.1:{other.getsockname()[1]}")
    assert processes.address_to_bind("localhost:23456") == "127.0.0.1:23456"
    # Some systems give a machine's own name the address 127.0.1.1, which others cannot reach.
    info = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 23456))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [info])
    with pytest.raises(UserError, match="no other machine can connect"):
        processes.address_to_bind("node1:23456")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coordinator": "node1:1"}, "belong together"),
        ({"process_id": 0}, "belong together"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "count the processes from 0"),
        ({"data_axis": 0}, "--data-axis is 0"),
    ],
)
def test_launch_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Launch(**options)


SCRIPTS = {"gpu_1": 1, "a100_8": 8, "a100_16": 16, "h100_8": 8}


@pytest.mark.parametrize(("script", "devices"), SCRIPTS.items())
def test_a_launch_script_asks_for_its_devices(config, tmp_path, script, devices):
    file = config_file(config, tmp_path / "config.py")
    text = (ROOT / "launch" / f"{script}.py").read_text()
    assert f"launch(devices={devices})" in text and f"python launch/{script}.py CONFIG" in text
    if script == "a100_16":
        done = subprocess.run(
            [sys.executable, f"launch/{script}.py", file], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
        )  # fmt: skip
        assert done.returncode == 2
        assert "for 16 devices in all, and there are 2 in each of 1 processes" in done.stderr
        assert not Path(config.run_folder).exists()


@pytest.mark.parametrize("said", ["", "Unable to initialize backend 'cuda': ...\nmore"])
def test_a_machine_without_the_device_is_told_in_a_sentence(monkeypatch, said):
    """JAX raises a bare assertion where CUDA is asked for and its plugin is not there."""

    def devices():
        raise AssertionError(said)

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError, match=r"^JAX finds no device \([^)\n]+\): on GPUs, pip install"):
        with processes.joined(Launch(), 1):
            pass


@pytest.mark.parametrize("name", ["a100_8", "a100_16"])
def test_a_batch_script_queues_again_what_a_signal_saved(name, tmp_path):
    file = ROOT / "launch" / "slurm" / f"{name}.sbatch"
    assert subprocess.run(["bash", "-n", str(file)]).returncode == 0
    text = file.read_text()
    for line in (
        "--signal=TERM@300",
        "--requeue",
        "--exclusive",
        "--mem=0",
        f"--nodes={2 if name == 'a100_16' else 1}",
    ):
        assert f"#SBATCH {line}\n" in text
    # In the place of Slurm's: srun ends with a code, scontrol says what it is asked for.
    (tmp_path / "srun").write_text('#!/bin/bash\necho "$@"\nexit "$CODE"\n')
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho scontrol "$@"\n')
    for tool in tmp_path.iterdir():
        tool.chmod(0o755)
    for code in (0, 2, 75, 124):
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code), "SLURM_JOB_ID": "7"}
        done = subprocess.run(
            ["bash", str(file), "configs/x.py", "--run-folder", "a b"],
            env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code
        said = done.stdout.splitlines()
        assert said[0] == (
            "--cpu-bind=none --kill-on-bad-exit=1 --wait=60 "
            f"python launch/{name}.py configs/x.py --run-folder a b"
        )
        assert said[1:] == (["scontrol requeue 7"] if code == 75 else [])
