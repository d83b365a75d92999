"""Documents in memory become datasets, and what two of them share is found and cut."""

import dataclasses
import random

import numpy as np
import pytest
import tensorflow_datasets as tfds

from support.corpora import golden_documents
from tinyllama_jax.data.format import read_manifest
from tinyllama_jax.data.rows import Rows
from tinyllama_jax.data.tokenizer import file_sha256, load_tokenizer
from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation import corpus, workers
from tinyllama_jax.preparation.documents import (
    PASSAGE,
    SHORTEST_PIECE,
    Document,
    passages,
    prepare_documents,
    without_passages,
)
from tinyllama_jax.preparation.packing import Packer, pack
from tinyllama_jax.preparation.verify import verify_dataset


@pytest.fixture
def splits():
    return {split: golden_documents("prose", split) for split in ("train", "validation")}


def test_the_records_are_the_documents_in_order(data, splits, tmp_path):
    manifest = prepare_documents("prose", splits, data.tokenizer, tmp_path / "d")
    tokenizer = load_tokenizer(data.tokenizer)
    for split, documents in splits.items():
        wanted = list(pack([tokenizer.encode(d.text) for d in documents], Packer(400)))
        source = tfds.builder_from_directory(tmp_path / "d").as_data_source(split=split)
        assert len(source) == len(wanted) == manifest["splits"][split]["records"]
        for record, found in zip(wanted, source, strict=True):
            np.testing.assert_array_equal(found["tokens"], record)


def test_the_manifest_tells_the_truth(data, splits, tmp_path):
    prepare_documents("prose", splits, data.tokenizer, tmp_path / "d")
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
    texts = [document.text for documents in splits.values() for document in documents]
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert verify_dataset(tmp_path / "d") == []


def test_preparing_twice_gives_the_same_bytes_and_leaves_the_first_alone(data, splits, tmp_path):
    for name, processes in (("a", 1), ("b", 2)):
        prepare_documents("prose", splits, data.tokenizer, tmp_path / name, processes=processes)
    hashes = [
        {path.name: file_sha256(path) for path in (tmp_path / name).iterdir()} for name in "ab"
    ]
    assert hashes[0] == hashes[1]
    before = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns
    prepare_documents("prose", splits, data.tokenizer, tmp_path / "a")
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == before


def test_an_interrupted_preparation_goes_on_with_what_is_there(data, splits, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    def write_group(*_):
        pytest.fail("the groups had been written")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus, "join_groups", interrupt)
        prepare_documents("prose", splits, data.tokenizer, tmp_path / "d")
    monkeypatch.setattr(workers, "write_group", write_group)
    prepare_documents("prose", splits, data.tokenizer, tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_another_text_of_the_same_length_does_not_pass_for_the_dataset(data, splits, tmp_path):
    prepare_documents("prose", splits, data.tokenizer, tmp_path / "d")
    first, *others = splits["train"]
    other = dataclasses.replace(first, text=first.text.swapcase())
    with pytest.raises(UserError, match="made from other files, options or tokenizer"):
        prepare_documents(
            "prose", splits | {"train": [other, *others]}, data.tokenizer, tmp_path / "d"
        )


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_dataset_is_not_overwritten(data, splits, tmp_path, kind):
    out = tmp_path / "d"
    out.mkdir() if kind == "folder" else out.write_text("notes")
    with pytest.raises(UserError, match="no dataset: remove it"):
        prepare_documents("prose", splits, data.tokenizer, out)
    assert out.exists()


def test_too_little_text_is_refused(data, splits, tmp_path):
    short = splits | {"validation": splits["validation"][:1]}
    with pytest.raises(UserError, match="prose/validation has .* fewer than the 8,193"):
        prepare_documents("prose", short, data.tokenizer, tmp_path / "d")


def test_llama_2s_tokenizer_is_taken_by_its_path(llama2, splits, tmp_path):
    # Its 32,000 pieces make longer tokens, so the text is doubled to fill a record.
    doubled = {split: documents * 2 for split, documents in splits.items()}
    manifest = prepare_documents("prose", doubled, llama2, tmp_path / "d")
    assert manifest["tokenizer"]["pieces"] == 32_000 and manifest["dtype"] == "uint16"
    rows = Rows(tmp_path / "d", "train", 2048, 32_000)
    text = load_tokenizer(llama2).decode(rows[0].tolist())
    assert doubled["train"][0].text[:200] in text


def random_text(seed, length):
    return "".join(random.Random(seed).choices("abcdefgh ijé€😀", k=length))


def test_what_a_document_shares_with_training_is_cut_out_of_it():
    shared = random_text(0, 150)
    before, after = random_text(1, 300), random_text(2, 300)
    training = random_text(3, 500) + shared + random_text(4, 500)
    document = Document("module", f"{before}\n{shared}\n{after}")
    trained = np.sort(passages(training))
    assert without_passages(document, trained) == [
        Document("module#1", before),
        Document("module#2", after),
    ]
    # Partial lines go with the cut, and so do pieces that are too short to be a document.
    beside = Document("module", f"{before}\nbeside {shared} it\n{after[: SHORTEST_PIECE - 1]}")
    assert without_passages(beside, trained) == [Document("module#1", before)]
    lines = random_text(6, 140) + "\nlast line"
    across = Document("module", f"{before}\n{lines}\n{after}")
    assert without_passages(across, np.sort(passages(f"<{lines}>"))) == [
        Document("module#1", before),
        Document("module#2", after),
    ]
    alone = Document("module", before)
    assert without_passages(alone, trained) == [alone]
    assert without_passages(Document("module", shared), trained) == []


@pytest.mark.parametrize("length", [PASSAGE - 1, PASSAGE])
def test_cut_begins_at_a_passage_and_no_sooner(length):
    shared = random_text(0, length)
    document = Document("module", f"{random_text(1, 300)}<\n{shared}\n>{random_text(2, 300)}")
    pieces = without_passages(document, np.sort(passages(f"[{shared}]")))
    assert len(pieces) == (2 if length == PASSAGE else 1)


@pytest.mark.parametrize("length", [1, 6, 7, 64, 100])
def test_windows_are_equal_where_their_numbers_are(length):
    text = random_text(5, 400) * 2 + "ab" * 200
    windows = [text[at : at + length] for at in range(len(text) - length + 1)]
    numbers = passages(text, length).tolist()
    assert len(numbers) == len(windows)
    pairs = set(zip(windows, numbers, strict=True))
    assert len(pairs) == len(set(windows)) == len(set(numbers))
    assert passages(windows[3], length).tolist() == [numbers[3]]
    assert len(passages(text[: length - 1], length)) == 0
