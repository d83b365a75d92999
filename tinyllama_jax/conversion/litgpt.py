"""Reads the checkpoints of the original TinyLlama, which are `.pth` files of lit-gpt.

Their weights have other names than ours, and query, key and value are fused into one matrix.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.config import LlamaConfig
from tinyllama_jax.conversion.tensors import tensors, unread_tensors
from tinyllama_jax.errors import UserError, first_line, require
from tinyllama_jax.model.llama import Weights

# Our path -> lit-gpt's name (TinyLlama's lit_gpt/model.py).
QKV = "transformer.h.{}.attn.attn.weight"
LITGPT_NAMES = {
    "embedding_VD": "transformer.wte.weight",
    "blocks.attention_norm_D": "transformer.h.{}.norm_1.weight",
    "blocks.query_DNH": QKV,
    "blocks.key_DKH": QKV,
    "blocks.value_DKH": QKV,
    "blocks.output_NHD": "transformer.h.{}.attn.proj.weight",
    "blocks.swiglu_norm_D": "transformer.h.{}.norm_2.weight",
    "blocks.gate_DF": "transformer.h.{}.mlp.swiglu.w1.weight",
    "blocks.up_DF": "transformer.h.{}.mlp.swiglu.w2.weight",
    "blocks.down_FD": "transformer.h.{}.mlp.swiglu.w3.weight",
    "norm_D": "transformer.ln_f.weight",
    "head_DV": "lm_head.weight",
}


def split_qkv(qkv: np.ndarray, config: LlamaConfig) -> dict[str, np.ndarray]:
    """Splits the fused matrix of a layer into query, key and value.

    Args:
      qkv: a matrix of shape ((N + 2 K) H, D).
      config: the model that it belongs to.

    Returns:
      Our paths -> matrices of shape (heads x H, D).
    """
    # The matrix is not all queries, then all keys, then all values: the rows of each kv head stand
    # together, first those of its query heads, then its key, then its value.
    N, K, H, D = config.query_heads, config.kv_heads, config.head_width, config.width
    groups_KMHD = qkv.reshape(K, N // K + 2, H, D)
    return {
        "blocks.query_DNH": groups_KMHD[:, :-2].reshape(N * H, D),
        "blocks.key_DKH": groups_KMHD[:, -2].reshape(K * H, D),
        "blocks.value_DKH": groups_KMHD[:, -1].reshape(K * H, D),
    }


def open_litgpt(file: Path, config: LlamaConfig) -> Weights:
    """Opens a `.pth` of the original without reading its weights yet.

    Args:
      file: a file in the format of torch 1.6 and later. It holds the weights, or a training state
        with the weights under the key `model`. Only tensors and plain values are unpickled.
      config: the model that was trained, which the file does not say.

    Returns:
      The tree that `llama.init_weights` returns, with `Unread` leaves that give fp32.

    Raises:
      UserError: torch is not installed, the file is damaged, of an older format or holds other
        objects, or a tensor is missing, unknown or of another shape or dtype.
    """
    require(file.is_file(), f"There is no file {file}.")
    require(
        zipfile.is_zipfile(file),
        f"{file} is no checkpoint that torch 1.6 or later saved, or it is cut off: download it "
        "again, or open it with the torch that wrote it and save it anew.",
    )
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "Reading a .pth needs torch: pip install 'tinyllama-jax[torch]'."
        ) from error
    try:
        # `weights_only` refuses to unpickle code. With `mmap` a tensor is read when it is used, so
        # that the file need not fit into memory, nor the optimizer state be read at all.
        checkpoint: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise UserError(
            f"{file} is damaged, or holds more than tensors, which could run anything "
            f"({first_line(error)[:150]}): download it again, or save its weights alone."
        ) from error
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("model"), dict):
        checkpoint = checkpoint["model"]
    require(isinstance(checkpoint, dict), f"{file} holds no weights by name: give another file.")

    shapes: dict[str, tuple[int, ...]] = {}
    paths: dict[str, tuple[str, str]] = {}
    heads = config.query_heads + 2 * config.kv_heads
    for name, tensor in tensors(config).items():
        # In Hugging Face's name model.layers.N, the third part is the layer. Names outside layers
        # have none, and then nothing is formatted.
        litgpt = LITGPT_NAMES[tensor.path].format(*name.split(".")[2:3])
        paths[name] = (tensor.path, litgpt)
        fused = LITGPT_NAMES[tensor.path] == QKV
        shapes[litgpt] = (heads * config.head_width, config.width) if fused else tensor.hf_shape
    for name in sorted(map(str, checkpoint.keys() ^ shapes.keys())):
        state = "is missing from" if name in shapes else "is unknown in"
        raise UserError(f"Tensor {name} {state} {file}: give the config that it was trained with.")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for name, shape in shapes.items():
        tensor = checkpoint[name]
        require(
            isinstance(tensor, torch.Tensor)
            and tuple(tensor.shape) == shape
            and tensor.dtype in dtypes,
            f"Tensor {name} of {file} is {getattr(tensor, 'dtype', type(tensor).__name__)} "
            f"{tuple(getattr(tensor, 'shape', ()))}, not {shape} in fp32, bf16 or fp16: give the "
            "config that it was trained with.",
        )

    def read(name: str) -> np.ndarray:
        path, litgpt = paths[name]
        array = checkpoint[litgpt].to(torch.float32).numpy()
        require(
            bool(np.isfinite(array).all()),
            f"Tensor {litgpt} of {file} holds values that are not finite: take another checkpoint.",
        )
        return split_qkv(array, config)[path] if LITGPT_NAMES[path] == QKV else array

    return unread_tensors(config, read)
