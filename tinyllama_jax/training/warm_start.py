"""Starts a run with existing weights, from another run's checkpoint or from a Hugging Face folder.

Only weights are taken over. The optimizer, the data and the count of steps start anew.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinyllama_jax.config import Config, LlamaConfig
from tinyllama_jax.config_file import model_of_run
from tinyllama_jax.conversion import huggingface
from tinyllama_jax.data.tokenizer import file_sha256
from tinyllama_jax.errors import require
from tinyllama_jax.runtime import processes
from tinyllama_jax.runtime.checkpoint import Checkpoints, open_checkpoint
from tinyllama_jax.training.step import State, abstract_state, state_from_weights

# The fields of the model that may differ from those of the weights. They change no weight's shape,
# and a run that continues with a longer context sets them.
MAY_DIFFER = ("context", "rope_factor")


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to start with, which fit the config and have not been read yet."""

    folder: Path
    """The run folder or Hugging Face folder."""
    checkpoint: tuple[Checkpoints, int] | None
    """The checkpoints of the run and the step to take; None for a Hugging Face folder."""
    origin: dict[str, Any]
    """What the new run records about the weights: their `path`, `step` and `sha256`."""

    def state(self, config: Config, mesh: Mesh) -> State:
        """Reads the weights onto the mesh, and makes the state of a run at step 0 with them.

        Raises:
          UserError: the weights are damaged.
        """
        target = abstract_state(config, mesh)
        if self.checkpoint is None:
            host = huggingface.load(self.folder)[1]
            weights = jax.tree.map(_place, host, target["weights"])
        else:
            checkpoints, step = self.checkpoint
            weights = checkpoints.restore_weights(step, target["weights"])
        shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
        # The state's weights take over the memory of the read ones. Without the donation both would
        # exist beside the optimizer's moments.
        start = jax.jit(
            lambda weights: state_from_weights(config, weights),
            out_shardings=shardings,
            donate_argnums=0,
        )
        return start(weights)


def find_source(config: Config) -> Source | None:
    """Finds the weights that a run starts with, and checks that they fit the run.

    All processes must call this together.

    Args:
      config: the run, whose `init_from` names the weights as PATH or PATH@STEP.

    Returns:
      The source of the weights; None if the run starts with random weights or has a checkpoint of
      its own to resume from.

    Raises:
      UserError: there is no model at `config.init_from`, its checkpoint is damaged, or it has
        another model or tokenizer than the config.
    """
    # A run that resumes does not look for its source, which may have been deleted since.
    own = Path(config.run_folder) / "checkpoints"
    if config.init_from is None or processes.from_first(
        lambda: any(path.name.isdigit() for path in own.glob("*"))
    ):
        return None
    with processes.together():
        folder, step = _parse(config.init_from)
        is_hf = huggingface.is_hf_folder(folder)
        require(
            step is None or not is_hf,
            f"init_from is {config.init_from}: a Hugging Face folder has no steps: give {folder}.",
        )
        model = (
            huggingface.config_from_hf(folder / "config.json") if is_hf else model_of_run(folder)
        )
        _compare(folder, model, config)
    # The hash is recorded in the run's checkpoints. A checkpoint has its own on disk. For a Hugging
    # Face folder only the first process computes it, because all processes may read these gigabytes
    # over one network.
    checkpoint = None
    if is_hf:
        digest = processes.from_first(lambda: huggingface.weights_sha256(folder))
    else:
        checkpoint = open_checkpoint(folder, step)
        step = checkpoint[1]
        digest = checkpoint[0].sha256(step, "weights")
    origin = {"path": str(folder.resolve()), "step": step, "sha256": digest}
    return Source(folder, checkpoint, origin)


def _parse(init_from: str) -> tuple[Path, int | None]:
    """Splits `PATH[@STEP]` into the folder and the step.

    Raises:
      UserError: there is no such folder, or the step is not a number.
    """
    path, at, step = init_from.rpartition("@")
    # A folder may have an @ in its own name.
    if not at or Path(init_from).is_dir():
        path, step = init_from, None
    require(
        Path(path).is_dir(),
        f"init_from is {init_from}: there is no run and no Hugging Face folder at {path}.",
    )
    require(
        step is None or step.isdecimal(),
        f"init_from is {init_from}: after the @ stands a step, as in {path}@5000.",
    )
    return Path(path), None if step is None else int(step)


def _compare(folder: Path, model: LlamaConfig, config: Config) -> None:
    """Raises `UserError` if the weights belong to another model or to another tokenizer."""
    for field, value in dataclasses.asdict(model).items():
        expected = getattr(config.model, field)
        require(
            field in MAY_DIFFER or value == expected,
            f"{folder} holds a model with {field} {value} and model.{field} is {expected}: make "
            "them equal, or begin with another model.",
        )
    # A Hugging Face folder need not have a tokenizer.model, and then there is nothing to compare.
    tokenizer = folder / "tokenizer.model"
    require(
        not tokenizer.is_file() or file_sha256(tokenizer) == file_sha256(config.data.tokenizer),
        f"{folder} was trained with another tokenizer than {config.data.tokenizer}: its weights "
        "mean other pieces, so prepare the data with its tokenizer.",
    )


def _place(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """Puts an array on the devices of `target`, each of which gets its part alone."""
    return jax.make_array_from_callback(target.shape, target.sharding, lambda index: array[index])
