"""Writes and reads models as transformers saves them, without torch.

A model is a folder of safetensors files with a config.json and a tokenizer beside them.
"""

import functools
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import LlamaConfig
from tinyllama_jax.conversion import model_card, safetensors_files
from tinyllama_jax.conversion.safetensors_files import Stored
from tinyllama_jax.conversion.tensors import leaves, stream, tensors, unread_tensors
from tinyllama_jax.conversion.tokenizer_json import special_tokens, tokenizer_json
from tinyllama_jax.data.tokenizer import file_sha256, load_tokenizer
from tinyllama_jax.errors import UserError, require
from tinyllama_jax.files import folder_written_aside
from tinyllama_jax.model import llama
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.runtime.mesh import named_leaves

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

# Keys of config.json that have the same value in every Llama 2.
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}

# Keys that other architectures set, each of which changes what the model computes. They must be
# absent or null: a model that ignored one would load without an error and give wrong logits.
ABSENT = ("sliding_window", "quantization_config", "attn_logit_softcapping", "num_local_experts")

TOKENIZER = "tokenizer.model"
CARD = "README.md"
HASHES = "sha256.json"
# The files of an export beside its safetensors.
FILES = {
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    TOKENIZER,
    CARD,
    HASHES,
}

# The largest size that config.json may give. No Llama comes near it; a larger one is damage, which
# would otherwise show as an allocation that fails.
LARGEST = 2**20

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def export(
    weights: Weights,
    config: LlamaConfig,
    tokenizer: Path,
    folder: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    facts: model_card.RunFacts | None = None,
) -> None:
    """Writes a folder that transformers opens: weights, config, tokenizer, model card and hashes.

    The folder appears whole or not at all. An earlier export in its place is replaced.

    Args:
      weights: the tree that `llama.init_weights` returns, in any float dtype, or one of `Unread`
        leaves, of which only one layer of one weight is in memory at a time.
      config: the model that the weights belong to.
      tokenizer: the sentencepiece model that the model was trained with.
      folder: the folder to write.
      dtype: the dtype of the written tensors: float32, bfloat16 or float16.
      max_shard_bytes: the largest size of a file of weights. A larger model is written to several
        files with an index.
      facts: what the model card says about the run; None if the model does not come from a run.

    Raises:
      UserError: the weights are not finite or do not fit the config or the dtype, the tokenizer has
        another number of pieces than `config.vocab_size`, transformers cannot express the model or
        the tokenizer, the disk is full, or the folder holds anything but an earlier export, in
        which case it stays untouched.
    """
    tokenizer, folder = Path(tokenizer), Path(folder).resolve()
    require_replaceable(folder)
    require(
        config.width % config.query_heads == 0,
        f"transformers refuses model.width ({config.width}) that model.query_heads "
        f"({config.query_heads}) does not divide: such a model can only be used here.",
    )
    table = tokenizer_json(tokenizer)
    require_pieces(tokenizer, len(table["model"]["vocab"]), config)
    require_shapes(weights, config)
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
            "tie_word_embeddings": False,
            **{key: getattr(config, field) for key, field in FIELDS.items()},
            # RoPE and the dtype are written twice: transformers 5 reads `rope_parameters` and
            # `dtype`, transformers 4 reads `rope_theta`, `rope_scaling` and `torch_dtype`.
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}
            | (scaling or {}),
            "rope_theta": config.rope_base,
            "rope_scaling": scaling,
            "dtype": dtype,
            "torch_dtype": dtype,
            "initializer_range": llama.init_std(config),
            "attention_dropout": 0.0,
            "use_cache": True,
            **ends,
        },
        "generation_config.json": ends,
        "tokenizer.json": table,
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            # LlamaTokenizer would ignore tokenizer.json and build merges and normalizer itself,
            # with other ids as the result.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "add_bos_token": False,
            "add_eos_token": False,
            # sentencepiece encoded a literal `</s>` in the training data as ordinary text. Without
            # this option transformers would turn it into the end-of-sequence token.
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.context,
        },
    }
    # Everything is written beside the folder and renamed at the end, so that a killed process never
    # leaves half an export under the final name.
    with folder_written_aside(folder) as aside:
        shapes = {name: tensor.hf_shape for name, tensor in tensors(config).items()}
        parts = stream(weights, config, dtype)
        safetensors_files.write(aside, shapes, dtype, max_shard_bytes, parts)
        shutil.copyfile(tokenizer, aside / TOKENIZER)
        for name, values in jsons.items():
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            (aside / name).write_text(text, encoding="utf-8")
        hashes = {path.name: file_sha256(path) for path in sorted(aside.iterdir())}
        (aside / HASHES).write_text(json.dumps(hashes, indent=1))
        # The card is written after the hashes were taken, so that people may edit it.
        card = model_card.render(folder.name, config, dtype, facts)
        (aside / CARD).write_text(card, encoding="utf-8")


