"""A run on disk: its folder, its lock, its checkpoints. Orbax stays behind this module.

A checkpoint `checkpoints/<step>/` holds three items: `weights`, `optimizer` (with the counters) and
`run` (rows consumed, data fingerprint, config). Orbax writes it aside and renames it; then its
files are hashed into `sha256.json`, because Orbax restores a flipped bit without a word.

Of several processes each writes its part of the arrays, and the first does everything else: what it
finds on disk is what all go by. Every function here is for all processes together.

Arrays of all layers lie in chunks of a layer, so that a conversion can read one at a time. Orbax
reads no part of an array, TensorStore does, which Orbax writes through.
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
# Of a chunk: it is in memory as it lies on disk, beside what is made of it.
CHUNK_BYTES = 2**26


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the run folder against a second writer; the lock ends with the process.

    Of several processes the first takes it for all.

    Raises:
      UserError: another process trains in this folder, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with processes.together():
            if processes.is_first():
                _lock(folder, stack)
        yield


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
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
    """A run's checkpoints for reading, and `step` or the newest that is whole.

    Raises:
      UserError: no checkpoint yet, none of this step, or a damaged one.
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
    """Whether a folder holds a run that has begun to save."""
    return (folder / "checkpoints").is_dir()


def verify_run(run: Path) -> list[str]:
    """Reads a run's config, and hashes all its checkpoints.

    Returns:
      What is bad, a line each; none for a run that is whole.
    """
    bad = []
    try:
        model_of_run(run)
    except UserError as error:
        bad.append(str(error))
    checkpoints = Checkpoints(run)
    for step in checkpoints.steps():
        if (damage := checkpoints.damage(step)) is not None:
            bad.append(f"checkpoint {step} is damaged: {damage}")
    return bad


