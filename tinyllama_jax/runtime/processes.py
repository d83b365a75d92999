"""Several processes that compute one run: how they join, agree, and stop after the same step.

All processes run the same program. A function whose docstring says "All processes together" is a
collective: it exchanges something with the other processes, so all of them must call it, in the
same order, or they wait for each other without end. In a run of one process it returns at once.
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

MEETING = 300  # seconds within which all processes must have started
LINGER = 5.0  # seconds for which process 0 waits before it leaves with an error


def slurm_step(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Reads from Slurm's environment variables how to join the processes of a job step.

    JAX can detect Slurm by itself, but would then give each task a single GPU, and would not tell
    the address of process 0 before it connects, which `address_to_bind` needs.

    Args:
      environment: the environment variables.

    Returns:
      (HOST:PORT of process 0, number of processes, number of this process), or None outside of
      Slurm and in a step of a single task.
    """
    processes = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if processes == 1:
        return None
    # The list is a name such as node007, or a form such as node[007-010,012],other3, whose first
    # node is node007.
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    assert first is not None
    # The port lies below those that Linux assigns by itself, which begin at 32768, and differs
    # between jobs, because two of them may run on the same node.
    port = 20_000 + int(environment["SLURM_JOB_ID"]) % 10_000
    host = "".join(part for part in first.groups() if part)
    return f"{host}:{port}", processes, int(environment["SLURM_PROCID"])


def host_and_port(coordinator: str) -> tuple[str, int]:
    """Splits HOST:PORT into its parts, where an IPv6 address may stand in brackets.

    Raises:
      UserError: the text does not have this form.
    """
    match = re.fullmatch(r"\[?(.+?)\]?:(\d{1,5})", coordinator)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UserError(f"--coordinator is {coordinator}: give HOST:PORT, as in node1:23456.")
    return match[1], int(match[2])


def address_to_bind(coordinator: str) -> str:
    """Returns the numeric HOST:PORT at which process 0, which calls this, shall listen.

    JAX by itself would listen at all network interfaces of the machine, and whoever can connect can
    end the run. So only the one address is bound to which the other processes connect.

    Raises:
      UserError: the address is not one of this machine, other machines cannot reach it, or the port
        is in use.
    """
    host, port = host_and_port(coordinator)
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"The host of --coordinator {coordinator} has no address ({error.strerror}): give a "
            "name or an address that every machine of the run knows."
        ) from None
    # An IPv4 address is preferred where the host has both.
    family, _, _, _, address = min(addresses, key=lambda info: info[0] != socket.AF_INET)
    ip = ipaddress.ip_address(address[0])
    # Debian's /etc/hosts, for one, maps a machine's own name to 127.0.1.1.
    require(
        not ip.is_loopback or host in ("localhost", str(ip)),
        f"Here {host} means {ip}, where no other machine can connect: give --coordinator with this "
        "machine's own address on the network of the run.",
    )
    # Bound here once before JAX does it, so that a failure becomes a sentence with a cure.
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
    """Joins the processes of a run for the length of the block. All processes together.

    They are those that `launch` names, or those of the Slurm step; a single process joins nothing.
    In a run of several processes an exception inside the block does not leave it: the process
    prints the error and ends at once. At a normal exit JAX would first wait five minutes for the
    other processes.

    Args:
      launch: the options of the command line.
      devices: how many devices there must be over all processes; None allows any number.

    Raises:
      UserError: a single process has another number of devices, or the coordinator of several is
        not of the form HOST:PORT. Other errors of a run of several processes end the process.
    """
    coordinator, processes, process = slurm_step(os.environ) or (None, 1, 0)
    if launch.coordinator is not None:  # options on the command line win over Slurm's variables
        coordinator = launch.coordinator
        processes, process = launch.num_processes, launch.process_id
    if coordinator is None or processes == 1:
        _check_devices(devices)
        yield
        return
    host_and_port(coordinator)
    try:
        # JAX's preemption service would take SIGTERM for itself, so that `Stop` never saw it.
        jax.config.update("jax_enable_preemption_service", False)
        address = address_to_bind(coordinator) if process == 0 else None
        # The timer ends the wait before JAX does, which would abort with a page of C++ messages.
        # JAX's limit of 100 s for a missing heartbeat is left alone: `watch.Watch` notices a dead
        # process sooner, and can name it.
        alone = threading.Timer(MEETING, _give_up, [process, processes, coordinator])
        alone.daemon = True
        alone.start()
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate",  # see `slurm_step`
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
            # Process 0 serves JAX's coordinator, and JAX aborts the others when it is gone. They
            # get time to leave by themselves, with a message, before it does.
            time.sleep(LINGER)
        os._exit(code)
    jax.distributed.shutdown()


def _give_up(process: int, processes: int, coordinator: str) -> None:
    """Ends this process, which waited too long; called by a timer in a thread of its own."""
    tell(
        UserError(
            f"Process {process} waited {MEETING} s for all {processes} processes to meet at "
            f"{coordinator}: start each with its own --process-id, where this address is reached."
        )
    )
    os._exit(ExitCode.USER_ERROR)


