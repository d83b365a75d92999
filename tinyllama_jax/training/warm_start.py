"""A run that begins with the weights of another: a run's checkpoint, or a Hugging Face Llama."""

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

# Fields of the model that decide no weight's shape and that a longer context changes.
MAY_DIFFER = ("context", "rope_factor")


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to begin with, found and compared with the config, not read yet."""

    folder: Path
    checkpoint: tuple[Checkpoints, int] | None
    """None: a Hugging Face folder."""
    origin: dict[str, Any]
    """What the new run remembers of it: `path`, `step` and `sha256` of the weights' files."""

    def state(self, config: Config, mesh: Mesh) -> State:
        """The weights where they live on the mesh, and a fresh optimizer."""
        target = abstract_state(config, mesh)
        if self.checkpoint is None:
            host = huggingface.load(self.folder)[1]
            weights = jax.tree.map(_place, host, target["weights"])
        else:
            checkpoints, step = self.checkpoint
            weights = checkpoints.restore_weights(step, target["weights"])
        where = jax.tree.map(lambda leaf: leaf.sharding, target)
        start = jax.jit(
            lambda weights: state_from_weights(config, weights),
            out_shardings=where,
            donate_argnums=0,
        )
        return start(weights)


def find_source(config: Config) -> Source | None:
    """Where a run's first weights come from; None for a fresh start, and for a run that goes on.

    A run with a checkpoint never looks at its source again, which may be gone. All processes
    together.

    Raises:
      UserError: nothing at `config.init_from`, a damaged checkpoint, another model or tokenizer.
    """
    own = Path(config.run_folder) / "checkpoints"
    if config.init_from is None or processes.from_first(
        lambda: any(path.name.isdigit() for path in own.glob("*"))
    ):
        return None
    with processes.together():
        folder, step = _parse(config.init_from)
        theirs = huggingface.is_hf_folder(folder)
        require(
            step is None or not theirs,
            f"init_from is {config.init_from}: a Hugging Face folder has no steps: give {folder}.",
        )
        model = (
            huggingface.config_from_hf(folder / "config.json") if theirs else model_of_run(folder)
        )
        _compare(folder, model, config)
    checkpoint = None
    if theirs:
        digest = processes.from_first(lambda: huggingface.weights_sha256(folder))
    else:
        checkpoint = open_checkpoint(folder, step)
        step = checkpoint[1]
        digest = checkpoint[0].sha256(step, "weights")
    origin = {"path": str(folder.resolve()), "step": step, "sha256": digest}
    return Source(folder, checkpoint, origin)


def _parse(init_from: str) -> tuple[Path, int | None]:
    """The folder and the step of `PATH[@STEP]`."""
    path, at, step = init_from.rpartition("@")
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
    """Raises `UserError` if the source is of another model, or learned other pieces."""
    for field, found in dataclasses.asdict(model).items():
        wanted = getattr(config.model, field)
        require(
            field in MAY_DIFFER or found == wanted,
            f"{folder} holds a model with {field} {found} and model.{field} is {wanted}: make them "
            "equal, or begin with another model.",
        )
    theirs = folder / "tokenizer.model"
    # A Hugging Face folder need not have one; then nobody can tell.
    require(
        not theirs.is_file() or file_sha256(theirs) == file_sha256(config.data.tokenizer),
        f"{folder} was trained with another tokenizer than {config.data.tokenizer}: its weights "
        "mean other pieces, so prepare the data with its tokenizer.",
    )


def _place(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(target.shape, target.sharding, lambda index: array[index])
