"""To and from Hugging Face: a folder that transformers opens, written and read without torch."""

import dataclasses
import functools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from tinyllama_jax.config import LlamaConfig, UserError, make_folder, require
from tinyllama_jax.data.tokenizer import load_tokenizer
from tinyllama_jax.inference.tokenizer_json import special_tokens, tokenizer_json
from tinyllama_jax.model import llama
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.runtime.mesh import named_leaves

# Our path -> (Hugging Face's name, how many leading axes the matrix contracts). A matrix is
# (in, out) here and (out, in) there; zero axes: no matrix product, stored alike.
NAMES = {
    "embedding_VD": ("model.embed_tokens.weight", 0),
    "blocks.attention_norm_D": ("model.layers.{}.input_layernorm.weight", 0),
    "blocks.query_DNH": ("model.layers.{}.self_attn.q_proj.weight", 1),
    "blocks.key_DKH": ("model.layers.{}.self_attn.k_proj.weight", 1),
    "blocks.value_DKH": ("model.layers.{}.self_attn.v_proj.weight", 1),
    "blocks.output_NHD": ("model.layers.{}.self_attn.o_proj.weight", 2),
    "blocks.swiglu_norm_D": ("model.layers.{}.post_attention_layernorm.weight", 0),
    "blocks.gate_DF": ("model.layers.{}.mlp.gate_proj.weight", 1),
    "blocks.up_DF": ("model.layers.{}.mlp.up_proj.weight", 1),
    "blocks.down_FD": ("model.layers.{}.mlp.down_proj.weight", 1),
    "norm_D": ("model.norm.weight", 0),
    "head_DV": ("lm_head.weight", 1),
}

# Keys of config.json -> fields of LlamaConfig.
FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "query_heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "intermediate_size": "swiglu_width",
    "max_position_embeddings": "context",
    "rms_norm_eps": "norm_eps",
}

# Keys of config.json that have one value in every Llama 2.
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

SAVE_AGAIN = "open it with transformers and save_pretrained(folder, max_shard_size='1TB')."

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint, and where it lives in our tree."""

    path: str
    index: Any
    """Of the tensor in the leaf at `path`: its layer, or `...` where there is no layer axis."""
    shape: tuple[int, ...]
    """Here, without the layer axis."""
    contracted: int

    @property
    def hf_shape(self) -> tuple[int, ...]:
        ins, outs = self.shape[: self.contracted], self.shape[self.contracted :]
        return (math.prod(outs), math.prod(ins)) if self.contracted else self.shape

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        matrix = array.reshape(self.hf_shape[::-1]).T if self.contracted else array
        return np.ascontiguousarray(matrix)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return array.T.reshape(self.shape) if self.contracted else array


def leaves(config: LlamaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every weight of the model by its dotted path."""
    return named_leaves(llama.abstract_weights(config))


def tensors(config: LlamaConfig) -> dict[str, Tensor]:
    """Every tensor of the model by Hugging Face's name; a weight with no row raises KeyError."""
    table = {}
    for path, leaf in leaves(config).items():
        name, contracted = NAMES[path]
        if path.startswith("blocks."):
            for layer in range(config.layers):
                table[name.format(layer)] = Tensor(path, layer, leaf.shape[1:], contracted)
        else:
            table[name] = Tensor(path, ..., leaf.shape, contracted)
    return table


