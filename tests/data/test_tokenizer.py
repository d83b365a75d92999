"""Tokenizers: training one, opening one, and the bytes behind tokens."""

import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from support.models import VOCAB
from support.paths import GOLDEN
from support.tokenizers import STRINGS, document_of_1_mb
from tinyllama_jax import cli
from tinyllama_jax.data.tokenizer import BOS, EOS, UNK, ByteCounter, load_tokenizer, train_tokenizer
from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation.corpus import prepare_corpus
from tinyllama_jax.preparation.readers import Corpus


def test_a_trained_tokenizer_has_llamas_ids_and_loses_nothing(data):
    tokenizer = load_tokenizer(data.tokenizer)
    assert tokenizer.get_piece_size() == VOCAB
    assert [tokenizer.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    for text in ("  two  spaces ", "tab\tand\nnewline", "\U0001f600 \u4e2d\u6587 \x00", "a</s>b"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids), "special tokens in text stay text"


@pytest.mark.parametrize("which", ["own", "llama2"])
def test_a_preparation_encodes_as_bare_sentencepiece_does(which, data, request, tmp_path):
    """In batches and threads, from a file, whatever the text; special tokens in it stay text."""
    model = request.getfixturevalue("llama2") if which == "llama2" else Path(data.tokenizer)
    golden = (GOLDEN / "text.txt").read_text()
    documents = {
        "train": [*STRINGS.values(), document_of_1_mb(), golden * 20],
        "validation": [golden * 30],
    }
    for split, texts in documents.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{split}.jsonl").write_text(rows)
    corpus = Corpus({split: f"{split}.jsonl" for split in documents})
    manifest = prepare_corpus("odd", corpus, tmp_path, model, tmp_path / "d", processes=2)
    assert manifest and manifest["skipped"] == {"dropped": {"no text": 1}, "bad": []}

    processor, wanted = load_tokenizer(model), []
    for text in filter(None, documents["train"]):
        ids = processor.encode(text)
        assert not {UNK, BOS, EOS} & set(ids)
        wanted += [*ids, EOS]
    records = tfds.builder_from_directory(tmp_path / "d").as_data_source("train")
    found = np.concatenate([record["tokens"] for record in records])
    facts = manifest["splits"]["train"]
    assert len(wanted) == facts["tokens"] + facts["dropped_tokens"]
    np.testing.assert_array_equal(found, wanted[: len(found)])
    assert len(found) > len(wanted) - len(records[0]["tokens"]), "all but a tail"


def test_bytes_behind_tokens_are_the_texts_bytes(data):
    tokenizer = load_tokenizer(data.tokenizer)
    texts = ["Write aside, rename", "  indented\n\tcaf\u00e9 \U0001f600", "x", " led by a space"]
    row = [EOS]
    for text in texts:
        row += [*tokenizer.encode(text), EOS]
    assert ByteCounter(tokenizer)(np.array([row, row])) == 2 * sum(
        len(text.encode()) for text in texts
    )


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path / "none.model")


def zipped(content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../tokenizer.model", content)
    return archive.getvalue()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: b"",
        lambda whole: b"not a model",
        lambda whole: np.random.default_rng(0).bytes(5000),
        lambda whole: bytes(5000),
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: whole[1:],
        zipped,
        pickle.dumps,
        gzip.compress,
    ],
    ids="empty text random zeros half short late zip pickle gz".split(),
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused_in_a_sentence(spoil, data, tmp_path, capsys):
    (tmp_path / "t.model").write_bytes(spoil(Path(data.tokenizer).read_bytes()))
    options = ["--tokenizer", tmp_path / "t.model", "--source", tmp_path, "--out", tmp_path / "d"]
    assert cli.main(["prepare", "files", *map(str, options)]) == 2
    shown = capsys.readouterr().err
    assert "t.model is not a sentencepiece model" in shown and shown.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


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
