"""`tinyllama convert`: from a run, a Hugging Face folder or a `.pth`, to what others open."""

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

TOLERANCE = 1e-3  # largest logit difference of `--check`, fp32 on both sides
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclasses.dataclass(frozen=True)
class Model:
    """What is converted; its weights are not read yet."""

    config: LlamaConfig
    weights: Weights
    tokenizer: Path
    facts: RunFacts | None

    def for_decoding(self, mesh: Mesh) -> Weights:
        """The weights as `generate` takes them without a copy: read layer by layer, in fp32, and
        whole on each device. Raises `UserError` if they are damaged."""
        return on_every_device(unread_layers(self.weights), mesh, "float32")


def open_run(run: Path, step: int | None, metrics: Mapping[int, dict[str, Any]]) -> Model:
    """A run's checkpoint, by default the newest.

    Args:
      run: its folder.
      step: of the checkpoint.
      metrics: {step: values} of its metrics.jsonl, for the model card.

    Raises:
      UserError: no run there, no such checkpoint, or a damaged one.
    """
    model_of_run(run)
    checkpoints, step = open_checkpoint(run, step)
    return _open_step(run, checkpoints, step, metrics)


def _open_step(
    run: Path, checkpoints: Checkpoints, step: int, metrics: Mapping[int, dict[str, Any]]
) -> Model:
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
    """Whatever stands at `path`.

    Args:
      path: a run, a Hugging Face folder, or a `.pth` of the original.
      step: of a run's checkpoint, the newest by default.
      config_file: config with the model of a `.pth`.
      tokenizer: of a `.pth`, or of a folder without one.
      metrics: {step: values} of a run, for the model card.

    Raises:
      UserError: nothing there that can be opened, or arguments that are for something else.
    """
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
    """Writes a model, and with `check` compares what was written with what was read.

    Returns:
      The largest difference of logits, or None without a check.
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
    """Every checkpoint of a run, one after the other, and the path in `out` where it goes."""
    require(
        not out.exists() or (out.is_dir() and not huggingface.is_hf_folder(out)),
        f"{out} is no folder to put all steps into: give another, or one that is not there yet.",
    )
    config = model_of_run(run)
    require(is_run(run), f"{run} has no checkpoint yet: let it train on.")
    checkpoints = Checkpoints(run)
    for step in checkpoints.steps():
        checkpoints.require_whole(step)
    tokens = {
        step: checkpoints.run_values(step)["rows"] * config.context for step in checkpoints.steps()
    }
    for step, name in release_names(tokens).items():
        model = _open_step(run, checkpoints, step, metrics)
        yield model, out / (name + (".gguf" if to == "gguf" else ""))


def release_names(tokens: dict[int, int]) -> dict[int, str]:
    """Names such as step-50k-token-105B for {step: tokens read}, the rule of the original's.

    Steps from 10,000 on are in thousands, but for those that would share a name.
    """
    short = {step: f"{step / 1000:.0f}k" if step >= 10_000 else str(step) for step in tokens}
    names = list(short.values())
    return {
        step: f"step-{short[step] if names.count(short[step]) == 1 else step}"
        f"-token-{short_count(count)}"
        for step, count in tokens.items()
    }


def short_count(count: int) -> str:
    """105B for 104.9e9, 1.5T for 1.4995e12: whole from 10 on, one digit more below."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        # 999.6e9 would be 1000B.
        if count >= 0.9995 * size:
            value = count / size
            return (f"{value:.0f}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0")) + unit
    return str(count)


def parse_bytes(text: str) -> int:
    """Bytes of `5GB`, `500MB` or `1.5GB`, in powers of 1,000 as transformers counts them."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text.upper())
    if found is None or float(found[1]) == 0:
        raise UserError(f"--max-shard-size is {text!r}: give it as 5GB or 500MB.")
    return int(float(found[1]) * UNITS[found[2]])
