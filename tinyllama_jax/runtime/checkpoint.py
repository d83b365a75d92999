"""Checkpoints of a run: how they are written, verified and read, and the lock on the run folder.

A checkpoint is a folder `checkpoints/<step>/` with three items: `weights`, `optimizer` (with the
counters of the run's state) and `run` (rows consumed, data fingerprint, config). They are apart so
that generation and export can read the weights alone. Orbax writes a checkpoint under another name
and renames it when it is complete. After that the hashes of its files are written to `sha256.json`
inside, because Orbax does not notice when a bit of a file has changed.

In a run of several processes each writes its own part of the arrays, and process 0 does everything
else. What process 0 finds on disk is what all go by. Unless its docstring says otherwise, every
function here must be called by all processes together.

A weight of all layers is stored in chunks of one layer each, so that a conversion can read one
layer at a time. Orbax cannot read a part of an array. TensorStore, the library through which Orbax
writes, can, so it is used here directly for that.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.checkpoint_managers import preservation_policy

from tinyllama_jax.config import CheckpointConfig
from tinyllama_jax.config_file import model_of_run
from tinyllama_jax.errors import UserError, first_line, require
from tinyllama_jax.files import make_folder, write_aside
from tinyllama_jax.runtime import processes
from tinyllama_jax.runtime.mesh import WEIGHT_AXES, named_leaves, weight_name

ITEMS = {
    "weights": ocp.StandardCheckpointHandler,
    "optimizer": ocp.StandardCheckpointHandler,
    "run": ocp.JsonCheckpointHandler,
}
HASHES = "sha256.json"
# Largest size of a chunk in bytes. While a chunk is read, memory holds it twice: compressed as on
# disk, and decompressed.
CHUNK_BYTES = 2**26


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the run folder against a second run during the block; process 0 locks it for all.

    The system releases the lock when the process ends, however it ends, so no stale lock remains.

    Raises:
      UserError: another run is writing to this folder, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with processes.together():
            if processes.is_first():
                _lock(folder, stack)
        yield


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    """Takes the lock and writes this process's name into it, for the message to a second run."""
    make_folder(folder)
    try:
        file = stack.enter_context(open(folder / ".lock", "a+"))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): give another --run-folder."
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{folder} is being written by {file.read().strip() or 'another process'}: "
            "wait for it, or give another --run-folder."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def open_checkpoint(run: Path, step: int | None) -> tuple["Checkpoints", int]:
    """Opens a run's checkpoints for reading and chooses one of them.

    Args:
      run: the run folder.
      step: the checkpoint to choose; None stands for the newest undamaged one.

    Returns:
      The checkpoints and the step of the chosen one.

    Raises:
      UserError: the run has no checkpoint yet, none of this step, or it is damaged.
    """
    nothing = f"{run} has no checkpoint yet: let it train on."
    with processes.together():
        require((run / "checkpoints").is_dir(), nothing)
    checkpoints = Checkpoints(run)
    if step is None:
        newest = checkpoints.newest()
        if newest is None:
            raise UserError(nothing)
        return checkpoints, newest[0]
    checkpoints.require_whole(step)
    return checkpoints, step


def is_run(folder: Path) -> bool:
    """Returns whether a folder holds a run that has begun to save checkpoints."""
    return (folder / "checkpoints").is_dir()


def verify_run(run: Path) -> list[str]:
    """Verifies a run on disk: reads its config and hashes all of its checkpoints.

    Returns:
      A line for each fault; an empty list if there is none.
    """
    faults = []
    try:
        model_of_run(run)
    except UserError as error:
        faults.append(str(error))
    checkpoints = Checkpoints(run)
    for step in checkpoints.steps():
        if (damage := checkpoints.damage(step)) is not None:
            faults.append(f"checkpoint {step} is damaged: {damage}")
    return faults


