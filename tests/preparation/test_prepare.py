"""Datasets on disk."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from support.corpora import golden_documents
from tinyllama_jax.cli import main
from tinyllama_jax.data.format import read_manifest
from tinyllama_jax.data.rows import Rows
from tinyllama_jax.data.tokenizer import EOS, file_sha256, load_tokenizer
from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation import library
from tinyllama_jax.preparation.documents import SOURCES, SPLITS, passages
from tinyllama_jax.preparation.library import write_dataset
from tinyllama_jax.preparation.packing import Packer, pack


@pytest.fixture
def splits():
    return {split: golden_documents("prose", split) for split in ("train", "validation")}


def test_a_dataset_is_read_back_by_tfds_alone(data, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "SHARD_RECORDS", 3)
    manifest = write_dataset("prose", splits, data.tokenizer, tmp_path / "d")
    tokenizer = load_tokenizer(data.tokenizer)
    for split, documents in splits.items():
        wanted = list(pack([tokenizer.encode(d.text) for d in documents], Packer(400)))
        source = tfds.builder_from_directory(tmp_path / "d").as_data_source(split=split)
        assert len(source) == len(wanted) == manifest["splits"][split]["records"]
        for record, found in zip(wanted, source, strict=True):
            np.testing.assert_array_equal(found["tokens"], record)
    assert len(manifest["splits"]["train"]["shards"]) > 1


def test_the_manifest_tells_the_truth(data, splits, tmp_path):
    write_dataset("prose", splits, data.tokenizer, tmp_path / "d")
    manifest = read_manifest(tmp_path / "d")
    assert manifest["tokenizer"] == {"sha256": file_sha256(data.tokenizer), "pieces": 400}
    assert (manifest["bos"], manifest["eos"]) == (False, True)
    tokenizer = load_tokenizer(data.tokenizer)
    for split, facts in manifest["splits"].items():
        total = sum(len(tokenizer.encode(d.text)) + 1 for d in splits[split])
        assert facts["tokens"] + facts["dropped_tokens"] == total
        assert facts["documents"] == len(splits[split])
        for shard in facts["shards"]:
            assert file_sha256(tmp_path / "d" / shard["file"]) == shard["sha256"]


def test_preparing_twice_gives_the_same_bytes_and_leaves_the_first_alone(data, splits, tmp_path):
    for name in "ab":
        write_dataset("prose", splits, data.tokenizer, tmp_path / name)
    hashes = [
        {path.name: file_sha256(path) for path in (tmp_path / name).iterdir()} for name in "ab"
    ]
    assert hashes[0] == hashes[1]
    before = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns
    write_dataset("prose", splits, data.tokenizer, tmp_path / "a")
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == before


def test_another_text_does_not_overwrite_a_dataset(data, splits, tmp_path):
    write_dataset("prose", splits, data.tokenizer, tmp_path / "d")
    with pytest.raises(UserError, match="another text or tokenizer"):
        write_dataset("prose", splits | {"train": splits["validation"]}, data.tokenizer,
                      tmp_path / "d")  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_dataset_is_not_overwritten(data, splits, tmp_path, kind):
    out = tmp_path / "d"
    out.mkdir() if kind == "folder" else out.write_text("notes")
    with pytest.raises(UserError, match="no dataset: remove it"):
        write_dataset("prose", splits, data.tokenizer, out)
    assert out.exists()


def test_a_failure_leaves_nothing_behind(data, splits, tmp_path):
    class Documents(list):
        def __getitem__(self, index):
            raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        write_dataset("prose", splits | {"validation": Documents(splits["validation"])},
                      data.tokenizer, tmp_path / "d")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_llama_2s_tokenizer_is_taken_by_its_path(llama2, splits, tmp_path):
    # Its 32,000 pieces make longer tokens, so the text is doubled to fill a record.
    doubled = {split: list(documents) * 2 for split, documents in splits.items()}
    manifest = write_dataset("prose", doubled, llama2, tmp_path / "d")
    assert manifest["tokenizer"]["pieces"] == 32_000 and manifest["dtype"] == "uint16"
    rows = Rows(tmp_path / "d", "train", 2048, 32_000)
    text = load_tokenizer(llama2).decode(rows[0].tolist())
    assert doubled["train"][0].text[:200] in text


def test_no_held_out_passage_stands_in_the_demos_training_rows(tmp_path, capsys):
    """The whole way of `make train`: its tokenizer, its datasets, and the text behind the rows."""
    model = tmp_path / "tokenizer.model"
    assert main(["tokenizer", "stdlib", "--vocab-size", "4096", "--out", str(model)]) == 0
    assert main(["prepare", "stdlib", "--tokenizer", str(model), "--out", str(tmp_path)]) == 0
    tokenizer, found = load_tokenizer(model), {}
    for source, split in itertools.product(SOURCES, SPLITS):
        records = tfds.builder_from_directory(tmp_path / source).as_data_source(split=split)
        tokens = np.concatenate([record["tokens"] for record in records]).astype(int)
        documents = np.split(tokens, np.flatnonzero(tokens == EOS) + 1)
        texts = tokenizer.decode([document.tolist() for document in documents])
        found[source, split] = np.concatenate([passages(text) for text in texts])
    trained = np.sort(np.concatenate([found[source, "train"] for source in SOURCES]))
    for source in SOURCES:
        held_out = found[source, "validation"]
        assert len(held_out) > 50_000
        nearest = trained.take(np.searchsorted(trained, held_out), mode="clip")
        assert not (nearest == held_out).any()
    known = found["prose", "train"][:1000]
    assert (trained[np.searchsorted(trained, known)] == known).all(), (
        "the search finds what is there"
    )


def test_too_little_text_is_refused(data, splits, tmp_path):
    with pytest.raises(UserError, match="fewer than the 8,193"):
        write_dataset("prose", splits | {"validation": splits["validation"][:1]},
                      data.tokenizer, tmp_path / "d")  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_dataset_is_named(data, splits, tmp_path):
    with pytest.raises(UserError, match="no dataset"):
        read_manifest(tmp_path / "nowhere")
    folder = tmp_path / "d"
    write_dataset("prose", splits, data.tokenizer, folder)
    shard = next(Path(folder).glob("*train.array_record*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=shard.name):
        read_manifest(folder)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        read_manifest(folder)
    shard.write_bytes(whole)
    text = (folder / "manifest.json").read_text()
    for damaged in (text[:100], json.dumps({"splits": 3})):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            read_manifest(folder)
