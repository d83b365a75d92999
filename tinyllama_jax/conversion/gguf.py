"""Writes a model and its tokenizer as one GGUF file for llama.cpp, with the gguf package."""

import contextlib
from pathlib import Path

import numpy as np

from tinyllama_jax.config import LlamaConfig
from tinyllama_jax.conversion.huggingface import require_pieces, require_shapes
from tinyllama_jax.conversion.tensors import stream, tensors
from tinyllama_jax.conversion.tokenizer_json import read_pieces, special_tokens
from tinyllama_jax.errors import UserError, require
from tinyllama_jax.files import make_folder, written_aside
from tinyllama_jax.model.llama import Weights

MAGIC = b"GGUF"


def interleave(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a query or key matrix for llama.cpp's rotary positions.

    llama.cpp rotates the neighbours 2 i and 2 i + 1 of a head, Hugging Face and this project rotate
    i and i + H / 2. With queries and keys reordered alike, their products stay the same.

    Args:
      matrix: a matrix of shape (heads x H, D), in Hugging Face's layout.
      heads: the number of its heads.
    """
    halves = matrix.reshape(heads, 2, -1, matrix.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(matrix.shape)


def export_gguf(weights: Weights, config: LlamaConfig, tokenizer: Path, file: Path) -> None:
    """Writes a model and its tokenizer as one GGUF file.

    Matrices are fp16 and gains of norms fp32, as llama.cpp's own converter writes them. The file
    appears whole or not at all. An earlier GGUF file in its place is replaced.

    Args:
      weights: the tree that `llama.init_weights` returns, or one of `Unread` leaves.
      config: the model that the weights belong to.
      tokenizer: the sentencepiece model that the model was trained with.
      file: the file to write, whose name ends in `.gguf`.

    Raises:
      UserError: the gguf package is not installed, the weights are not finite in fp16 or do not fit
        the config, llama.cpp cannot express the tokenizer, the tokenizer has another number of
        pieces than the model, something other than a GGUF file is in the place, or the disk is
        full.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "Writing GGUF needs its package: pip install 'tinyllama-jax[gguf]'."
        ) from error
    file = file.resolve()
    require(file.suffix == ".gguf", f"{file} does not end in .gguf: give a file that does.")
    require_replaceable(file)
    names, scores, kinds, prefix = read_pieces(tokenizer)
    require_pieces(tokenizer, len(names), config)
    require_shapes(weights, config)
    make_folder(file.parent)

    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_name(file.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.swiglu_width)
    writer.add_head_count(config.query_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_base)
    if config.rope_factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)

    writer.add_tokenizer_model("llama")  # llama.cpp's name for sentencepiece BPE
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)  # llama.cpp numbers them as sentencepiece_model.proto does
    ids = special_tokens(tokenizer)
    writer.add_unk_token_id(ids["unk_token"])
    writer.add_bos_token_id(ids["bos_token"])
    writer.add_eos_token_id(ids["eos_token"])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(prefix)
    writer.add_remove_extra_whitespaces(False)

    # The header states every tensor's place in the file. All are announced first and written one by
    # one afterwards, so that a model of any size passes through memory in parts.
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.layers)
    for name, tensor in tensors(config).items():
        dtype = np.dtype(np.float32 if len(tensor.hf_shape) == 1 else np.float16)
        stem = gguf_names.get_name(name.removesuffix(".weight"))
        size = int(np.prod(tensor.hf_shape)) * dtype.itemsize
        writer.add_tensor_info(f"{stem}.weight", tensor.hf_shape, dtype, size)
    with written_aside(file) as aside:
        try:
            writer.write_header_to_file(aside)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, array in stream(weights, config, "float16", gains="float32"):
                if name.endswith("q_proj.weight"):
                    array = interleave(array, config.query_heads)
                elif name.endswith("k_proj.weight"):
                    array = interleave(array, config.kv_heads)
                writer.write_tensor_data(array)
                # Otherwise two tensors would be in memory while the next one is produced.
                del array
            writer.close()
        finally:
            # On a full disk closing fails as well, on what is still in its buffer.
            with contextlib.suppress(OSError):
                writer.close()


def require_replaceable(file: Path) -> None:
    """Raises `UserError` if `file` exists and is not a GGUF file."""
    if not file.exists():
        return
    cure = "choose another file, or move it away."
    require(file.is_file(), f"{file} is a folder: {cure}")
    with open(file, "rb") as existing:
        require(existing.read(len(MAGIC)) == MAGIC, f"{file} is no GGUF file: {cure}")
