"""Every format gives the same documents, and nothing is left out without a count."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation import readers
from tinyllama_jax.preparation.readers import (
    CORPORA,
    Corpus,
    Tally,
    is_held_out,
    list_files,
    read_documents,
    suffix,
)

TEXTS = ["One.\n", "Zwei: äöü\r\n", "三\0 \u2028 lines", "\n", "def f():\n\treturn 1\n" * 500]


def zst(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder: Path, name: str, texts=TEXTS) -> str:
    """A file of the format that its name says, with these documents."""
    path, rows = folder / name, jsonl({"text": text} for text in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=2)
    else:
        # Two frames, as what was compressed in pieces has.
        both = {".jsonl.zst": zst, ".jsonl.gz": gzip.compress, ".jsonl": bytes}[suffix(name)]
        path.write_bytes(both(rows[:100]) + both(rows[100:]))
    return name


def read(folder, name, corpus=None, on_error="skip"):
    tally = Tally(on_error)
    corpus = corpus or CORPORA["files"]
    return [text for text, _ in read_documents(Path(folder), name, corpus, tally)], tally


def reasons(tally) -> dict[str, int]:
    return {facts["reason"]: facts["rows"] for facts in tally.bad.values()}


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(readers, "PARQUET_ROWS", 3)
    name = write(tmp_path, f"part{kind}")
    texts, tally = read(tmp_path, name, on_error="stop")
    assert texts == TEXTS
    assert 0 < tally.bytes_read <= (tmp_path / name).stat().st_size


def test_a_rule_names_values_that_are_no_strings_too(tmp_path):
    rows = [{"text": str(n), "k": k} for n, k in enumerate([3, "3", True, None, "x"])]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    for value, left in {"3": "234", "true": "0134", "null": "0124", "x": "0123"}.items():
        corpus = Corpus({"train": "*"}, drop=(("k", value),))
        assert "".join(read(tmp_path, "a.jsonl", corpus, "stop")[0]) == left


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.rs"])
def test_a_text_or_source_file_is_one_document_to_the_byte(tmp_path, name):
    for text in TEXTS:
        (tmp_path / name).write_bytes(text.encode())
        assert read(tmp_path, name, on_error="stop")[0] == [text]


def test_suffixes():
    names = ["x/a.jsonl.zst", "a.b.JSONL.GZ", "a.tar.gz", "a.b.parquet", "a.v2.txt", "README"]
    assert [suffix(name) for name in names] == [
        ".jsonl.zst", ".jsonl.gz", ".tar.gz", ".parquet", ".txt", ""
    ]  # fmt: skip


def test_slimpajama_is_read_by_its_folders_without_github(tmp_path):
    rows = [
        {"text": f"{n}", "meta": {"redpajama_set_name": name}}
        for n, name in enumerate(["RedPajamaC4", "RedPajamaGithub", "RedPajamaBook"])
    ]
    for name in ("train/chunk10/b", "train/chunk2/a", "train/chunk10/a", "validation/chunk1/a"):
        path = tmp_path / f"{name}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zst(jsonl(rows)))
    (tmp_path / "train/notes.jsonl.zst").write_bytes(b"not of a chunk")
    files, unknown = list_files(CORPORA["slimpajama"], tmp_path)
    names = {split: [name for name, _ in files[split]] for split in files}
    assert names == {
        "train": [f"train/chunk{n}.jsonl.zst" for n in ("10/a", "10/b", "2/a")],
        "validation": ["validation/chunk1/a.jsonl.zst"],
    }
    assert not unknown
    texts, tally = read(tmp_path, names["train"][0], CORPORA["slimpajama"], "stop")
    assert texts == ["0", "2"]
    assert tally.dropped == {"meta.redpajama_set_name is RedPajamaGithub": 1}


def test_a_row_that_a_filter_cannot_judge_is_bad(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "x", "meta": {}}, {"text": "y"}]))
    with pytest.raises(UserError, match="a.jsonl, row 1, has no field 'meta.redpajama_set_name'"):
        read(tmp_path, "a.jsonl", CORPORA["slimpajama"], "stop")


def test_nested_fields_and_filters_of_parquet(tmp_path):
    rows = [{"body": {"raw": "kept"}, "kind": "b"}, {"body": {"raw": "gone"}, "kind": "a"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    corpus = Corpus({"train": "*"}, "body.raw", (("kind", "a"),))
    texts, tally = read(tmp_path, "a.parquet", corpus, "stop")
    assert texts == ["kept"] and tally.dropped == {"kind is a": 1}
    corpus = Corpus({"train": "*"}, "body.cooked")
    assert reasons(read(tmp_path, "a.parquet", corpus)[1]) == {"has no column 'body.cooked'": 0}


GOOD = jsonl([{"text": "first"}])


@pytest.mark.parametrize(
    ("name", "data", "reason", "rows", "left"),
    [
        ("a.jsonl", GOOD + b'{"text": "hal', "is not JSON", 1, 1),
        ("a.jsonl", b"[1]\n" + GOOD, "has no field 'text'", 1, 1),
        ("a.jsonl", b'{"text": 3}\n' * 2 + GOOD, "has a 'text' of type int", 2, 1),
        ("a.jsonl", b'{"text": null}\n' + GOOD, "has a 'text' of type NoneType", 1, 1),
        ("a.jsonl", b'{"text": "\xff"}\n' + GOOD, "is not UTF-8", 1, 1),
        ("a.jsonl", b'{"text": "\\ud800"}\n' + GOOD, "holds half a surrogate pair", 1, 1),
        ("a.jsonl", b"[" * 10**5 + b"\n" + GOOD, "is not JSON", 1, 1),
        ("a.jsonl", b"", "is empty", 0, 0),
        ("a.jsonl.zst", b"", "is empty", 0, 0),
        ("a.jsonl.zst", b"no zstd", "is damaged or truncated", 0, 0),
        ("a.jsonl.zst", zst(GOOD * 2**17)[:-9], "is damaged or truncated", 0, None),
        ("a.jsonl.gz", gzip.compress(GOOD * 2**17)[:-9], "is damaged or truncated", 0, None),
        ("a.parquet", b"", "is empty", 0, 0),
        ("a.parquet", b"PAR1 no parquet", "is damaged or truncated", 0, 0),
        ("a.txt", b"\xff", "is not UTF-8", 1, 0),
    ],
)
def test_bad_input_stops_or_is_counted_and_named(tmp_path, name, data, reason, rows, left):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}.* {reason}.*--on-error skip"):
        read(tmp_path, name, on_error="stop")
    texts, tally = read(tmp_path, name)
    assert set(texts) <= {"first"} and (left is None or len(texts) == left)
    assert reasons(tally) == {reason: rows}


def test_parquet_of_other_columns_types_and_bytes(tmp_path):
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    assert reasons(read(tmp_path, "a.parquet")[1]) == {"has no column 'text'": 0}
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert reasons(read(tmp_path, "a.parquet")[1]) == {"has a 'text' of type int": 2}
    wrong = pa.array([b"one", b"\xff", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": wrong}), tmp_path / "a.parquet")
    texts, tally = read(tmp_path, "a.parquet")
    assert texts == ["one"]
    assert reasons(tally) == {"is not UTF-8": 1, "has a 'text' of type NoneType": 1}
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20])
    assert reasons(read(tmp_path, "a.parquet")[1]) == {"is damaged or truncated": 0}


def test_no_document_or_line_larger_than_memory_should_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_DOCUMENT", 20)
    monkeypatch.setattr(readers, "LARGEST_LINE", 40)
    rows = ["y" * 20, "y" * 21, "y" * 99, "z"]
    write(tmp_path, "a.jsonl", rows)
    texts, tally = read(tmp_path, "a.jsonl")
    assert texts == ["y" * 20, "z"] and sum(reasons(tally).values()) == 2
    (tmp_path / "a.txt").write_text("y" * 21)
    assert reasons(read(tmp_path, "a.txt")[1]) == {readers.TOO_LARGE: 0}


def test_empty_texts_are_dropped_and_counted(tmp_path):
    write(tmp_path, "a.jsonl", ["", "x", ""])
    texts, tally = read(tmp_path, "a.jsonl", on_error="stop")
    assert texts == ["x"] and tally.dropped == {"no text": 2}


def test_what_the_system_cannot_read_is_never_skipped(tmp_path, monkeypatch):
    def no_memory(*_):
        raise pa.ArrowMemoryError("malloc")

    monkeypatch.setattr(readers, "_json_values", no_memory)
    with pytest.raises(UserError, match="b.jsonl cannot be read"):
        read(tmp_path, write(tmp_path, "b.jsonl"))
    for name in ("a.jsonl", "a.jsonl.zst", "a.parquet", "a.txt"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            read(tmp_path, name)


def test_files_of_unknown_kinds_are_counted_and_hidden_ones_are_not_looked_at(tmp_path):
    for name in ("src/a.py", "src/b.png", "c.png", "README", ".git/d.py", ".e.txt", "z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, unknown = list_files(CORPORA["files"], tmp_path)
    assert files == {"train": [("src/a.py", 1), ("z.txt", 1)]}
    assert unknown == {".png": 2, "": 1}
    with pytest.raises(UserError, match="no folder"):
        list_files(CORPORA["files"], tmp_path / "nowhere")
    with pytest.raises(UserError, match="no readable file .*parquet for the train split"):
        list_files(CORPORA["starcoder"], tmp_path)


def test_copies_of_a_document_are_held_out_together_and_in_proportion():
    held = [is_held_out(f"document {n}".encode(), 0.1) for n in range(5000)]
    assert 400 < sum(held) < 600
    assert held[:9] == [is_held_out(f"document {n}".encode(), 0.1) for n in range(9)]
    assert not any(is_held_out(f"{n}".encode(), 0.0) for n in range(99))
