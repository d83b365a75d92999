"""Opens a model wherever it comes from, and writes it in a format that other programs open.

This is the work behind `tinyllama convert`. A model comes from a run's checkpoint, a Hugging Face
folder or a `.pth` of the original TinyLlama, and becomes a Hugging Face folder or a GGUF file.
`generate` and `evaluate` open their models here too.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from jax.sharding import Mesh

from tinyllama_jax.config import LlamaConfig
from tinyllama_jax.config_file import load_config, model_of_run
from tinyllama_jax.conversion import huggingface
from tinyllama_jax.conversion.gguf import export_gguf
from tinyllama_jax.conversion.huggingface import read_json
from tinyllama_jax.conversion.litgpt import open_litgpt
from tinyllama_jax.conversion.model_card import RunFacts
from tinyllama_jax.conversion.tensors import unread_layers, unread_weights
from tinyllama_jax.errors import UserError, require
from tinyllama_jax.model.llama import Weights, abstract_weights
from tinyllama_jax.runtime.checkpoint import Checkpoints, is_run, open_checkpoint
from tinyllama_jax.runtime.mesh import on_every_device

# The largest difference of a logit that `--check` accepts. Both sides compute in fp32.
TOLERANCE = 1e-3
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True)
class Model:
    """An opened model, whose weights have not been read yet."""

    config: LlamaConfig
    weights: Weights
    """The tree of weights with `tensors.Unread` leaves."""
    tokenizer: Path
    """The sentencepiece model that the model was trained with."""
    facts: RunFacts | None
    """What the run says about the checkpoint; None if the model does not come from a run."""

    def for_decoding(self, mesh: Mesh) -> Weights:
        """Reads the weights in the form that `llama.for_decoding` returns.

        They are read layer by layer, in fp32, and every device gets all of them. `generate` uses
        weights of this form as they are, so that the model is held in memory once.

        Raises:
          UserError: the weights are damaged.
        """
        return on_every_device(unread_layers(self.weights), mesh, "float32")


def open_run(run: Path, step: int | None, metrics: Mapping[int, dict[str, Any]]) -> Model:
    """Opens a checkpoint of a run.

    Args:
      run: the run folder.
      step: the step of the checkpoint; None opens the newest.
      metrics: the metrics of the run by step, for the model card.

    Raises:
      UserError: there is no run or no such checkpoint, or the checkpoint is damaged.
    """
    model_of_run(run)  # so that a missing run is not reported as a missing checkpoint
    checkpoints, step = open_checkpoint(run, step)
    return _open_step(run, checkpoints, step, metrics)


def _open_step(
    run: Path, checkpoints: Checkpoints, step: int, metrics: Mapping[int, dict[str, Any]]
) -> Model:
    """Opens a checkpoint whose existence and hashes are checked already."""
    config, values = model_of_run(run), checkpoints.run_values(step)
    facts = RunFacts(
        step=step,
        tokens=values["rows"] * config.context,
        config=read_json(run / "config.json"),
        metrics=metrics,
        origin=values.get("origin"),
    )
    read = checkpoints.weight_reader(step, abstract_weights(config))
    return Model(config, unread_weights(config, read), run / "tokenizer.model", facts)


def open_model(
    path: Path,
    step: int | None = None,
    config_file: str | None = None,
    tokenizer: Path | None = None,
    metrics: Mapping[int, dict[str, Any]] = MappingProxyType({}),
) -> Model:
    """Opens the model at a path, which may be of three kinds.

    Args:
      path: a run folder, a Hugging Face folder, or a `.pth` of the original TinyLlama.
      step: the step of a run's checkpoint; None opens the newest. Only a run has steps.
      config_file: a config file with the model of a `.pth`. Only a `.pth` needs one.
      tokenizer: the tokenizer of a `.pth`, or of a Hugging Face folder that has none.
      metrics: the metrics of a run by step, for the model card.

    Raises:
      UserError: there is nothing at `path` that can be opened, or an argument is given that does
        not belong to this kind of model.
    """
    # The suffix counts even where there is no file, so that a wrong path to a .pth is reported as a
    # missing file and not as a missing run.
    if path.suffix in (".pth", ".pt", ".ckpt") or path.is_file():
        require(step is None, f"{path} has no steps: leave --step out.")
        if config_file is None or tokenizer is None:
            raise UserError(
                f"{path} tells neither its config nor its tokenizer: give both, as in --config "
                "configs/tinyllama_1b.py --tokenizer tokenizer.model."
            )
        config = load_config(config_file).model
        return Model(config, open_litgpt(path, config), tokenizer, None)
    require(config_file is None, f"{path} tells its config: leave --config out.")
    if huggingface.is_hf_folder(path):
        require(step is None, f"{path} has no steps: leave --step out.")
        config, weights = huggingface.open_folder(path)
        return Model(config, weights, tokenizer or path / huggingface.TOKENIZER, None)
    require(tokenizer is None, f"{path} has its tokenizer: leave --tokenizer out.")
    return open_run(path, step, metrics)


def convert(
    model: Model,
    out: Path,
    to: Literal["hf", "gguf"],
    dtype: Literal["float32", "bfloat16", "float16"],
    max_shard_bytes: int,
    check: bool,
) -> float | None:
    """Writes a model in another format.

    Args:
      model: the model to write.
      out: the folder or file to write.
      to: the format: a Hugging Face folder or a GGUF file.
      dtype: the dtype of the tensors in a Hugging Face folder. GGUF has a fixed one.
      max_shard_bytes: the largest size of a file of weights in a Hugging Face folder.
      check: whether to open the written Hugging Face folder with transformers and compare logits.

    Returns:
      The largest difference of a logit, or None without a check.

    Raises:
      UserError: as `huggingface.export`, `huggingface.check` and `export_gguf`.
    """
    if to == "gguf":
        export_gguf(model.weights, model.config, model.tokenizer, out)
        return None
    huggingface.export(
        model.weights,
        model.config,
        model.tokenizer,
        out,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        facts=model.facts,
    )
    return huggingface.check(out, model.config, model.weights, dtype) if check else None


def all_steps(
    run: Path, out: Path, to: str, metrics: Mapping[int, dict[str, Any]]
) -> Iterator[tuple[Model, Path]]:
    """Opens every checkpoint of a run, one after the other.

    Args:
      run: the run folder.
      out: the folder that will hold the converted models.
      to: the format, `hf` or `gguf`.
      metrics: the metrics of the run by step, for the model cards.

    Yields:
      Each model, and the path in `out` to write it to.

    Raises:
      UserError: `out` is not a folder that can hold them, the run has no checkpoint, or one is
        damaged.
    """
    require(
        not out.exists() or (out.is_dir() and not huggingface.is_hf_folder(out)),
        f"{out} is no folder to put all steps into: give another, or one that is not there yet.",
    )
    config = model_of_run(run)
    require(is_run(run), f"{run} has no checkpoint yet: let it train on.")
    checkpoints = Checkpoints(run)
    # All are checked before the first is converted, so that a damaged one is not found after hours.
    for step in checkpoints.steps():
        checkpoints.require_whole(step)
    tokens = {
        step: checkpoints.run_values(step)["rows"] * config.context for step in checkpoints.steps()
    }
    for step, name in release_names(tokens).items():
        model = _open_step(run, checkpoints, step, metrics)
        yield model, out / (name + (".gguf" if to == "gguf" else ""))


def release_names(tokens: dict[int, int]) -> dict[int, str]:
    """Names checkpoints as the original TinyLlama named its releases, such as step-50k-token-105B.

    Steps from 10,000 on are given in thousands, unless two checkpoints would get the same name.

    Args:
      tokens: the number of tokens read by step.

    Returns:
      The names by step.
    """
    # Below 10,000 steps, rounding to thousands would say little about a checkpoint.
    short = {step: f"{step / 1000:.0f}k" if step >= 10_000 else str(step) for step in tokens}
    names = list(short.values())
    return {
        step: f"step-{short[step] if names.count(short[step]) == 1 else step}"
        f"-token-{short_count(count)}"
        for step, count in tokens.items()
    }


def short_count(count: int) -> str:
    """Shortens a number of tokens, such as 105B for 104.9e9 and 1.5T for 1.4995e12.

    Numbers from 10 units on are whole, and smaller ones have one decimal.
    """
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        # A little below a unit counts as one: 999.6e9 would round to 1000B and not to 1T.
        if count >= 0.9995 * size:
            value = count / size
            return (f"{value:.0f}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0")) + unit
    return str(count)


def parse_bytes(text: str) -> int:
    """Reads a size such as `5GB` or `1.5MB` in bytes.

    Units are powers of 1,000, as they are for transformers' `max_shard_size`.

    Raises:
      UserError: the text is not a size, or the size is 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text.upper())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--max-shard-size is {text!r}: give it as 5GB or 500MB.")
    return int(float(match[1]) * UNITS[match[2]])
