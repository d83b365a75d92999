"""One run in several processes: real ones, over loopback, stopped and broken in several ways."""

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from conftest import SMALL
from test_loop import config_file, elsewhere, losses

from tinyllama_jax.config import (
    CheckpointConfig,
    Config,
    OptimizerConfig,
    SampleConfig,
    ValidationConfig,
)
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh
from tinyllama_jax.runtime.watch import PATIENCE, SILENCE
from tinyllama_jax.training import loop
from tinyllama_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent

# What a config file does to the process that reads it, as it comes to the data of step `HERE`.
HERE = 4
PRELUDE = """
import os, sys, time
from tinyllama_jax.training import loop
me = int(sys.argv[sys.argv.index("--process-id") + 1])
batches = loop._batches

def patched(config, rows, order, first_step):
    for step, batch in enumerate(batches(config, rows, order, first_step), first_step + 1):
        if step == {step}:
            {fault}
        yield batch

loop._batches = patched
"""


class Run:
    """Processes of one run, started together."""

    def __init__(self, config, count, *options, fault=None, step=HERE, own=()):
        self.config = config
        file = Path(config.run_folder).with_name(f"{Path(config.run_folder).name}.py")
        config_file(config, file)
        if fault is not None:
            file.write_text(PRELUDE.format(step=step, fault=fault) + file.read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.all = []
        for index in range(count):
            command = [sys.executable, "launch/cpu.py", str(file), *options]
            command += ["--coordinator", f"127.0.0.1:{self.port}"]
            command += ["--num-processes", str(count), "--process-id", str(index)]
            command += own[index] if own else []
            self.all.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
                )
            )  # fmt: skip

    def wait_for_step(self, step):
        metrics = Path(self.config.run_folder) / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("train/loss") < step:
            for process in self.all:
                assert process.poll() is None, process.communicate()
            time.sleep(0.02)

    def finish(self, timeout=120):
        """(exit code, stdout, stderr) of each."""
        ends = []
        try:
            for process in self.all:
                out, err = process.communicate(timeout=timeout)
                ends.append((process.returncode, out, err))
        finally:
            self.kill()
        return ends

    def kill(self):
        for process in self.all:
            if process.poll() is None:
                process.kill()
                process.communicate()


def lines(out):
    """What a process said, without Gloo, the library of collectives on CPUs."""
    return [line for line in out.splitlines() if line and not line.startswith("[Gloo]")]


@pytest.fixture(scope="module")
def small(data, tmp_path_factory) -> Config:
    return Config(
        run_folder=str(tmp_path_factory.mktemp("processes") / "run"),
        model=SMALL,
        data=data,
        steps=10,
        batch_rows=16,
        micro_batches=2,
        log_every=1,
        optimizer=OptimizerConfig(peak_lr=1e-2, end_lr=1e-3, warmup_steps=3),
        checkpoint=CheckpointConfig(every=5),
        validation=ValidationConfig(every=5, rows=9),
        sample=SampleConfig(every=10, prompts=("The",), max_tokens=4),
    )


@pytest.fixture(scope="module")
def alone(small) -> Config:
    """A run in one process on one device."""
    config = elsewhere(small, "alone")
    assert loop.run(config, make_mesh(devices=jax.devices()[:1]))
    return config


def test_two_processes_make_the_run_of_one(small, alone):
    config = elsewhere(small, "two")
    first, second = Run(config, 2, "--data-axis", "2").finish()
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    ours, theirs = read_metrics(config.run_folder), read_metrics(alone.run_folder)
    assert ours.keys() == theirs.keys()
    for step, values in theirs.items():
        assert ours[step].keys() == values.keys()
        for name, value in values.items():
            if not name.startswith("perf/"):
                assert ours[step][name] == pytest.approx(value, rel=1e-5), (step, name)
    samples = [Path(c.run_folder) / "samples" / "0000010.txt" for c in (config, alone)]
    assert samples[0].read_text() == samples[1].read_text()
    environment = json.loads((Path(config.run_folder) / "environment.json").read_text())
    assert environment["mesh"] == {"data": 2, "fsdp": 1} and environment["processes"] == 2
    # The first speaks for both; what they told each other is gone.
    assert "unigram" in first[1] and "step 10/10" in first[1]
    assert not lines(second[1])
    assert not (Path(config.run_folder) / "processes").exists()


