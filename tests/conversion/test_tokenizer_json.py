"""The ids of transformers, opened on an exported folder, are the ids of sentencepiece."""

import dataclasses
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece

from support.tokenizers import STRINGS, document_of_1_mb, train
from tinyllama_jax.config import DEMO
from tinyllama_jax.conversion import huggingface, tokenizer_json
from tinyllama_jax.errors import UserError
from tinyllama_jax.model import llama


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tokenizer") / "small.model")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 500},
        {"byte_fallback": False, "vocab_size": 300},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["<user>"]},
        {"eos_id": -1},
    ],
    ids=str,
)
def test_tokenizer_json_refuses_what_it_cannot_express(options, tmp_path):
    file = train(tmp_path / "odd.model", **options)
    with pytest.raises(UserError, match=next(iter(options)).removesuffix("_id")):
        tokenizer_json.tokenizer_json(file)


def test_tokenizer_json_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no sentencepiece model"):
        tokenizer_json.tokenizer_json(Path(__file__))
    with pytest.raises(UserError, match="There is no tokenizer"):
        tokenizer_json.tokenizer_json(tmp_path / "nowhere.model")


def rewrite(source, target, edit):
    """The sentencepiece model `source` with its list of [name, score, kind] changed by `edit`."""

    def varint(number):
        more = number > 0x7F
        return bytes([number & 0x7F | more << 7]) + (varint(number >> 7) if more else b"")

    def message(number, content):
        return varint(number << 3 | 2) + varint(len(content)) + content

    fields = list(tokenizer_json.protobuf_fields(source.read_bytes()))
    raw = [{3: 1, **dict(tokenizer_json.protobuf_fields(value))} for n, value in fields if n == 1]
    pieces = [[piece[1], struct.unpack("<f", piece[2])[0], piece[3]] for piece in raw]
    edit(pieces)
    written = [
        message(1, message(1, name) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))
        for name, score, kind in pieces
    ]
    others = [message(n, value) for n, value in fields if n != 1]
    target.write_bytes(b"".join(written + others))
    return target


def test_merges_are_ordered_by_score_and_not_by_id(small_tokenizer, tmp_path):
    def swap(pieces):
        pieces[270], pieces[400] = pieces[400], pieces[270]

    before = tokenizer_json.tokenizer_json(small_tokenizer)["model"]
    after = tokenizer_json.tokenizer_json(rewrite(small_tokenizer, tmp_path / "new", swap))["model"]
    assert before["vocab"] != after["vocab"]
    assert before["merges"] == after["merges"]


def test_tokenizer_json_refuses_pieces_whose_merges_would_differ(small_tokenizer, tmp_path):
    names = list(tokenizer_json.tokenizer_json(small_tokenizer)["model"]["vocab"])

    def tie(pieces):
        pieces[names.index("he")][1] = pieces[names.index("in")][1]

    def drop(pieces):
        pieces[names.index("q")][0] = "\u00b6".encode()

    for edit, named in ((tie, "score of its own"), (drop, "piece for every character")):
        with pytest.raises(UserError, match=named):
            tokenizer_json.tokenizer_json(rewrite(small_tokenizer, tmp_path / "new", edit))


@pytest.mark.torch
def test_runs_of_spaces_of_one_score_merge_alike(small_tokenizer, tmp_path):
    """Llama 2 gives every run of spaces the same score, far below all others."""
    from transformers import AutoTokenizer

    def level(pieces):
        for piece in pieces:
            if set(piece[0].decode()) == {"\u2581"}:
                piece[1] = -1e9

    file = rewrite(small_tokenizer, tmp_path / "level.model", level)
    processor, transformed = open_both(file, tmp_path / "model", AutoTokenizer)
    runs = [text + " " * n + "return" for text in ("", "x", "\n") for n in range(80)]
    assert transformed(runs)["input_ids"] == processor.encode(runs)


@pytest.fixture(scope="module", params=["small", "llama2"])
def both_tokenizers(request, small_tokenizer, tmp_path_factory):
    """sentencepiece's tokenizer, and the folder as a user of transformers opens it."""
    from transformers import AutoTokenizer

    file = small_tokenizer
    if request.param == "llama2":
        file = request.getfixturevalue("llama2")
    return open_both(file, tmp_path_factory.mktemp(request.param) / "model", AutoTokenizer)


def open_both(file, folder, auto):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    config = dataclasses.replace(DEMO, vocab_size=processor.get_piece_size(), context=8192)
    weights = jax.tree.map(lambda leaf: np.zeros(leaf.shape), llama.abstract_weights(config))
    huggingface.export(weights, config, file, folder)
    return processor, auto.from_pretrained(folder)


@pytest.mark.torch
def test_transformers_encodes_as_sentencepiece_does(both_tokenizers):
    processor, transformed = both_tokenizers
    wrong = {
        name: (processor.encode(text), ids)
        for name, text in STRINGS.items()
        if (ids := transformed(text)["input_ids"]) != processor.encode(text)
    }
    assert not wrong
    assert transformed(list(STRINGS.values()))["input_ids"] == processor.encode([*STRINGS.values()])


@pytest.mark.torch
@pytest.mark.parametrize("both_tokenizers", ["small"], indirect=True)
def test_transformers_encodes_a_document_of_1_mb_as_sentencepiece_does(both_tokenizers):
    processor, transformed = both_tokenizers
    text = document_of_1_mb()
    assert transformed(text, verbose=False)["input_ids"] == processor.encode(text)


@pytest.mark.torch
def test_transformers_decodes_as_sentencepiece_does(both_tokenizers):
    processor, transformed = both_tokenizers
    ids = {name: processor.encode(text) for name, text in STRINGS.items()}
    wrong = {
        name: (processor.decode(ids[name]), text)
        for name in STRINGS
        if (text := transformed.decode(ids[name])) != processor.decode(ids[name])
    }
    assert not wrong
    # The word boundary itself comes back as a space, in both.
    same = [name for name in STRINGS if transformed.decode(ids[name]) == STRINGS[name]]
    assert len(STRINGS) - len(same) == sum("\u2581" in text for text in STRINGS.values())


@pytest.mark.torch
def test_runs_of_every_character_merge_alike(both_tokenizers):
    """Equal pieces side by side: the order of merges of one score decides."""
    processor, transformed = both_tokenizers
    runs = [character * n for character in " =-*#_.ao0e\n" for n in range(1, 120)]
    assert transformed(runs)["input_ids"] == processor.encode(runs)


@pytest.mark.torch
def test_special_tokens_keep_their_ids(both_tokenizers):
    processor, transformed = both_tokenizers
    assert transformed.unk_token_id == processor.unk_id()
    assert transformed.bos_token_id == processor.bos_id()
    assert transformed.eos_token_id == processor.eos_id()
    assert len(transformed) == processor.get_piece_size()
    ids = [processor.bos_id(), *processor.encode("Hello"), processor.eos_id()]
    assert transformed.decode(ids, skip_special_tokens=True) == "Hello"


@pytest.mark.torch
def test_a_tokenizer_without_dummy_prefix_stays_without(tmp_path):
    from transformers import AutoTokenizer

    file = train(tmp_path / "bare.model", add_dummy_prefix=False)
    processor, transformed = open_both(file, tmp_path / "model", AutoTokenizer)
    assert processor.decode(processor.encode(" a")) == " a"
    for text in STRINGS.values():
        assert transformed(text)["input_ids"] == processor.encode(text)
        assert transformed.decode(processor.encode(text)) == processor.decode(
            processor.encode(text)
        )
