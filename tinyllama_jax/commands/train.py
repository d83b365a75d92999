"""`tinyllama train`: what the launch scripts call too."""

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, get_args

import tyro

from tinyllama_jax.commands.options import ConfigOptions
from tinyllama_jax.commands.prepare import Corpus
from tinyllama_jax.config import Config, Launch
from tinyllama_jax.errors import ExitCode, require
from tinyllama_jax.runtime.allocator import keep_memory


@dataclasses.dataclass(frozen=True)
class TrainOptions(ConfigOptions):
    """Train CONFIG on the devices at hand, or go on with the run in its folder."""

    launch: Annotated[Launch, tyro.conf.arg(name="")] = Launch()
    profile: str | None = None
    """START:STOP, steps to trace, as in 10:20: where their time goes is left in RUN/profile/."""


def train(options: TrainOptions, devices: int | None = None) -> int:
    """Trains, and returns whether the run is complete, saved after a signal, or diverged.

    Args:
      options: the run, and where it is computed.
      devices: how many there must be over all processes; None: any number.

    Raises:
      UserError: something in the options, the data, the devices or the run folder does not fit.
    """
    from tinyllama_jax.runtime import processes
    from tinyllama_jax.runtime.mesh import make_mesh
    from tinyllama_jax.training.loop import Diverged, run

    keep_memory()
    with processes.joined(options.launch, devices):
        mesh = make_mesh(options.launch.data_axis)
        _say_if_gpu_idle(mesh.devices.flat[0].platform)
        with processes.together():
            require_data(options.config)
        try:
            complete = run(options.config, mesh, options.profile)
        except Diverged as error:
            print(f"tinyllama: {error}", file=sys.stderr)
            return ExitCode.FAILED
    return ExitCode.DONE if complete else ExitCode.SAVED


def require_data(config: Config) -> None:
    """Raises `UserError` with the command that makes what is missing of tokenizer and datasets."""
    tokenizer, pieces = config.data.tokenizer, str(config.model.vocab_size)
    command = ["tokenizer", "stdlib", "--vocab-size", pieces, "--out", tokenizer]
    require(
        Path(tokenizer).is_file(),
        f"There is no tokenizer at {tokenizer}: `{_shell(*command)}` trains one on the standard "
        "library of Python; or give another as --data.tokenizer.",
    )
    for source in config.data.sources:
        folder, corpus = Path(source.path), source.name.replace("_", "-")
        if source.name == folder.name and source.name in ("prose", "code"):
            command = ["prepare", "stdlib", "--tokenizer", tokenizer, "--out", str(folder.parent)]
        else:
            corpus = corpus if corpus in get_args(Corpus) else "files"
            command = ["prepare", corpus, "--source", "FOLDER"]
            command += ["--tokenizer", tokenizer, "--out", str(folder)]
        require(
            folder.exists(), f"There is no dataset at {folder}: `{_shell(*command)}` writes it."
        )


def _shell(*command: str) -> str:
    return shlex.join(["tinyllama", *command])


def _say_if_gpu_idle(platform: str) -> None:
    if platform == "cpu" and os.path.exists("/dev/nvidia0"):
        print(
            "There is an NVIDIA device, but JAX runs on the CPU: "
            "pip install 'tinyllama-jax[gpu]' (or unset JAX_PLATFORMS)."
        )