def require_pieces(tokenizer: Path, pieces: int, config: LlamaConfig) -> None:
    """Raises `UserError` if the tokenizer has another number of pieces than the model."""
    require(
        pieces == config.vocab_size,
        f"{tokenizer} has {pieces} pieces and the model {config.vocab_size}: "
        "give the tokenizer that the model was trained with.",
    )


def require_shapes(weights: Weights, config: LlamaConfig) -> None:
    """Raises `UserError` unless the weights have the names and shapes that the config asks for."""
    shapes = {path: np.shape(leaf) for path, leaf in named_leaves(weights).items()}
    expected = {path: leaf.shape for path, leaf in leaves(config).items()}
    for path in sorted(shapes.keys() | expected.keys()):
        require(
            shapes.get(path) == expected.get(path),
            f"Weight {path} has shape {shapes.get(path)} and the config asks for "
            f"{expected.get(path)}: give the config of the run that the weights come from.",
        )


def require_replaceable(folder: Path) -> None:
    """Raises `UserError` if something stands at `folder` that is not an earlier export."""
    if not folder.exists():
        return
    cure = "choose another folder, or move it away."
    require(folder.is_dir(), f"{folder} is a file: {cure}")
    names = {path.name for path in folder.iterdir()}
    # Only our exports have hashes. A model that was downloaded from elsewhere must not be deleted.
    require({"config.json", HASHES} <= names, f"{folder} is no export: {cure}")
    foreign = sorted(name for name in names - FILES if not safetensors_files.is_file_name(name))
    require(not foreign, f"{folder} holds {', '.join(foreign)}, which no export wrote: {cure}")
    architectures = read_json(folder / "config.json").get("architectures")
    require(architectures == ["LlamaForCausalLM"], f"{folder} holds another model: {cure}")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises `UserError` if the file is missing, damaged or not an object."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): download or export it again.") from error


def config_from_hf(path: Path) -> LlamaConfig:
    """Reads the model from a config.json that transformers 4 or 5 wrote.

    Raises:
      UserError: the file is damaged, or the model is not a Llama 2. The message names the key that
        is not supported.
    """
    values = read_json(path)
    for key in ABSENT:
        require(
            values.get(key) is None,
            f"{path} has {key} {values.get(key)!r}, which this model has not: choose a Llama 2.",
        )
    # Keys that are left out have the defaults of transformers, all but the model's type.
    stated = {**FIXED, "model_type": None, "partial_rotary_factor": 1.0, **values}
    for key, value in {**FIXED, "partial_rotary_factor": 1.0}.items():
        require(
            stated[key] == value,
            f"{path} has {key} {stated[key]!r} and this model {value!r}: choose a Llama 2 without "
            "biases.",
        )
    try:
        rope = _rope(path, values)
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
        values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
        fields = {field: values[key] for key, field in FIELDS.items()}
        rope["norm_eps"] = fields.pop("norm_eps")
        # `type(size) is int` and not isinstance, because True is an instance of int.
        if not all(type(size) is int and size <= LARGEST for size in fields.values()):
            raise ValueError(f"sizes {fields}")
        if not all(type(x) in (int, float) and math.isfinite(x) for x in rope.values()):
            raise ValueError(f"{rope}")
        numbers: dict[str, Any] = {**fields, **{name: float(x) for name, x in rope.items()}}
        return LlamaConfig(**numbers)
    except KeyError as error:
        raise UserError(
            f"{path} has no {error}: save the model again with transformers."
        ) from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"{path} holds a value that cannot be ({error}): download or export it again."
        ) from error


