"""Several processes, one run: they join, agree with each other, and stop after the same step.

All processes run the same program. A function that says "all processes together" exchanges
something with the others: each of them must come to it, in the same order. In one process these
functions only do their work.
"""

import contextlib
import ipaddress
import json
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Launch, differences
from tinyllama_jax.errors import ExitCode, UserError, require

MEETING = 300  # seconds for all processes to start
LINGER = 5.0  # seconds that process 0 leaves after the others, when there was an error


def slurm_step(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(coordinator, processes, this one's id) in a Slurm step of several tasks, else None.

    JAX's own detection would give each task one GPU, and tell nobody the address to bind.
    """
    processes = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if processes == 1:
        return None
    # node007, or the first of node[007-010,012],other3
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    assert first is not None
    # Below the ports that Linux hands out by itself, and another for the next job.
    port = 20_000 + int(environment["SLURM_JOB_ID"]) % 10_000
    host = "".join(part for part in first.groups() if part)
    return f"{host}:{port}", processes, int(environment["SLURM_PROCID"])


def host_and_port(coordinator: str) -> tuple[str, int]:
    """The parts of HOST:PORT; raises `UserError` where they are none."""
    match = re.fullmatch(r"\[?(.+?)\]?:(\d{1,5})", coordinator)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UserError(f"--coordinator is {coordinator}: give HOST:PORT, as in node1:23456.")
    return match[1], int(match[2])


def address_to_bind(coordinator: str) -> str:
    """The one numeric address HOST:PORT of this machine that the others will connect to.

    Raises:
      UserError: no such address on this machine, one that others cannot reach, or a port in use.
    """
    host, port = host_and_port(coordinator)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"The host of --coordinator {coordinator} has no address ({error.strerror}): give a "
            "name or an address that every machine of the run knows."
        ) from None
    family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    ip = ipaddress.ip_address(address[0])
    require(
        not ip.is_loopback or host in ("localhost", str(ip)),
        f"Here {host} means {ip}, where no other machine can connect: give --coordinator with this "
        "machine's own address on the network of the run.",
    )
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(
                f"Process 0 cannot listen at {coordinator} ({error.strerror}): give an address of "
                "the machine that it runs on, and a free port."
            ) from None
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"


@contextlib.contextmanager
def joined(launch: Launch, devices: int | None) -> Iterator[None]:
    """Joins the processes that `launch` names, or those of the Slurm step; alone, does nothing.

    A process that leaves by an exception says so and ends at once, since JAX would wait five
    minutes for the others at its exit.

    Args:
      launch: the options of the command line.
      devices: how many there must be over all processes; None: any number.

    Raises:
      UserError: an address that does not serve, nobody there, or another number of devices.
    """
    found = (launch.coordinator, launch.num_processes, launch.process_id)
    coordinator, processes, process = slurm_step(os.environ) or (None, 1, 0)
    if launch.coordinator is not None:
        coordinator, processes, process = found
    if coordinator is None or processes == 1:
        _check_devices(devices)
        yield
        return
    host_and_port(coordinator)
    try:
        # JAX would bind all interfaces, and anyone who connects can end the run. A process counts
        # as dead for JAX after 100 s without a heartbeat, later than for us, who can name it.
        jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
        address = address_to_bind(coordinator) if process == 0 else None
        # Before JAX gives up itself, which it does by aborting with a page of C++.
        alone = threading.Timer(MEETING, _give_up, [process, processes, coordinator])
        alone.daemon = True
        alone.start()
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate",
            initialization_timeout=2 * MEETING,
            coordinator_bind_address=address,
        )
        alone.cancel()
        _check_devices(devices)
        yield
    except BaseException as error:
        code = exit_code(error)
        tell(error)
        if process == 0:
            # It serves JAX's coordinator, without which the others are aborted: they go first.
            time.sleep(LINGER)
        os._exit(code)
    jax.distributed.shutdown()


def _give_up(process: int, processes: int, coordinator: str) -> None:
    tell(
        UserError(
            f"Process {process} waited {MEETING} s for all {processes} processes to meet at "
            f"{coordinator}: start each with its own --process-id, where this address is reached."
        )
    )
    os._exit(ExitCode.USER_ERROR)


def _check_devices(wanted: int | None) -> None:
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # a bare assertion, without the CUDA plugin
        asked = os.environ.get("JAX_PLATFORMS", "")
        said = (str(error).splitlines() or [f"JAX_PLATFORMS={asked}"])[0][:200]
        raise UserError(
            f"JAX finds no device ({said}): on GPUs, pip install 'tinyllama-jax[gpu]'; "
            "`tinyllama train` takes what is there."
        ) from None
    processes = jax.process_count()
    each = [sum(device.process_index == index for device in found) for index in range(processes)]
    require(
        len(set(each)) == 1,
        f"The processes have {each} devices: give each the same number (CUDA_VISIBLE_DEVICES).",
    )
    require(
        wanted in (None, len(found)),
        f"This launch script is for {wanted} devices in all, and there are {each[0]} in each of "
        f"{processes} processes: start one on every node (--coordinator, --num-processes, "
        "--process-id), choose devices by CUDA_VISIBLE_DEVICES, or run `tinyllama train`, which "
        "takes any number.",
    )


def is_first() -> bool:
    """Whether this process writes what the run leaves: files, but for checkpoints, and lines."""
    return jax.process_index() == 0


def every(text: str) -> list[str]:
    """The text of each process, by its index. All processes together."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(own), np.int32))
    padded = np.zeros(max(lengths.max(), 1), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes get through this block, or none: an error of one is an error of all.

    All processes together, at the end of the block; so nothing else inside may be.

    Raises:
      UserError: another process left the block with an error, which it names.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    text = "" if failure is None else str(failure) or type(failure).__name__
    told = every(json.dumps([socket.gethostname(), text]))
    if failure is not None:
        raise failure
    for process, (host, message) in enumerate(map(json.loads, told)):
        require(not message, f"Process {process} on {host}: {message}")


def from_first(function: Callable[[], Any]) -> Any:
    """What the function returns on process 0, which alone calls it: a JSON value, tuples as lists.

    All processes together. An error of process 0 is an error of all.
    """
    value = None
    with together():
        if is_first():
            value = function()
    return json.loads(every(json.dumps(value))[0])


def check_alike(facts: dict[str, Any]) -> None:
    """Raises UserError, naming the process, if JSON values differ. All processes together."""
    told = every(json.dumps([socket.gethostname(), facts]))
    first_host, first = json.loads(told[0])
    for process, (host, other) in enumerate(map(json.loads, told)):
        # Under a name of their own: `differences` is silent about options that may change.
        different = differences({"": first}, {"": other})
        require(
            not different,
            f"Process {process} on {host} differs from process 0 on {first_host}: "
            f"{'; '.join(line.removeprefix('.') for line in different)}: make them equal.",
        )


def software() -> dict[str, str]:
    """Versions that must be the same in every process."""
    packages = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece"]
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


class Stop:
    """Whether a signal asked the run to stop: one process may get it, and all stop after the same
    step. A second signal acts as usual."""

    def __init__(self, mesh: Mesh):
        self._noted = self._agreed = 0
        self._alone = jax.process_count() == 1
        self._where = NamedSharding(mesh, P(mesh.axis_names))
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGINT and SIGTERM; in a thread, where Python allows no handlers, it does not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore():
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number, frame):
            self._noted = number
            restore()

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()

    def vote(self) -> jax.Array | int:
        """The signal that any process got so far; 0: none. All processes together.

        A sum that the devices make after the step they work on. It is read with the metrics of that
        step, when all processes are in the same place, so it costs the host no waiting. JAX's
        `reached_preemption_sync_point` would answer without devices, but knows SIGTERM alone.
        """
        if self._alone:
            return self._noted
        local = np.full(jax.local_device_count(), self._noted, np.int32)
        return self._max(jax.make_array_from_process_local_data(self._where, local))

    def agree(self, vote: float) -> None:
        """Takes a vote that has been read."""
        self._agreed = int(vote)

    @property
    def signal(self) -> str | None:
        """The name of the signal that ends the run, the same in all processes at this place."""
        number = self._noted if self._alone else self._agreed
        return signal.Signals(number).name if number else None


def exit_code(error: BaseException) -> int:
    """What a process that an error ends leaves with."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else ExitCode.FAILED
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    return ExitCode.USER_ERROR if isinstance(error, UserError) else ExitCode.FAILED


def tell(error: BaseException) -> None:
    """Says on stderr what a process ends by: a user error in its sentence."""
    sys.stdout.flush()
    if isinstance(error, UserError):
        print(f"tinyllama: {error}", file=sys.stderr, flush=True)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
        sys.stderr.flush()