class Checkpoints:
    """The checkpoints of one run. The newest is the one with the highest step number."""

    def __init__(self, run_folder: str | Path, policy: CheckpointConfig | None = None):
        """Opens the checkpoints of a run.

        Args:
          run_folder: the folder of the run.
          policy: which checkpoints to keep; without one they are opened for reading alone.
        """
        self.folder = Path(run_folder).resolve() / "checkpoints"
        self._unsealed: int | None = None  # a checkpoint that was saved and has no hashes yet
        self._read_only = policy is None
        if policy is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            kept: list = [preservation_policy.LatestN(policy.keep)]
            if policy.permanent_every:
                kept.append(preservation_policy.EveryNSteps(policy.permanent_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,  # removes what a killed save left behind
            )
            self.folder.mkdir(parents=True, exist_ok=True)
        # The handlers are given by name, although Orbax could guess them: without that, a manager
        # that has not saved anything returns None for metadata, and `_compare` needs those.
        handlers = {item: handler() for item, handler in ITEMS.items()}
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=tuple(ITEMS), item_handlers=handlers
        )

    def save(self, state: dict[str, Any], run: dict[str, Any]) -> None:
        """Saves the state as a checkpoint of its step, unless there is one already.

        The files are written in the background. The state may be donated as soon as this returns,
        because Orbax copies it to the host before.

        Args:
          state: holds `weights`, `step` and the rest of the run's state.
          run: JSON values to save with it, among them `rows`, the position in the data.

        Raises:
          UserError: the disk is too full, or the previous checkpoint could not be written.
        """
        step = int(state["step"])
        if step in self._manager.all_steps():
            return
        self._seal(wait=True)  # one save at a time, or an error of the previous one would be lost
        # Checked beforehand: a disk that fills up during a save leaves the run without a checkpoint
        # of its last steps. All processes go by what process 0 sees.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = processes.from_first(lambda: shutil.disk_usage(self.folder).free)
        require(
            free > 1.1 * needed,
            f"{self.folder} has {free / 1e9:.1f} GB free and a checkpoint takes "
            f"{needed / 1e9:.1f} GB: make room and run the same command again.",
        )
        # The optimizer's state is saved flat, by dotted path. Names, shapes and dtypes can then be
        # compared as strings before anything is read, whatever classes Optax nests it in.
        rest = named_leaves({key: value for key, value in state.items() if key != "weights"})
        weights = state["weights"]
        self._manager.save(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardSave(weights, save_args=_chunks(weights)),
                optimizer=ocp.args.StandardSave(rest, save_args=_chunks(rest)),
                run=ocp.args.JsonSave(run),
            ),
        )
        self._unsealed = step

    def poll(self) -> None:
        """Hashes the last checkpoint if it is written by now; to be called after every step."""
        self._seal(wait=False)

    def finish(self) -> None:
        """Waits until the last checkpoint is written, and hashes it."""
        self._seal(wait=True)

    def close(self) -> None:
        """Finishes the last checkpoint and closes Orbax's manager."""
        self.finish()
        self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints in rising order."""
        return sorted(self._manager.all_steps()) if self.folder.is_dir() else []

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Finds the newest undamaged checkpoint.

        A damaged checkpoint is passed over with a printed line. A run that goes on from an older
        one will save the step of the damaged one again, so it is moved to `damaged/` if the
        checkpoints are open for writing.

        Returns:
          (step, `run` values) of the checkpoint, or None if there is no checkpoint at all.

        Raises:
          UserError: there are checkpoints, and every one is damaged.
        """

        def find() -> tuple[int, dict[str, Any]] | None:
            damaged = []
            for step in reversed(self.steps()):
                damage = self.damage(step)
                if damage is None:
                    if not self._read_only:
                        self._move_aside(damaged)
                    return step, self.run_values(step)
                print(f"Checkpoint {step} of {self.folder} is passed over: {damage}.", flush=True)
                damaged.append(step)
            require(
                not damaged,
                f"Every checkpoint of {self.folder} is damaged: remove the folder to start again.",
            )
            return None

        newest = processes.from_first(find)
        self._manager.reload()  # Orbax lists the folder once, and a checkpoint may have been moved
        return None if newest is None else (newest[0], newest[1])

    def _move_aside(self, steps: list[int]) -> None:
        """Moves checkpoints to `damaged/` in the run folder, where someone may look at them."""
        for step in steps:
            aside = self.folder.with_name("damaged") / str(step)
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)

    def require_whole(self, step: int) -> None:
        """Checks a checkpoint; raises `UserError` if it is missing or damaged."""

        def look():
            require(
                step in self.steps(),
                f"{self.folder} has no checkpoint of step {step}, only {self.steps()}.",
            )
            damage = self.damage(step)
            require(
                damage is None,
                f"Checkpoint {step} of {self.folder} is damaged ({damage}): take another of "
                f"{self.steps()}.",
            )

        processes.from_first(look)

    def sha256(self, step: int, item: str) -> str:
        """Returns a single hash of all files of an item: `weights`, `optimizer` or `run`."""

        def digest() -> str:
            hashes = json.dumps(_hashes(self.folder / str(step), item), sort_keys=True)
            return hashlib.sha256(hashes.encode()).hexdigest()

        return processes.from_first(digest)

    def restore(self, step: int, abstract_state: dict[str, Any]) -> dict[str, Any]:
        """Reads the state of a checkpoint, split over devices as the abstract state says.

        The devices need not be those that wrote it. Names, shapes and dtypes are compared before
        anything is read, because Orbax does not refuse an array of another shape or dtype: it pads
        and casts.

        Args:
          step: the checkpoint.
          abstract_state: `jax.ShapeDtypeStruct`s with shardings, in the structure of the state.

        Raises:
          UserError: the checkpoint holds other arrays than the abstract state.
        """
        rest = {key: value for key, value in abstract_state.items() if key != "weights"}
        wanted = {"weights": abstract_state["weights"], "optimizer": named_leaves(rest)}
        for item, tree in wanted.items():
            self._compare(step, item, tree)
        args = {item: ocp.args.StandardRestore(tree) for item, tree in wanted.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        leaves = [restored["optimizer"][name] for name in wanted["optimizer"]]
        restored_rest = jax.tree.unflatten(jax.tree.structure(rest), leaves)
        return {"weights": restored["weights"]} | restored_rest

    def restore_weights(self, step: int, abstract_weights: dict[str, Any]) -> dict[str, Any]:
        """Reads only the weights of a checkpoint; otherwise as `restore`."""
        self._compare(step, "weights", abstract_weights)
        args = ocp.args.Composite(weights=ocp.args.StandardRestore(abstract_weights))
        return self._manager.restore(step, args=args)["weights"]

    def weight_reader(
        self, step: int, abstract_weights: dict[str, Any]
    ) -> Callable[[str, Any], np.ndarray]:
        """Returns a function that reads a weight of a checkpoint, or one layer of it.

        The function takes the weight's dotted path and an index: a layer, or `...` for the whole
        weight. It reads only that part, so only damage in that part is noticed.

        Raises:
          UserError: the checkpoint holds other weights than the abstract ones, or is damaged. The
            returned function raises it too.
        """
        # Orbax stores an item as a database in OCDBT format, which holds a Zarr array for each
        # weight under its path.
        base = {"driver": "file", "path": f"{self.folder / str(step) / 'weights'}/"}
        store = {"driver": "ocdbt", "base": base}
        with self._readable(step):
            # Listing the database here finds out whether it can be read at all. If Orbax found
            # that out, in `_compare`, it would leave a traceback on stderr beside its error.
            tensorstore.KvStore.open(store).result().list().result()
            self._compare(step, "weights", abstract_weights)

        @functools.cache
        def opened(path: str) -> tensorstore.TensorStore:
            array = store | {"path": f"{path}/"}
            # By default TensorStore reads zeros where a chunk is missing.
            spec = {"driver": "zarr", "kvstore": array, "fill_missing_data_reads": False}
            return tensorstore.open(spec, open=True, read=True).result()

        def read(path: str, index: Any) -> np.ndarray:
            with self._readable(step):
                return opened(path)[index].read().result()

        return read

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Turns any error that reading a damaged checkpoint raises into a `UserError`."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:  # errors of TensorStore, Orbax and JSON share no base class
            others = [other for other in self.steps() if other != step]
            raise UserError(
                f"Checkpoint {step} of {self.folder} cannot be read, or is damaged "
                f"({first_line(error)[:200]}): take another of {others}."
            ) from error

    def _compare(self, step: int, item: str, tree: dict[str, Any]) -> None:
        """Checks that an item holds arrays of the same names, shapes and dtypes as a tree."""
        metadata = self._manager.item_metadata(step)[item]
        stored = {
            name: (tuple(leaf.shape), str(leaf.dtype))
            for name, leaf in named_leaves(getattr(metadata, "tree", metadata)).items()
        }
        wanted = {
            name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named_leaves(tree).items()
        }
        for name in sorted(stored.keys() | wanted.keys()):
            require(
                stored.get(name) == wanted.get(name),
                f"Checkpoint {step} of {self.folder} is of another model or optimizer: its "
                f"{item} {name} is {_describe(stored.get(name))}, the config's is "
                f"{_describe(wanted.get(name))}. Give the run's own config, or another "
                "--run-folder.",
            )

    def _seal(self, wait: bool) -> None:
        """Writes the hashes of the last checkpoint once its files are complete.

        Without `wait` it returns at once if they are not.
        """
        if self._unsealed is None:
            return
        if not wait and self._manager.is_saving_in_progress():
            return
        # Reset before anything can fail, so that a failed save is reported once, and `close` does
        # not hash what is left of it.
        step, self._unsealed = self._unsealed, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # errors of TensorStore and Orbax share no base class
            raise UserError(
                f"Checkpoint {step} of {self.folder} could not be written "
                f"({first_line(error)[:200]}): see to the disk and run the same command again."
            ) from error
        if not processes.is_first():
            return
        folder = self.folder / str(step)
        # Synced: an empty file of hashes would condemn a checkpoint that is whole.
        write_aside(folder / HASHES, json.dumps(_hashes(folder), indent=1), sync=True)

    def run_values(self, step: int) -> dict[str, Any]:
        """Reads the `run` item of a checkpoint. One process may call this alone."""
        # The file that Orbax wrote is read directly, because Orbax's own `restore` would wait for
        # the other processes.
        return json.loads((self.folder / str(step) / "run" / "metadata").read_text())

    def damage(self, step: int) -> str | None:
        """Returns what is wrong with a checkpoint, or None. One process may call this alone."""
        folder = self.folder / str(step)
        if any(not (folder / item).is_dir() for item in ITEMS):
            return f"it lacks one of its items {', '.join(ITEMS)}"
        if not (folder / HASHES).is_file():
            # A process that was killed between Orbax's rename and the hashing has left a complete
            # checkpoint, which counts. After a power failure the files may be incomplete, so at
            # least the smallest item is read.
            try:
                self.run_values(step)
            except Exception as error:  # errors of the file system and of JSON share no base class
                return f"its run values cannot be read ({type(error).__name__})"
            return None
        try:
            wanted = json.loads((folder / HASHES).read_text())
        except ValueError:
            return f"its {HASHES} is damaged"
        hashes = _hashes(folder)
        wrong = [name for name in wanted if wanted[name] != hashes.get(name)]
        return f"{wrong[0]} is not what was written" if wrong else None


def _hashes(folder: Path, item: str = ".") -> dict[str, str]:
    """Returns the sha256 of every file of an item, or of all items, by its path."""
    hashes = {}
    for path in sorted((folder / item).rglob("*")):
        # Files beside the items are left out: Orbax's own metadata, and the hashes themselves.
        if path.is_file() and path.parent != folder:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashes[str(path.relative_to(folder))] = digest
    return hashes


def _chunks(tree: Any) -> Any:
    """Returns how Orbax shall cut the arrays of a tree into chunks, each of one layer at most."""

    def args(path: str, leaf: Any) -> ocp.SaveArgs:
        axes = WEIGHT_AXES[weight_name(path)] if np.shape(leaf) else ()
        layer = tuple(index for index, axis in enumerate(axes) if axis == "layer")
        return ocp.SaveArgs(shard_axes=layer, chunk_byte_size=CHUNK_BYTES)

    leaves = [args(path, leaf) for path, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _describe(array: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if array is None else f"{array[1]}{list(array[0])}"