def test_a_signal_to_one_process_stops_all_and_any_number_goes_on(small, alone, tmp_path):
    """Two processes, then four, then one: each stopped by a signal to another process."""
    config = elsewhere(small, "moved")
    go = tmp_path / "go"
    hold = f"while not os.path.exists({str(go)!r}): time.sleep(0.02)"
    two = Run(config, 2, fault=hold)
    try:
        two.wait_for_step(HERE - 2)
        # The coordinator listens where it was told to, and nowhere else.
        assert listening(two.port) == {"127.0.0.1"}
        # A second writer is told who the first is; its other process leaves with it.
        first, second = Run(config, 2).finish()
        assert (first[0], second[0]) == (2, 2)
        sentence = f"{config.run_folder} is being written by process {two.all[0].pid} on "
        assert sentence in first[2] and "Traceback" not in first[2] + second[2]
        assert f"tinyllama: Process 0 on {socket.gethostname()}: {sentence}" in second[2]
    finally:
        two.all[1].send_signal(signal.SIGTERM)
        go.touch()
    ends = two.finish()
    assert [code for code, _, _ in ends] == [75, 75], ends
    assert "Stopped by SIGTERM after step" in ends[0][1]
    stopped = Checkpoints(config.run_folder).steps()
    assert len(stopped) == 1 and HERE <= stopped[0] <= HERE + 2
    assert max(losses(config)) == stopped[0]

    go.unlink()
    four = Run(config, 4, fault=hold, step=8)
    try:
        four.wait_for_step(6)
    finally:
        four.all[0].send_signal(signal.SIGINT)
        go.touch()
    ends = four.finish()
    assert [code for code, _, _ in ends] == [75] * 4, ends
    assert "Stopped by SIGINT" in ends[0][1]
    assert 8 <= Checkpoints(config.run_folder).steps()[-1] == max(losses(config)) < 10

    assert loop.run(config, make_mesh(devices=jax.devices()[:1]))
    assert losses(config).keys() == losses(alone).keys()
    for step, loss in losses(alone).items():
        assert losses(config)[step] == pytest.approx(loss, rel=1e-5), step


def listening(port):
    """Addresses of this machine where someone listens on a port."""
    found = set()
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                # Words of 32 bits, each in the order of this machine.
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                ip = ipaddress.ip_address(b"".join(words))
                found.add(str(getattr(ip, "ipv4_mapped", None) or ip))
    return found


# What befalls process 1, and how the others end: their exit code, and words of their last line.
FAULTS = {
    "killed": ("os.kill(os.getpid(), 9)", 124, f"has not been heard of for {SILENCE:.0f} s"),
    "stopped": ("os.kill(os.getpid(), 19)", 124, f"has not been heard of for {SILENCE:.0f} s"),
    "asleep": ("time.sleep(1e6)", 124, f"has not gone on for {PATIENCE['data']} s (step 4, data)"),
    "broken": ("raise ValueError('no such luck')", 1, "exit code 1 (ValueError: no such luck)"),
}


@pytest.fixture(scope="module")
def broken(small):
    """Runs that each lose process 1 of three in another way, all at once: most of it is waiting."""
    runs = {}
    for name, (fault, *_) in FAULTS.items():
        config = elsewhere(small, name, batch_rows=12)
        runs[name] = Run(config, 3, fault=f"if me == 1: {fault}")
    began = {}
    while len(began) < len(runs):
        for name in runs.keys() - began.keys():
            if (Path(runs[name].config.run_folder) / "metrics.jsonl").exists():
                began[name] = time.monotonic()
        time.sleep(0.1)
    yield runs, began
    for run in runs.values():
        run.kill()


@pytest.mark.parametrize("name", FAULTS)
def test_a_lost_process_ends_all_with_a_line_that_names_it(broken, name):
    _, code, words = FAULTS[name]
    runs, began = broken
    for index in (0, 2):
        out, err = runs[name].all[index].communicate(timeout=60)
        told = [line for line in err.splitlines() if line.startswith("tinyllama:")]
        assert runs[name].all[index].returncode == code, out + err
        assert len(told) == 1, err
        assert told[0].startswith(f"tinyllama: process 1 on {socket.gethostname()} ") and (
            words in told[0]
        )
        assert "Traceback" not in err and "Check failure" not in err
    print(name, time.monotonic() - began[name])
    if name == "broken":
        out, err = runs[name].all[1].communicate(timeout=60)
        assert runs[name].all[1].returncode == 1
        assert "Traceback" in err and "no such luck" in err
