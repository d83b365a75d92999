"""Files of token ids become datasets of the very ids, but for padding, and bad ones are named."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from support.corpora import CASES, packed_tokens
from tinyllama_jax import cli
from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation import token_files
from tinyllama_jax.preparation.readers import CORPORA, Tally, is_held_out
from tinyllama_jax.preparation.token_files import open_splits, read_token_documents

VOCAB = 400
TOKENS = CORPORA["tokens"]


def stream(seed: int, bos: bool, eos: bool, count: int = 40) -> list[int]:
    """Documents, some empty and some runs of padding among them."""
    rng, ids = np.random.default_rng(seed), []
    for _ in range(count):
        text = rng.integers(3, VOCAB, rng.integers(0, 30)).tolist()
        ids += [1] * bos + text + [2] * eos + [1] * int(rng.integers(0, 9) // 8 * 50)
    return ids


def documents(ids: list[int]) -> list[list[int]]:
    """A document begins with a bos or after an eos; those without text are left out."""
    found: list[list[int]] = [[]]
    for token in ids:
        if token == 1 or found[-1][-1:] == [2]:
            found.append([])
        found[-1].append(token)
    return [document for document in found if set(document) - {1, 2}]


def read(path: Path, on_error="stop", corpus=TOKENS):
    tally = Tally(on_error)
    found = read_token_documents(path.parent, path.name, corpus, tally, vocab_size=VOCAB)
    return [(ids.tolist(), key) for ids, key in found], tally


def npy(path: Path, ids, dtype: str) -> None:
    np.save(path, np.array(ids, dtype))


def raw(path: Path, ids, dtype: str) -> None:
    path.write_bytes(np.array(ids, dtype).tobytes())


KINDS = {
    "packed.bin": lambda path, ids: path.write_bytes(packed_tokens(ids)),
    "packed_wide.bin": lambda path, ids: path.write_bytes(packed_tokens(ids, code=4)),
    "true.npy": lambda path, ids: npy(path, ids, "<u2"),
    "wide.npy": lambda path, ids: npy(path, ids, ">i8"),
    "rows.npy": lambda path, ids: np.save(path, np.array(ids, "<i4")[None]),
    "nanogpt.bin": lambda path, ids: raw(path, ids, "<u2"),
    "olmo.npy": lambda path, ids: raw(path, ids, "<u2"),
    "wide.bin": lambda path, ids: raw(path, ids, "<u4"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("bos", "eos"), [(False, True), (True, False), (True, True)])
def test_every_kind_gives_the_ids_as_they_stand(tmp_path, monkeypatch, name, bos, eos):
    ids = stream(7, bos, eos)
    KINDS[name](tmp_path / name, ids)
    corpus = dataclasses.replace(TOKENS, raw_dtype="uint32" if name == "wide.bin" else "uint16")
    for block in (7, 64, 10_000):
        monkeypatch.setattr(token_files, "BLOCK", block)
        found, tally = read(tmp_path / name, corpus=corpus)
        wanted = documents(ids)
        assert [document for document, _ in found] == wanted
        kept = sum(wanted, [])
        assert tally.tokens == {
            "bos_tokens": kept.count(1),
            "eos_tokens": kept.count(2),
            "tokens_without_text": len(ids) - len(kept),
        }
        assert tally.bytes_read == (tmp_path / name).stat().st_size


def test_a_text_is_held_out_whatever_its_kind_of_file_and_its_bos_and_eos(tmp_path):
    keys = []
    for bos, eos in ((False, True), (True, False), (True, True)):
        raw(tmp_path / "a.bin", [1] * bos + [5, 300, 7] + [2] * eos, "<u2")
        npy(tmp_path / "b.npy", [1] * bos + [5, 300, 7] + [2] * eos, "<u4")
        keys += [key for name in ("a.bin", "b.npy") for _, key in read(tmp_path / name)[0]]
    assert len(keys) == 6 and set(keys) == {np.array([5, 300, 7], "<u4").tobytes()}


def test_a_stream_without_bos_and_eos_is_cut_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "BLOCK", 50)
    monkeypatch.setattr(token_files, "LARGEST_DOCUMENT", 120)
    ids = np.random.default_rng(0).integers(3, VOCAB, 1000).tolist()
    raw(tmp_path / "a.bin", ids, "<u2")
    found = [document for document, _ in read(tmp_path / "a.bin")[0]]
    assert sum(found, []) == ids and len(found) > 3 and max(map(len, found)) < 120 + 50


def test_the_dataset_is_the_stream_without_what_is_held_out(prepared, sources, tmp_path):
    manifest = prepared("tokens", group_bytes=10**9)
    share, wanted = CASES["tokens"].held_out_share, {"train": [], "validation": []}
    without_text = 0
    for path in sorted((sources / "tokens").iterdir()):
        ids = np.frombuffer(path.read_bytes()[24:], "<u2").tolist()
        without_text += len(ids)
        for document in documents(ids):  # which end with their file
            text = np.array([i for i in document if i > 2], "<u4").tobytes()
            wanted["validation" if is_held_out(text, share) else "train"] += document
            without_text -= len(document)
    for split, ids in wanted.items():
        records = tfds.builder_from_directory(tmp_path / "d").as_data_source(split)
        found = np.concatenate([record["tokens"] for record in records]).tolist()
        assert found == ids[: len(found)] and len(ids) - len(found) < 8193
        assert manifest["splits"][split]["dropped_tokens"] == len(ids) - len(found)
    assert (manifest["bos"], manifest["eos"]) == ("as found", "as found")
    assert manifest["tokens_without_text"] == without_text > 0
    assert manifest["eos_tokens"] == 300 and manifest["bos_tokens"] == 0


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.bin", b"", "is empty"),
        ("a.bin", packed_tokens([]), "is empty"),
        ("a.bin", packed_tokens([5] * 9)[:20], "ends within its header"),
        ("a.bin", packed_tokens([5] * 9)[:-1], "has 41 bytes, not those of the 9 ids"),
        ("a.bin", packed_tokens([5] * 9) + b"\0\0", "has 44 bytes, not those of the 9 ids"),
        ("a.bin", packed_tokens([5], version=2), "is packed in version 2"),
        ("a.bin", packed_tokens([5], code=7), "has the dtype code 7"),
        ("a.bin", packed_tokens([5], code=9), "has the dtype code 9"),
        ("a.bin", b"\5\0\6", "ends within an id of 2 bytes"),
        ("a.bin", np.arange(3, 103, dtype="<u4").tobytes(), "seems to hold ids of 4 bytes"),
        ("a.npy", b"\x93NUMPY\1\0", "is no whole array"),
    ],
)
def test_a_bad_file_stops_or_is_left_out_and_named(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} {reason}.*--on-error skip"):
        read(tmp_path / name)
    found, tally = read(tmp_path / name, "skip")
    ((file, said),) = tally.bad
    assert found == [] and file == name and said.startswith(reason)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.ones(9), "holds no row of integers, but float64"),
        (np.asfortranarray(np.ones((3, 3), "<u2")), "in 2 dimensions"),
        (np.array([{}], object), "is no whole array"),  # a pickle
        (np.empty(0, "<u2"), "is empty"),
    ],
)
def test_arrays_of_no_ids_are_named(tmp_path, array, reason):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=reason):
        read(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.full(9, 5))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match="is no whole array"):
        read(tmp_path / "b.npy")


def test_an_id_outside_the_vocabulary_is_named_by_its_place(tmp_path):
    ids = [*[7] * 10, 2, 8, VOCAB, 9, 2, 9, 2]
    raw(tmp_path / "a.bin", ids, "<u2")
    npy(tmp_path / "b.npy", [VOCAB - 1, 2, 5, -1], "<i4")
    with pytest.raises(UserError, match="a.bin, row 2, .*vocabulary of 400 .token 13 of.* is 400"):
        read(tmp_path / "a.bin")
    with pytest.raises(UserError, match="b.npy, row 2, .*vocabulary of 400 .token 4 of.* is -1"):
        read(tmp_path / "b.npy")
    found, tally = read(tmp_path / "a.bin", "skip")
    assert [document for document, _ in found] == [[*[7] * 10, 2], [9, 2]]
    assert [facts["rows"] for facts in tally.bad.values()] == [1]


def test_the_names_of_files_tell_their_splits(tmp_path):
    def layout(*names):
        folder = tmp_path / "-".join(names).replace("/", "_")
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            raw(folder / name, [5, 2], "<u2")
        return open_splits(TOKENS, folder)

    assert layout("a.bin", "train.bin", "trainval/b.bin") == TOKENS
    by_name = layout("train.bin", "val.bin")
    assert by_name == layout("x/train_slim_0.bin", "validation_slim_0.bin")
    tested = layout("x/train_0.bin", "y/test_0.npy")
    assert tested.splits == {"train": "**/train*", "test": "**/test*"}
    assert tested.held_out_share == TOKENS.held_out_share
    by_folder = layout("train/0.npy", "validation/0.npy")
    assert by_name.held_out_share == by_folder.held_out_share == 0
    assert by_name.splits["validation"] == "**/val*"
    assert by_folder.splits["validation"] == "val*/**/*"
    with pytest.raises(UserError, match="part-0.npy is of no split"):
        layout("train.bin", "val.bin", "part-0.npy")
    with pytest.raises(UserError, match="none of train"):
        layout("val.bin")


def test_the_command_reads_train_and_val(data, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "d"
    source.mkdir()
    for seed, name in enumerate(("train", "val")):
        raw(source / f"{name}.bin", stream(seed, False, True, 2000), "<u4")
    options = {"--source": source, "--tokenizer": data.tokenizer, "--out": out}
    command = ["prepare", "tokens", *map(str, sum(options.items(), ()))]
    assert cli.main(command) == 2
    assert "--dtype uint32" in capsys.readouterr().err
    assert cli.main([*command, "--dtype", "uint32", "--held-out", "0.1"]) == 2
    assert "has files of validation: leave --held-out out" in capsys.readouterr().err
    assert cli.main([*command, "--dtype", "uint32"]) == 0
    assert "eos found" in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["held_out_share"] == 0 and manifest["raw_dtype"] == "uint32"
    assert manifest["field"] is None and "text_bytes" not in manifest
    assert cli.main(["verify", str(out)]) == 0


@pytest.mark.parametrize("separated", [True, False])
def test_memory_stays_flat(tmp_path, separated):
    block = np.random.default_rng(0).integers(3, VOCAB, 2**20).astype("<u2")
    if separated:
        block[:: 2**12] = 2
    with open(tmp_path / "a.bin", "wb") as file:
        for _ in range(64):
            file.write(block.tobytes())
    tracemalloc.start()
    tally = Tally("stop")
    tokens = sum(
        len(ids)
        for ids, _ in read_token_documents(tmp_path, "a.bin", TOKENS, tally, vocab_size=VOCAB)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens + tally.tokens["tokens_without_text"] == 64 * 2**20
    assert peak < 50e6 < (tmp_path / "a.bin").stat().st_size
