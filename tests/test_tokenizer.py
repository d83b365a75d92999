"""Tokenizers: training one, opening one, and the bytes behind tokens."""

import numpy as np
import pytest
from conftest import GOLDEN, VOCAB

from tinyllama_jax.config import UserError
from tinyllama_jax.data.tokenizer import EOS, ByteCounter, load_tokenizer, train_tokenizer


def test_a_trained_tokenizer_has_llamas_ids_and_loses_nothing(data):
    tokenizer = load_tokenizer(data.tokenizer)
    assert tokenizer.get_piece_size() == VOCAB
    assert [tokenizer.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    for text in ("  two  spaces ", "tab\tand\nnewline", "\U0001f600 \u4e2d\u6587 \x00", "a</s>b"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids), "special tokens in text stay text"


def test_bytes_behind_tokens_are_the_texts_bytes(data):
    tokenizer = load_tokenizer(data.tokenizer)
    texts = ["Write aside, rename", "  indented\n\tcaf\u00e9 \U0001f600", "x", " led by a space"]
    row = [EOS]
    for text in texts:
        row += [*tokenizer.encode(text), EOS]
    assert ByteCounter(tokenizer)(np.array([row, row])) == 2 * sum(
        len(text.encode()) for text in texts
    )


def test_a_missing_or_foreign_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "text.model")


def test_too_little_text_is_refused_and_nothing_is_written(tmp_path):
    for texts in ([], ["abc"]):
        with pytest.raises(UserError, match="smaller --vocab-size"):
            train_tokenizer(texts, 4096, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_named_and_nothing_is_written(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        train_tokenizer([(GOLDEN / "text.txt").read_text()], VOCAB, tmp_path / "data")
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]


def test_training_is_deterministic(data, tmp_path):
    train_tokenizer([(GOLDEN / "text.txt").read_text()], VOCAB, tmp_path / "again.model")
    with open(data.tokenizer, "rb") as first, open(tmp_path / "again.model", "rb") as again:
        assert first.read() == again.read()
