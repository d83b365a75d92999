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

from support.models import SMALL
from support.paths import ROOT
from support.runs import config_file, elsewhere, losses
from tinyllama_jax.config import (
    CheckpointConfig,
    Config,
    OptimizerConfig,
    SampleConfig,
    ValidationConfig,
)
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh
from tinyllama_jax.training import loop
from tinyllama_jax.training.metrics import read_metrics

# What a config file does to the process that reads it, as it comes to the data of a step.
HERE = 4
PRELUDE = """
import os, sys, time
from tinyllama_jax.runtime.watch import Watch
me = int(sys.argv[sys.argv.index("--process-id") + 1])
at = Watch.at

def faulty_at(watch, phase, step):
    at(watch, phase, step)
    if (phase, step) == ("data", {step}):
        {fault}

Watch.at = faulty_at
"""


class Run:
    """Processes of one run, started together."""

    def __init__(self, config, count, *options, fault=None, step=HERE, own=(), prelude=""):
        self.config, self.all = config, []
        file = Path(config.run_folder).with_name(f"{Path(config.run_folder).name}.py")
        config_file(config, file)
        if fault is not None:
            prelude += PRELUDE.format(step=step, fault=fault)
        file.write_text(prelude + file.read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
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

    def finish(self, timeout=300):
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
    """All that it leaves, from the weights of another run on; and once more when it is damaged."""
    theirs = elsewhere(small, "theirs", init_from=alone.run_folder)
    ours = elsewhere(small, "ours", init_from=alone.run_folder)
    assert loop.run(theirs, make_mesh(devices=jax.devices()[:1]))
    first, second = Run(ours, 2).finish()
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert_alike(ours, theirs)
    folder = Path(ours.run_folder)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["mesh"] == {"data": 1, "fsdp": 2} and environment["processes"] == 2
    assert environment["began_with"]["sha256"]
    # The first speaks for both; what they told each other is gone.
    assert "unigram" in first[1] and "step 10/10" in first[1]
    assert not lines(second[1]) and not (folder / "processes").exists()

    (folder / "checkpoints" / "10" / "sha256.json").write_text("{")
    first, second = Run(ours, 2).finish()
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "Checkpoint 10" in first[1] and "passed over" in first[1] and not lines(second[1])
    assert_alike(ours, theirs)
    assert Checkpoints(folder).steps() == [5, 10] and (folder / "damaged" / "10").is_dir()


def assert_alike(config, other):
    """Losses, validations, tokens read and samples are those of another run."""
    ours, theirs = read_metrics(config.run_folder), read_metrics(other.run_folder)
    assert ours.keys() == theirs.keys()
    for step, values in theirs.items():
        assert ours[step].keys() == values.keys()
        for name, value in values.items():
            if not name.startswith("perf/"):
                assert ours[step][name] == pytest.approx(value, rel=1e-5), (step, name)
    a, b = (Path(c.run_folder) / "samples" / "0000010.txt" for c in (config, other))
    assert a.read_text() == b.read_text()


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
    four = Run(config, 4, "--data-axis", "2", fault=hold, step=8)
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


# Seconds until the processes below give up on one, fewer than a real run's. They hold these tests
# up; but eleven processes that share two cores must not take each other for dead.
SILENCE, PATIENCE = 12.0, 15
IMPATIENT = f"""
from tinyllama_jax.runtime import watch
watch.SILENCE, watch.PATIENCE["data"] = {SILENCE}, {PATIENCE}
"""
# Who is lost how, and how the others end: their exit code, and words of their last line.
SILENT = f"has not been heard of for {SILENCE:.0f} s"
ASLEEP = f"has not gone on for {PATIENCE} s (step {HERE}, data)"
FAULTS = {
    "killed": (1, "os.kill(os.getpid(), 9)", 124, SILENT),
    "first killed": (0, "os.kill(os.getpid(), 9)", 124, SILENT),
    "stopped": (1, "os.kill(os.getpid(), 19)", 124, SILENT),
    "asleep": (1, "time.sleep(1e6)", 124, ASLEEP),
    "broken": (0, "raise ValueError('no such luck')", 1, "code 1 (ValueError: no such luck)"),
}

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def broken(small):
    """Runs that each lose a process in another way, all at once since most of it is waiting: what
    each process left with and said on stderr, and after how many seconds."""
    runs, marks, ends = {}, {}, {}
    for name, (lost, fault, *_) in FAULTS.items():
        count = 3 if name == "killed" else 2  # programs of two are those of the tests above
        config = elsewhere(small, name, batch_rows=8 * count)
        marks[name] = Path(config.run_folder).with_name(f"{name}.mark")
        fault = f"if me == {lost}: open({str(marks[name])!r}, 'w').close(); {fault}"
        runs[name] = Run(config, count, fault=fault, prelude=IMPATIENT)
    deadline = time.time() + 400
    while time.time() < deadline:
        for name, run in runs.items():
            for index, process in enumerate(run.all):
                if (name, index) not in ends and process.poll() is not None:
                    assert marks[name].exists(), process.communicate()
                    seconds = time.time() - marks[name].stat().st_mtime
                    ends[name, index] = process.returncode, process.communicate()[1], seconds
        if len(ends) == sum(len(run.all) for run in runs.values()) - 1:  # the stopped one is left
            break
        time.sleep(0.1)
    for run in runs.values():
        run.kill()
    return ends


@pytest.mark.parametrize("name", FAULTS)
def test_a_lost_process_ends_all_with_a_line_that_names_it(broken, name):
    lost, _, wanted, words = FAULTS[name]
    for index in {0, 1, 2 if name == "killed" else 0} - {lost}:
        code, err, seconds = broken[name, index]
        told = [line for line in err.splitlines() if line.startswith("tinyllama:")]
        assert (code, len(told)) == (wanted, 1), err
        assert told[0].startswith(f"tinyllama: process {lost} on {socket.gethostname()} ")
        assert words in told[0] and err.endswith(f"{told[0]}\n")
        assert "Traceback" not in err
        # JAX adds a page where its coordinator is lost, before that line.
        assert ("Check failure" in err) == (name == "first killed")
        assert seconds < 45
        print(f"{name}: process {index} left after {seconds:.1f} s")


def test_the_broken_process_says_why_it_ends(broken):
    code, err, _ = broken["broken", 0]
    assert code == 1 and "Traceback" in err and "no such luck" in err
    code, err, seconds = broken["asleep", 1]
    assert code == 124 and FAULTS["asleep"][3] in err and seconds < 45


def test_an_error_of_one_process_ends_both_with_its_sentence(small, tmp_path):
    own = [[], ["--data.tokenizer", str(tmp_path / "none.model")]]
    first, second = Run(elsewhere(small, "one"), 2, own=own).finish()
    assert (first[0], second[0]) == (2, 2), first[2] + second[2]
    assert f"Process 1 on {socket.gethostname()}: There is no tokenizer" in first[2]
    assert "tinyllama: There is no tokenizer" in second[2]
    assert not Path(elsewhere(small, "one").run_folder).exists()