def export(weights: Weights, config: LlamaConfig, tokenizer: Path, folder: Path) -> None:
    """Writes a folder that transformers opens: fp32 weights, config and tokenizer.

    The folder appears whole or not at all. An earlier export in its place is replaced.

    Args:
      weights: as `llama.init_weights` gives them, in any float dtype.
      config: the model they belong to.
      tokenizer: the sentencepiece model it was trained with.
      folder: where to write.

    Raises:
      UserError: weights that are not finite or do not fit the config, another number of pieces
        than `config.vocab_size`, a model or tokenizer that transformers cannot express, or a
        folder that holds anything but an earlier export, which stays untouched.
    """
    tokenizer, folder = Path(tokenizer), Path(folder).resolve()
    require_replaceable(folder)
    require(
        config.width % config.query_heads == 0,
        f"transformers refuses model.width ({config.width}) that model.query_heads "
        f"({config.query_heads}) does not divide: such a model can only be used here.",
    )
    table = tokenizer_json(tokenizer)
    pieces = len(table["model"]["vocab"])
    require(
        pieces == config.vocab_size,
        f"{tokenizer} has {pieces} pieces and the model {config.vocab_size}: "
        "give the tokenizer that the model was trained with.",
    )
    flat = named_leaves(weights)
    wanted = {path: leaf.shape for path, leaf in leaves(config).items()}
    for path in sorted(flat.keys() | wanted.keys()):
        found = np.shape(flat[path]) if path in flat else None
        require(
            found == wanted.get(path),
            f"Weight {path} has shape {found} and the config asks for {wanted.get(path)}: "
            "give the config of the run that the weights come from.",
        )
        flat[path] = np.asarray(flat[path], np.float32)
        require(
            bool(np.isfinite(flat[path]).all()),
            f"Weight {path} holds values that are not finite: export an earlier checkpoint.",
        )

    ids = special_tokens(tokenizer)
    written = {token["id"]: token for token in table["added_tokens"]}
    special = {name: written[index]["content"] for name, index in ids.items()}
    ends = {"bos_token_id": ids["bos_token"], "eos_token_id": ids["eos_token"]}
    scaling = None
    if config.rope_factor != 1:
        scaling = {"rope_type": "linear", "factor": config.rope_factor}
    jsons = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            **FIXED,
            **{key: getattr(config, field) for key, field in FIELDS.items()},
            # transformers 5 reads the first of these and `dtype`, transformers 4 the others.
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}
            | (scaling or {}),
            "rope_theta": config.rope_base,
            "rope_scaling": scaling,
            "dtype": "float32",
            "torch_dtype": "float32",
            "initializer_range": llama.init_std(config),
            "attention_dropout": 0.0,
            "use_cache": True,
            **ends,
        },
        "generation_config.json": ends,
        "tokenizer.json": table,
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            # Not LlamaTokenizer: it builds merges and normalizer anew and not from tokenizer.json.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_bos_token": False,
            "add_eos_token": False,
            # Text that spells `</s>` is text, as it was when the training data was encoded.
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.context,
        },
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        stored = {
            name: tensor.to_hf(flat[tensor.path][tensor.index])
            for name, tensor in tensors(config).items()
        }
        safetensors.numpy.save_file(stored, partial / "model.safetensors", {"format": "pt"})
        shutil.copyfile(tokenizer, partial / "tokenizer.model")
        # Safetensors leaves its file to its owner alone; the export is as open as any other file.
        shutil.copymode(partial / "tokenizer.model", partial / "model.safetensors")
        for name, values in jsons.items():
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            (partial / name).write_text(text, encoding="utf-8")
        replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def require_replaceable(folder: Path) -> None:
    """Raises `UserError` if something stands at `folder` that is not an earlier export."""
    if not folder.exists():
        return
    cure = "choose another folder, or move it away."
    require(folder.is_dir(), f"{folder} is a file: {cure}")
    found = {path.name for path in folder.iterdir()}
    require({"config.json", "model.safetensors"} <= found, f"{folder} is no export: {cure}")
    strange = ", ".join(sorted(found - FILES))
    require(not strange, f"{folder} holds {strange}, which no export wrote: {cure}")
    architectures = read_json(folder / "config.json").get("architectures")
    require(architectures == ["LlamaForCausalLM"], f"{folder} holds another model: {cure}")


def replace(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; what stood there is deleted once the new one is in place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): download or export it again.") from error


def config_from_hf(path: Path) -> LlamaConfig:
    """Reads config.json as transformers 4 and 5 write it."""
    values = read_json(path)
    # What transformers itself assumes where a key is left out.
    rope = {"rope_theta": values.get("rope_theta", 10_000.0), "factor": 1.0}
    rope |= values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = "linear" if kind == "linear" else "default"
    found = {**FIXED, "model_type": None, "partial_rotary_factor": 1.0, **values, "rope_type": kind}
    for key, value in {**FIXED, "partial_rotary_factor": 1.0, "rope_type": known}.items():
        require(
            found[key] == value,
            f"{path} has {key} {found[key]!r} and this model {value!r}: choose a Llama 2 without "
            "biases, tied embeddings or a RoPE scaling other than linear.",
        )
    try:
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
        values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
        return LlamaConfig(
            **{field: values[key] for key, field in FIELDS.items()},
            rope_base=float(rope["rope_theta"]),
            rope_factor=float(rope["factor"]) if kind == "linear" else 1.0,
        )
    except KeyError as error:
        raise UserError(
            f"{path} has no {error}: save the model again with transformers."
        ) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} holds a value that cannot be ({error}): download or export it again."
        ) from error


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds a model as transformers saves it, in one file or in several."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return any((folder / name).is_file() for name in names)


