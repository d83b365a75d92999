"""A GGUF file holds the weights and the tokenizer as llama.cpp reads them."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from support.exports import changed
from support.models import ODD
from tinyllama_jax.conversion.gguf import export_gguf
from tinyllama_jax.data.tokenizer import load_tokenizer
from tinyllama_jax.errors import UserError

# llama.cpp's names of what each of our weights is.
NAMES = {
    "embedding_VD": "token_embd.weight",
    "blocks.attention_norm_D": "blk.{}.attn_norm.weight",
    "blocks.query_DNH": "blk.{}.attn_q.weight",
    "blocks.key_DKH": "blk.{}.attn_k.weight",
    "blocks.value_DKH": "blk.{}.attn_v.weight",
    "blocks.output_NHD": "blk.{}.attn_output.weight",
    "blocks.swiglu_norm_D": "blk.{}.ffn_norm.weight",
    "blocks.gate_DF": "blk.{}.ffn_gate.weight",
    "blocks.up_DF": "blk.{}.ffn_up.weight",
    "blocks.down_FD": "blk.{}.ffn_down.weight",
    "norm_D": "output_norm.weight",
    "head_DV": "output.weight",
}


@pytest.fixture
def read(weights, small_tokenizer, tmp_path):
    def read(config=ODD):
        file = tmp_path / "model.gguf"
        export_gguf(weights, config, small_tokenizer, file)
        return gguf.GGUFReader(file)

    return read


def test_the_weights_come_back_with_the_permutation_undone(read, weights):
    stored = {tensor.name: tensor.data for tensor in read().tensors}
    D, H = ODD.width, ODD.head_width
    for path, name in NAMES.items():
        whole = weights
        for key in path.split("."):
            whole = whole[key]
        for layer in range(ODD.layers if "{}" in name else 1):
            ours = np.asarray(whole[layer] if "{}" in name else whole)
            found = np.array(stored.pop(name.format(layer)))
            if ours.ndim == 1:
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, ours)
                continue
            assert found.dtype == np.float16
            ours = ours.astype(np.float16)
            if path in ("blocks.query_DNH", "blocks.key_DKH"):
                # Row 2 i of a head is our i, row 2 i + 1 our i + H / 2.
                heads = found.reshape(-1, H, D)
                half = H // 2
                found = np.empty_like(heads)
                found[:, :half], found[:, half:] = heads[:, 0::2], heads[:, 1::2]
            if path == "blocks.output_NHD":
                ours = ours.reshape(-1, D)
            wanted = ours if path == "embedding_VD" else ours.reshape(ours.shape[0], -1).T
            np.testing.assert_array_equal(found.reshape(wanted.shape), wanted, err_msg=name)
    assert not stored


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_config_is_told_in_llama_cpps_words(factor, read):
    fields = read(dataclasses.replace(ODD, rope_factor=factor)).fields
    found = {key: field.contents() for key, field in fields.items()}
    scaling = {
        "llama.rope.scaling.type": None if factor == 1 else "linear",
        "llama.rope.scaling.factor": None if factor == 1 else factor,
    }
    wanted = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": ODD.layers,
        "llama.context_length": ODD.context,
        "llama.embedding_length": ODD.width,
        "llama.feed_forward_length": ODD.swiglu_width,
        "llama.attention.head_count": ODD.query_heads,
        "llama.attention.head_count_kv": ODD.kv_heads,
        "llama.attention.key_length": ODD.head_width,
        "llama.attention.value_length": ODD.head_width,
        "llama.attention.layer_norm_rms_epsilon": np.float32(ODD.norm_eps),
        "llama.rope.dimension_count": ODD.head_width,
        "llama.rope.freq_base": ODD.rope_base,
        "llama.vocab_size": ODD.vocab_size,
        **scaling,
    }
    assert {key: found.get(key) for key in wanted} == wanted


def test_the_tokenizer_is_sentencepieces(read, small_tokenizer):
    found = {key: field.contents() for key, field in read().fields.items()}
    tokenizer = load_tokenizer(small_tokenizer)
    ids = range(tokenizer.get_piece_size())
    assert found["tokenizer.ggml.tokens"] == [tokenizer.id_to_piece(index) for index in ids]
    scores = [np.float32(tokenizer.get_score(index)) for index in ids]
    assert found["tokenizer.ggml.scores"] == scores
    kinds = {
        gguf.TokenType.UNKNOWN: tokenizer.is_unknown,
        gguf.TokenType.CONTROL: tokenizer.is_control,
        gguf.TokenType.BYTE: tokenizer.is_byte,
    }
    for index, kind in zip(ids, found["tokenizer.ggml.token_type"], strict=True):
        is_kind = {name: test(index) for name, test in kinds.items()}
        assert kind == next((name for name, test in is_kind.items() if test), 1)
    assert {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }.items() <= found.items()


def test_a_refused_export_leaves_what_stood_there(weights, small_tokenizer, tmp_path):
    file = tmp_path / "model.gguf"
    large = changed(weights, "head_DV", weights["head_DV"].at[2, 3].set(1e5))
    for edited, config, where, words in (
        (large, ODD, file, "head_DV holds values too large for float16"),
        (weights, dataclasses.replace(ODD, vocab_size=601), file, "600 pieces"),
        (weights, ODD, tmp_path / "model.bin", "does not end in .gguf"),
    ):
        with pytest.raises(UserError, match=words):
            export_gguf(edited, config, small_tokenizer, where)
        assert not list(tmp_path.iterdir())
    file.write_text("mine")
    with pytest.raises(UserError, match="no GGUF file"):
        export_gguf(weights, ODD, small_tokenizer, file)
    assert file.read_text() == "mine"


def test_an_earlier_file_is_replaced(read, weights, small_tokenizer, tmp_path):
    read()
    other = jax.tree.map(lambda leaf: leaf + 1, weights)
    export_gguf(other, ODD, small_tokenizer, tmp_path / "model.gguf")
    norm = next(
        tensor.data
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
        if tensor.name == "output_norm.weight"
    )
    np.testing.assert_array_equal(norm, np.asarray(other["norm_D"]))
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