def _rope(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Reads the RoPE fields of `LlamaConfig` from config.json.

    Versions of transformers keep them in different places, and a file may state one several times.
    Raises `UserError` if two places disagree or the kind of RoPE is not supported.
    """
    rope: dict[str, Any] = {}
    parts = [values.get("rope_scaling") or {}, values.get("rope_parameters") or {}]
    parts += [{"rope_theta": values["rope_theta"]}] if "rope_theta" in values else []
    for part in parts:
        if not isinstance(part, dict):
            raise TypeError(f"RoPE {part!r}")
        for key, value in part.items():
            key = "rope_type" if key == "type" else key
            require(
                key != "rope_type" or value in ("linear", "default"),
                f"{path} has rope_type {value!r}, and this model only 'default' and 'linear': "
                "choose a Llama without it.",
            )
            require(
                rope.setdefault(key, value) == value,
                f"{path} has {key} {rope[key]!r} and {value!r}: leave one of them.",
            )
    factor = rope["factor"] if rope.get("rope_type") == "linear" else 1.0
    # transformers takes the same base where the file gives none.
    return {"rope_base": rope.get("rope_theta", 10_000.0), "rope_factor": factor}


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds safetensors as transformers saves them, in one file or in several."""
    return safetensors_files.is_weights_folder(Path(folder))


def weights_sha256(folder: Path) -> str:
    """The SHA-256 of a folder's weights: of the one file, or of the joined hashes of several."""
    hashes = [file_sha256(file) for file in safetensors_files.weights_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def open_folder(folder: Path) -> tuple[LlamaConfig, Weights]:
    """Opens a Llama 2 that transformers or `export` saved, without reading its weights yet.

    Args:
      folder: a folder with config.json and with safetensors in fp32, bf16 or fp16, in one file or
        in several. The head may be tied to the embedding. If there is a `sha256.json`, as in
        exports, the files are compared with it.

    Returns:
      The model's config, and its weights as `Unread` leaves that give fp32. A tied head is read as
      a weight of its own, with the values of the embedding.

    Raises:
      UserError: a file differs from what was exported, the architecture is another, a file is
        damaged, or a tensor is missing, unknown or of another shape. Reading a weight later raises
        it for values that are not finite.
    """
    folder = Path(folder)
    _compare_hashes(folder)
    file = folder / "config.json"
    config, stored = config_from_hf(file), Stored(folder)
    tied = read_json(file).get("tie_word_embeddings", False)
    require(type(tied) is bool, f"{file} has tie_word_embeddings {tied!r}: make it true or false.")
    numbers = {name.split(".")[2] for name in stored.where if name.startswith("model.layers.")}
    require(
        config.layers == len(numbers),
        f"{file} has {config.layers} layers and the weights {len(numbers)}: download both again.",
    )
    # Older versions of transformers saved RoPE's frequencies, which follow from config.json.
    names = {name for name in stored.where if not name.endswith(".rotary_emb.inv_freq")}
    expected = {name: tensor.hf_shape for name, tensor in tensors(config).items()}
    for name in sorted((names ^ expected.keys()) - ({HEAD} if tied else set())):
        state = "is missing from" if name in expected else "is unknown in"
        raise UserError(f"Tensor {name} {state} {folder}: choose a Llama 2, or download it again.")
    for name in sorted(names):
        require(
            stored.shapes[name] == expected[name],
            f"Tensor {name} of {stored.where[name]} is {stored.shapes[name]} and {file} asks for "
            f"{expected[name]}: download both again.",
        )
    # transformers would ignore a stored head here and use the embedding. A different one is a
    # contradiction that no reader can resolve.
    if tied and HEAD in names:
        require(
            bool(np.array_equal(stored[EMBEDDING], stored[HEAD])),
            f"{file} says that {HEAD} is tied to the embedding, and the weights hold another: set "
            "tie_word_embeddings to what is true.",
        )

    def read(name: str) -> np.ndarray:
        return stored[EMBEDDING if tied and name == HEAD else name]

    return config, unread_tensors(config, read)


def _compare_hashes(folder: Path) -> None:
    """Raises `UserError` if a file of an export is not what was written.

    Folders from elsewhere have no hashes and pass.
    """
    if not (folder / HASHES).is_file():
        return
    hashes = read_json(folder / HASHES)
    needed = {"config.json", *(file.name for file in safetensors_files.weights_files(folder))}
    require(needed <= hashes.keys(), f"{folder / HASHES} is damaged: export the folder again.")
    for name, digest in hashes.items():
        file = folder / Path(name).name  # a name with folders in it must not lead elsewhere
        require(
            file.is_file() and file_sha256(file) == digest,
            f"{file} is not what was exported: export it again, or remove {HASHES} if the change "
            "is meant.",
        )


def load(folder: Path) -> tuple[LlamaConfig, Weights]:
    """Reads a folder as `open_folder` does, and all its weights into fp32 NumPy arrays.

    Raises:
      UserError: as `open_folder`, or a weight holds values that are not finite.
    """
    config, weights = open_folder(folder)
    return config, jax.tree.map(np.asarray, weights)


def verify_export(folder: Path) -> list[str]:
    """Reads everything in a folder, and the tokenizer if there is one, to find damage.

    Returns:
      A line for each fault, and none for a folder that is whole. Without a `sha256.json`, as in
      folders from elsewhere, a flipped bit that leaves a number finite is not noticed.
    """
    bad = []
    try:
        # One weight after the other, so that a model of any size can be checked.
        for weight in jax.tree.leaves(open_folder(folder)[1]):
            np.asarray(weight)
    except UserError as error:
        bad.append(str(error))
    try:
        if (folder / "tokenizer.model").exists():
            load_tokenizer(folder / "tokenizer.model")
    except UserError as error:
        bad.append(str(error))
    return bad


def check(folder: Path, config: LlamaConfig, weights: Weights, dtype: str = "float32") -> float:
    """Opens an exported folder with transformers and compares its logits with ours, in fp32.

    Args:
      folder: a folder that `export` wrote.
      config: the model that was exported.
      weights: the exported weights, as `llama.init_weights` returns them or as `Unread` leaves.
      dtype: the dtype of the export. Our weights are rounded to it too, so that what is left are
        differences of the computation.

    Returns:
      The largest absolute difference of a logit, over random tokens of the whole vocabulary.

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
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype).astype(jnp.float32), weights)
    apply = jax.jit(functools.partial(llama.apply, config))
    generator, largest = np.random.default_rng(0), 0.0
    # Several lengths, so that a mask or a position that is wrong for some of them is noticed.
    for length in sorted({min(length, config.context) for length in (1, 7, 64, 256)}):
        tokens_BT = generator.integers(config.vocab_size, size=(2, length))
        # GPUs multiply fp32 matrices in TF32 unless told otherwise, which keeps only 10 bits.
        with jax.default_matmul_precision("highest"):
            ours_BTV = np.asarray(apply(weights, tokens_BT))
        with torch.no_grad():
            theirs_BTV = model(torch.from_numpy(tokens_BT)).logits.numpy()
        largest = max(largest, float(np.abs(ours_BTV - theirs_BTV).max()))
    return largest