def weights_file(folder: Path) -> Path:
    """The one file of a folder's weights. Raises `UserError` if they are not in one."""
    file = Path(folder) / "model.safetensors"
    require(file.is_file(), f"There is no {file}, be it sharded or in another format: {SAVE_AGAIN}")
    return file


def load(folder: Path) -> tuple[LlamaConfig, Weights]:
    """Reads a Llama 2 that transformers or `export` saved.

    Args:
      folder: holds config.json and one model.safetensors in fp32, bf16 or fp16.

    Returns:
      The config, and the weights as fp32 NumPy arrays shaped like `llama.init_weights`.

    Raises:
      UserError: another architecture, sharded or unreadable weights, and tensors that are
        missing, too many, of another shape or dtype, or not finite.
    """
    config = config_from_hf(Path(folder) / "config.json")
    file, again = weights_file(folder), SAVE_AGAIN
    table = tensors(config)
    flat = {path: np.empty(leaf.shape, np.float32) for path, leaf in leaves(config).items()}
    try:
        with safetensors.safe_open(file, framework="numpy") as stored:
            for name in sorted(stored.keys() ^ table.keys()):
                state = "is missing from" if name in table else "is unknown in"
                raise UserError(f"Tensor {name} {state} {file}: {again}")
            for name, tensor in table.items():
                part = stored.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                require(
                    shape == tensor.hf_shape and dtype in ("F32", "BF16", "F16"),
                    f"Tensor {name} of {file} is {dtype} {shape}, not {tensor.hf_shape} "
                    f"in fp32, bf16 or fp16: {again}",
                )
                array = stored.get_tensor(name).astype(np.float32)
                require(
                    bool(np.isfinite(array).all()),
                    f"Tensor {name} of {file} holds values that are not finite: "
                    "take another checkpoint.",
                )
                flat[tensor.path][tensor.index] = tensor.to_ours(array)
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}): download or export it again.") from error
    return config, traverse_util.unflatten_dict(flat, sep=".")


def verify_export(folder: Path) -> list[str]:
    """Reads all of a folder as `load` does, and its tokenizer if it has one.

    Returns:
      What is bad, a line each; none for a folder that is whole. There is no hash to compare with:
      a flipped bit that leaves a number finite is not seen.
    """
    bad = []
    try:
        load(folder)
    except UserError as error:
        bad.append(str(error))
    try:
        if (folder / "tokenizer.model").exists():
            load_tokenizer(folder / "tokenizer.model")
    except UserError as error:
        bad.append(str(error))
    return bad


def check(folder: Path, config: LlamaConfig, weights: Weights) -> float:
    """Opens an exported folder with transformers and compares its logits with ours, in fp32.

    Args:
      folder: as `export` wrote it.
      config: the model that was exported.
      weights: as `llama.init_weights` gives them.

    Returns:
      The largest absolute difference, over random tokens of the whole vocabulary.

    Raises:
      UserError: torch or transformers are not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(
            "Comparing with transformers needs torch: pip install 'tinyllama-jax[torch]'."
        ) from error
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)
    apply = jax.jit(functools.partial(llama.apply, config))
    generator, largest = np.random.default_rng(0), 0.0
    for length in sorted({min(length, config.context) for length in (1, 7, 64, 256)}):
        tokens_BT = generator.integers(config.vocab_size, size=(2, length))
        # GPUs multiply fp32 matrices in fewer bits unless told otherwise.
        with jax.default_matmul_precision("highest"):
            ours_BTV = np.asarray(apply(weights, tokens_BT))
        with torch.no_grad():
            theirs_BTV = model(torch.from_numpy(tokens_BT)).logits.numpy()
        largest = max(largest, float(np.abs(ours_BTV - theirs_BTV).max()))
    return largest
