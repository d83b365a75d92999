"""One run in several processes: real ones, over loopback, stopped and broken in several ways."""

import contextlib
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
    Launch,
    OptimizerConfig,
    SampleConfig,
    UserError,
    ValidationConfig,
)
from tinyllama_jax.runtime import processes
from tinyllama_jax.runtime import watch as watching
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh
from tinyllama_jax.runtime.watch import PATIENCE, SILENCE, STANDSTILL, TIMED, Watch
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
        self.config, self.all = config, []
        file = Path(config.run_folder).with_name(f"{Path(config.run_folder).name}.py")
        config_file(config, file)
        if fault is not None:
            file.write_text(PRELUDE.format(step=step, fault=fault) + file.read_text())
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


# Who is lost how, and how the others end: their exit code, and words of their last line.
SILENT = f"has not been heard of for {SILENCE:.0f} s"
ASLEEP = f"has not gone on for {PATIENCE['data']} s (step {HERE}, data)"
FAULTS = {
    "killed": (1, "os.kill(os.getpid(), 9)", 124, SILENT),
    "first killed": (0, "os.kill(os.getpid(), 9)", 124, SILENT),
    "stopped": (1, "os.kill(os.getpid(), 19)", 124, SILENT),
    "asleep": (1, "time.sleep(1e6)", 124, ASLEEP),
    "broken": (0, "raise ValueError('no such luck')", 1, "code 1 (ValueError: no such luck)"),
}


@pytest.fixture(scope="module")
def broken(small):
    """Runs that each lose a process in another way, all at once since most of it is waiting: what
    each process left with and said on stderr, and after how many seconds."""
    runs, marks, ends = {}, {}, {}
    for name, (lost, fault, *_) in FAULTS.items():
        config = elsewhere(small, name, batch_rows=12)
        marks[name] = Path(config.run_folder).with_name(f"{name}.mark")
        fault = f"if me == {lost}: open({str(marks[name])!r}, 'w').close(); {fault}"
        runs[name] = Run(config, 3 if name == "killed" else 2, fault=fault)
    deadline = time.time() + 240
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
        assert seconds < 60
        print(f"{name}: process {index} left after {seconds:.1f} s")


def test_the_broken_process_says_why_it_ends(broken):
    code, err, _ = broken["broken", 0]
    assert code == 1 and "Traceback" in err and "no such luck" in err
    code, err, seconds = broken["asleep", 1]
    assert code == 124 and FAULTS["asleep"][3] in err and seconds < 60


def test_an_error_of_one_process_ends_both_with_its_sentence(small, tmp_path):
    own = [[], ["--data.tokenizer", str(tmp_path / "none.model")]]
    first, second = Run(elsewhere(small, "one"), 2, own=own).finish()
    assert (first[0], second[0]) == (2, 2), first[2] + second[2]
    assert f"Process 1 on {socket.gethostname()}: There is no tokenizer" in first[2]
    assert "tinyllama: There is no tokenizer" in second[2]
    assert not Path(elsewhere(small, "one").run_folder).exists()


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """What process 0 of three thinks of them; the other two are files that a test writes."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    (tmp_path / "processes").mkdir()
    return Watch(tmp_path)


def tell(watch, process, beat, moves, phase="step"):
    state = {"host": "h", "beat": beat, "moves": moves, "phase": phase, "step": 7, "left": None}
    (watch._folder / f"{process}.json").write_text(json.dumps(state))


def verdicts(watch, seconds, moves, beats=True, phase="step", every=4):
    """The first verdict, at which second of those that pass; None: there is none."""
    watch._place = (moves[0], phase, 7)
    for second in range(0, seconds, every):
        for process in (1, 2):
            tell(watch, process, second if beats or process == 1 else 0, moves[process], phase)
        watch._look(every)
        if (verdict := watch._verdict()) is not None:
            return second, *verdict
    return None


def test_a_slow_run_is_left_alone(watch):
    # All in the same place, or one alive and behind in what may take long.
    assert verdicts(watch, STANDSTILL, [3, 3, 3], every=60) is None
    assert verdicts(watch, PATIENCE["step"], [5, 5, 4], every=60) is None
    hours = PATIENCE["validation"]
    assert verdicts(watch, hours, [7, 8, 8], phase="validation", every=600) is None


def test_who_is_behind_or_silent_is_named(watch):
    second, code, line = verdicts(watch, 60, [5, 5, 4], phase="data")
    assert code == 124 and line.startswith("process 2 on h has not gone on for 40 s (step 7, data)")
    assert 40 <= second < 50
    second, code, line = verdicts(watch, 60, [6, 6, 6], beats=False)
    assert code == 124 and line.startswith("process 2 on h has not been heard of for 30 s")
    assert 30 <= second < 40


def test_steps_that_were_timed_shorten_the_patience_with_one(watch):
    for step in range(8, 8 + TIMED):
        watch.at("step", step)
        watch._since -= 2.0
        watch.at("data", step + 1)
    second, code, line = verdicts(watch, 90, [6, 6, 6])
    assert code == 124 and line.startswith("no process has gone on for 45 s (step 7, step)")
    assert 45 <= second < 55
    watch.at("step", 20)
    watch._since -= 20.0
    watch.at("data", 21)
    assert verdicts(watch, 180, [8, 8, 8]) is None
    assert verdicts(watch, 90, [9, 9, 9], phase="compile") is None


def test_a_standstill_ends_a_run_in_one_process(tmp_path):
    watch = Watch(tmp_path)
    watch.at("step", 7)
    for _ in range(STANDSTILL // 4 + 1):
        watch._look(4.0)
        assert watch._verdict() is None
    watch._look(4.0)
    assert watch._verdict()[0] == 124
    watch.at("data", 8)
    watch._look(4.0)
    assert watch._verdict() is None


def test_a_folder_that_is_not_shared_is_refused(watch, monkeypatch):
    monkeypatch.setattr(watching, "SILENCE", 0.2)
    monkeypatch.setattr(watching, "every", lambda text: [text])
    monkeypatch.setattr(watching, "together", contextlib.nullcontext)
    with pytest.raises(UserError, match=r"nothing of process \[1, 2\]: --run-folder must lie on"):
        watch.start()


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
def test_a_launch_script_asks_for_its_devices(small, tmp_path, script, devices):
    file = config_file(elsewhere(small, "never"), tmp_path / "config.py")
    text = (ROOT / "launch" / f"{script}.py").read_text()
    assert f"launch(devices={devices})" in text and f"python launch/{script}.py CONFIG" in text
    if script == "a100_16":
        done = subprocess.run(
            [sys.executable, f"launch/{script}.py", file], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
        )  # fmt: skip
        assert done.returncode == 2
        assert "for 16 devices in all, and there are 2 in each of 1 processes" in done.stderr


@pytest.mark.parametrize("name", ["a100_8", "a100_16"])
def test_a_batch_script_queues_again_what_a_signal_saved(name, tmp_path):
    file = ROOT / "launch" / "slurm" / f"{name}.sbatch"
    assert subprocess.run(["bash", "-n", str(file)]).returncode == 0
    text = file.read_text()
    for line in ("--signal=TERM@300", "--requeue", f"--nodes={2 if name == 'a100_16' else 1}"):
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
            f"--kill-on-bad-exit=1 --wait=60 python launch/{name}.py configs/x.py --run-folder a b"
        )
        assert said[1:] == (["scontrol requeue 7"] if code == 75 else [])