def _check_devices(wanted: int | None) -> None:
    """Raises UserError if the devices of all processes are not as many as wanted, evenly spread."""
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        # Without its CUDA plugin JAX raises an AssertionError that has no message.
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).splitlines() or [f"JAX_PLATFORMS={platforms}"])[0][:200]
        raise UserError(
            f"JAX finds no device ({reason}): on GPUs, pip install 'tinyllama-jax[gpu]'; "
            "`tinyllama train` takes what is there."
        ) from None
    processes = jax.process_count()
    each = [sum(device.process_index == index for device in devices) for index in range(processes)]
    require(
        len(set(each)) == 1,
        f"The processes have {each} devices: give each the same number (CUDA_VISIBLE_DEVICES).",
    )
    require(
        wanted in (None, len(devices)),
        f"This launch script is for {wanted} devices in all, and there are {each[0]} in each of "
        f"{processes} processes: start one on every node (--coordinator, --num-processes, "
        "--process-id), choose devices by CUDA_VISIBLE_DEVICES, or run `tinyllama train`, which "
        "takes any number.",
    )


def is_first() -> bool:
    """Returns whether this is process 0, which alone prints and writes files.

    Checkpoints are the exception: each process writes its own part of the arrays.
    """
    return jax.process_index() == 0


def every(text: str) -> list[str]:
    """Returns the texts that the processes passed, in their order. All processes together."""
    if jax.process_count() == 1:
        return [text]
    # Two exchanges, because all processes must pass arrays of one shape: first the lengths, then
    # the texts, padded to the longest.
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(own), np.int32))
    padded = np.zeros(max(lengths.max(), 1), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Makes an error of one process inside the block an error of all. All processes together.

    Without it, the others would wait for the failed process at their next exchange. The exchange
    takes place at the end of the block. The block must contain no other exchange, since a process
    that failed before it would skip it, and what it says at the end would be taken for its part.

    Raises:
      UserError: another process left the block with an error; the message names it.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    text = "" if failure is None else str(failure) or type(failure).__name__
    messages = every(json.dumps([socket.gethostname(), text]))
    if failure is not None:
        raise failure
    for process, (host, message) in enumerate(map(json.loads, messages)):
        require(not message, f"Process {process} on {host}: {message}")


def from_first(function: Callable[[], Any]) -> Any:
    """Calls the function on process 0 alone, and returns its result on all processes.

    Used for what is read from disk: machines that share a disk may see different states of it, and
    processes that decide differently would wait for each other without end.

    All processes together. An error of process 0 is an error of all.

    Args:
      function: returns a JSON value; tuples in it come back as lists.
    """
    value = None
    with together():
        if is_first():
            value = function()
    return json.loads(every(json.dumps(value))[0])


def check_alike(facts: dict[str, Any]) -> None:
    """Checks that all processes pass equal JSON values. All processes together.

    Raises:
      UserError: a process has other values than process 0; the message names both.
    """
    answers = every(json.dumps([socket.gethostname(), facts]))
    first_host, first = json.loads(answers[0])
    for process, (host, other) in enumerate(map(json.loads, answers)):
        # The values are wrapped under an empty name, because at the top level `differences` leaves
        # out the options that may change when a run is continued. Here those must be equal too.
        different = differences({"": first}, {"": other})
        require(
            not different,
            f"Process {process} on {host} differs from process 0 on {first_host}: "
            f"{'; '.join(line.removeprefix('.') for line in different)}: make them equal.",
        )


def software() -> dict[str, str]:
    """Returns the versions of Python and of the packages that must be equal in all processes."""
    packages = ["jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece"]
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


class Stop:
    """Lets SIGINT or SIGTERM stop the run after a step, the same step in all processes.

    The signal may reach one process alone. Processes that stopped at different steps would wait for
    each other, so they vote after every step. A second signal has its usual effect at once.
    """

    def __init__(self, mesh: Mesh):
        self._noted = self._agreed = 0
        self._alone = jax.process_count() == 1
        self._where = NamedSharding(mesh, P(mesh.axis_names))
        # A maximum and not a sum: several processes may get the signal, and the sum of their votes
        # would be the number of no signal, or of another one.
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM during the block.

        Python allows signal handlers only in the main thread; in another one this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore():
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number, frame):
            self._noted = number
            restore()  # so that a second signal ends the process at once

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()

    def vote(self) -> jax.Array | int:
        """Returns the number of a signal that any process has received, or 0.

        All processes together. The result is the maximum over their votes, in which 0 stands for no
        signal. The devices compute it behind the step in progress, and it is read together with
        that step's metrics. So the host never waits for it, and all processes read it at the same
        place.

        JAX's `reached_preemption_sync_point` would need no devices, but reacts to SIGTERM alone,
        and its service hides that signal from everyone else.
        """
        if self._alone:
            return self._noted
        local = np.full(jax.local_device_count(), self._noted, np.int32)
        return self._max(jax.make_array_from_process_local_data(self._where, local))

    def agree(self, vote: float) -> None:
        """Accepts the result of a vote, read from the devices one step later."""
        self._agreed = int(vote)

    @property
    def signal(self) -> str | None:
        """The name of the signal that ends the run, or None.

        Several processes go by the last vote that was read, even the one that got the signal:
        otherwise it would stop a step before the others.
        """
        number = self._noted if self._alone else self._agreed
        return signal.Signals(number).name if number else None


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a process that ends with this error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else ExitCode.FAILED
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    return ExitCode.USER_ERROR if isinstance(error, UserError) else ExitCode.FAILED


def tell(error: BaseException) -> None:
    """Prints on stderr the error with which a process ends; a `UserError` as its sentence alone."""
    sys.stdout.flush()
    if isinstance(error, UserError):
        print(f"tinyllama: {error}", file=sys.stderr, flush=True)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
        sys.stderr.flush()