class Checkpoints:
    """The checkpoints of one run, newest by number."""

    def __init__(self, run_folder: str | Path, policy: CheckpointConfig | None = None):
        """Opens a run's checkpoints; without a policy, for reading alone."""
        self.folder = Path(run_folder).resolve() / "checkpoints"
        self._unsealed: int | None = None
        self._read_only = policy is None
        if policy is None:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            kept: list = [preservation_policy.LatestN(policy.keep)]
            if policy.permanent_every:
                kept.append(preservation_policy.EveryNSteps(policy.permanent_every))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,  # what a killed save left behind
            )
            self.folder.mkdir(parents=True, exist_ok=True)
        # Named handlers, or a manager that has not saved yet knows no metadata.
        handlers = {item: handler() for item, handler in ITEMS.items()}
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=tuple(ITEMS), item_handlers=handlers
        )

    def save(self, state: dict[str, Any], run: dict[str, Any]) -> None:
        """Saves in the background; the state may be donated at once. Nothing, if it is saved.

        Args:
          state: `weights` and `step`, and whatever else the run's state holds.
          run: JSON values, among them `rows`.

        Raises:
          UserError: the disk is too full for one more checkpoint.
        """
        step = int(state["step"])
        if step in self._manager.all_steps():
            return
        self._seal(wait=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = processes.from_first(lambda: shutil.disk_usage(self.folder).free)
        require(
            free > 1.1 * needed,
            f"{self.folder} has {free / 1e9:.1f} GB free and a checkpoint takes "
            f"{needed / 1e9:.1f} GB: make room and run the same command again.",
        )
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
        """Hashes the last checkpoint once it is written; call it between steps."""
        self._seal(wait=False)

    def finish(self) -> None:
        """Waits for the last save and hashes it."""
        self._seal(wait=True)

    def close(self) -> None:
        """Finishes the last save and lets go of the folder."""
        self.finish()
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints, rising."""
        return sorted(self._manager.all_steps()) if self.folder.is_dir() else []

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest whole checkpoint: (step, its `run` values); None if there is none at all.

        One that is damaged is passed over, with a line that says so. A run that goes on from an
        older one will save that step again, so its writer moves the damaged one to `damaged/`.

        Raises:
          UserError: there are checkpoints, and every one is damaged.
        """

        def find() -> tuple[int, dict[str, Any]] | None:
            passed = []
            for step in reversed(self.steps()):
                damage = self.damage(step)
                if damage is None:
                    if not self._read_only:
                        self._move_aside(passed)
                    return step, self.run_values(step)
                print(f"Checkpoint {step} of {self.folder} is passed over: {damage}.", flush=True)
                passed.append(step)
            require(
                not passed,
                f"Every checkpoint of {self.folder} is damaged: remove the folder to start again.",
            )
            return None

        found = processes.from_first(find)
        self._manager.reload()  # what was moved away is no longer there
        return None if found is None else (found[0], found[1])

    def _move_aside(self, steps: list[int]) -> None:
        for step in steps:
            aside = self.folder.with_name("damaged") / str(step)
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)

    def require_whole(self, step: int) -> None:
        """Raises `UserError` if there is no checkpoint of this step, or if it is damaged."""

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
        """One hash over the files of an item."""

        def digest() -> str:
            hashes = json.dumps(_hashes(self.folder / str(step), item), sort_keys=True)
            return hashlib.sha256(hashes.encode()).hexdigest()

        return processes.from_first(digest)

    def restore(self, step: int, abstract_state: dict[str, Any]) -> dict[str, Any]:
        """The state of a checkpoint, onto whatever shardings the abstract state has.

        Names, shapes and dtypes are compared before anything is loaded: Orbax pads and casts.

        Raises:
          UserError: the checkpoint holds other arrays.
        """
        rest = {key: value for key, value in abstract_state.items() if key != "weights"}
        wanted = {"weights": abstract_state["weights"], "optimizer": named_leaves(rest)}
        for item, tree in wanted.items():
            self._compare(step, item, tree)
        args = {item: ocp.args.StandardRestore(tree) for item, tree in wanted.items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**args))
        leaves = [found["optimizer"][name] for name in wanted["optimizer"]]
        return {"weights": found["weights"]} | jax.tree.unflatten(jax.tree.structure(rest), leaves)

    def restore_weights(self, step: int, abstract_weights: dict[str, Any]) -> dict[str, Any]:
        """The weights alone. Raises UserError if the checkpoint holds others."""
        self._compare(step, "weights", abstract_weights)
        args = ocp.args.Composite(weights=ocp.args.StandardRestore(abstract_weights))
        return self._manager.restore(step, args=args)["weights"]

    def weight_reader(
        self, step: int, abstract_weights: dict[str, Any]
    ) -> Callable[[str, Any], np.ndarray]:
        """What reads a part of a weight of a checkpoint, by its dotted path and an index.

        The index is a layer, or `...` for the whole.

        Raises:
          UserError: the checkpoint holds other weights, or is damaged; of the arrays only what is
            read is looked at.
        """
        # Orbax's layout: an OCDBT database, in it a Zarr array under each weight's path.
        base = {"driver": "file", "path": f"{self.folder / str(step) / 'weights'}/"}
        store = {"driver": "ocdbt", "base": base}
        with self._said(step):
            # Orbax's readers, where they fail in this, leave a traceback behind on stderr.
            tensorstore.KvStore.open(store).result().list().result()
            self._compare(step, "weights", abstract_weights)

        @functools.cache
        def opened(path: str) -> tensorstore.TensorStore:
            place = store | {"path": f"{path}/"}
            spec = {"driver": "zarr", "kvstore": place, "fill_missing_data_reads": False}
            return tensorstore.open(spec, open=True, read=True).result()

        def read(path: str, index: Any) -> np.ndarray:
            with self._said(step):
                return opened(path)[index].read().result()

        return read

    @contextlib.contextmanager
    def _said(self, step: int) -> Iterator[None]:
        """Makes one sentence of whatever a damaged checkpoint lets its readers raise."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:  # TensorStore's, Orbax's and JSON's share no class
            others = [other for other in self.steps() if other != step]
            raise UserError(
                f"Checkpoint {step} of {self.folder} cannot be read, or is damaged "
                f"({first_line(error)[:200]}): take another of {others}."
            ) from error

    def _compare(self, step: int, item: str, tree: dict[str, Any]) -> None:
        metadata = self._manager.item_metadata(step)[item]
        found = {
            name: (tuple(leaf.shape), str(leaf.dtype))
            for name, leaf in named_leaves(getattr(metadata, "tree", metadata)).items()
        }
        wanted = {
            name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in named_leaves(tree).items()
        }
        for name in sorted(found.keys() | wanted.keys()):
            require(
                found.get(name) == wanted.get(name),
                f"Checkpoint {step} of {self.folder} is of another model or optimizer: its "
                f"{item} {name} is {_describe(found.get(name))}, the config's is "
                f"{_describe(wanted.get(name))}. Give the run's own config, or another "
                "--run-folder.",
            )

    def _seal(self, wait: bool) -> None:
        if self._unsealed is None:
            return
        if not wait and self._manager.is_saving_in_progress():
            return
        # Forgotten first: a save that failed is told once, and closing does not hash what it left.
        step, self._unsealed = self._unsealed, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # TensorStore's and Orbax's own errors share no class
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
        # As Orbax wrote them, but without its manager, whose restore waits for the other processes.
        return json.loads((self.folder / str(step) / "run" / "metadata").read_text())

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, or None."""
        folder = self.folder / str(step)
        if any(not (folder / item).is_dir() for item in ITEMS):
            return f"it lacks one of its items {', '.join(ITEMS)}"
        if not (folder / HASHES).is_file():
            # A process killed between Orbax's rename and the hashing leaves it whole; a machine
            # that lost its power may not have.
            try:
                self.run_values(step)
            except Exception as error:  # Orbax's and JSON's own errors share no class
                return f"its run values cannot be read ({type(error).__name__})"
            return None
        try:
            wanted = json.loads((folder / HASHES).read_text())
        except ValueError:
            return f"its {HASHES} is damaged"
        found = _hashes(folder)
        wrong = [name for name in wanted if wanted[name] != found.get(name)]
        return f"{wrong[0]} is not what was written" if wrong else None


def _hashes(folder: Path, item: str = ".") -> dict[str, str]:
    hashes = {}
    for path in sorted((folder / item).rglob("*")):
        if path.is_file() and path.parent != folder:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashes[str(path.relative_to(folder))] = digest
    return hashes


def _chunks(tree: Any) -> Any:
    """How Orbax cuts each array of a tree: a layer to a chunk, or less, and no layer in several."""

    def args(path: str, leaf: Any) -> ocp.SaveArgs:
        axes = WEIGHT_AXES[weight_name(path)] if np.shape(leaf) else ()
        layer = tuple(index for index, axis in enumerate(axes) if axis == "layer")
        return ocp.SaveArgs(shard_axes=layer, chunk_byte_size=CHUNK_BYTES)

    found = [args(path, leaf) for path, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _describe(array: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if array is None else f"{array[1]}{list(array[0])}"
