"""The embedded corpus: what is in it, and that nothing held out was trained on."""

import ast
import itertools
import os
import random
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from support.paths import ROOT
from tinyllama_jax.cli import main
from tinyllama_jax.data.tokenizer import EOS, load_tokenizer
from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation.documents import PASSAGE, passages
from tinyllama_jax.preparation.library import (
    SOURCES,
    SPLITS,
    definitions,
    held_out,
    read_documents,
    standard_library,
    without_docstrings,
)
from tinyllama_jax.preparation.verify import verify_dataset


@pytest.fixture(scope="module")
def library():
    return standard_library()


@pytest.fixture(scope="module")
def whole():
    """The documents before the split and the cut."""
    return list(read_documents(Path(sysconfig.get_path("stdlib"))))


def of_split(library, split):
    return [document for source in SOURCES for document in library[source][split]]


def test_code_compiles_and_has_no_docstrings(whole):
    code = [document for source, document in whole if source == "code"]
    assert len(code) > 300
    for document in code:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(document.text)
            compile(document.text, document.name, "exec", dont_inherit=True)
        left = [node for node in definitions(tree) if ast.get_docstring(node) is not None]
        assert not left, document.name


@pytest.mark.parametrize(
    "code, left",
    [
        ('"""Doc."""\n\nx = "kept"\n', 'x = "kept"\n'),
        ('"""Doc."""  # noted\nx = 1\n', "x = 1\n"),
        ('"Doc."\n"More."\nx = 1', "x = 1"),
        ('"""Doc."""', ""),
        ('"Doc."; "More."\nx = 1\n', "pass; pass\nx = 1\n"),
        ('def f():\n    """Doc\n    two."""\n\n    return 1\n', "def f():\n    return 1\n"),
        ('def f(): "Doc."; return 1\n', "def f(): pass; return 1\n"),
        ('def f():\n    "Doc."; return 1\n', "def f():\n    pass; return 1\n"),
        ('class A: "Doc."\n', "class A: pass\n"),
        ('class A:\n    "Doc."\n\nx = 1\n', "class A:\n    pass\n\nx = 1\n"),
        ('class A:\n    "Doc."\n    "More."\n', "class A:\n    pass\n"),
        ('def f(é="ß"): "Döc."\n', 'def f(é="ß"): pass\n'),
        ('async def f():\n    ("Doc."\n     "More.")\n    x\n', "async def f():\n    x\n"),
        ('def f():\n    x = 1\n    "Said."\n', 'def f():\n    x = 1\n    "Said."\n'),
    ],
)
def test_docstrings_are_cut_to_the_character(code, left):
    assert without_docstrings(code, definitions(ast.parse(code))) == left
    compile(left, "left", "exec")


def test_no_held_out_passage_was_trained_on(library):
    validated = set()
    for document in of_split(library, "validation"):
        validated.update(passages(document.text).tolist())
    assert len(validated) > 200_000
    for document in of_split(library, "train"):
        assert validated.isdisjoint(passages(document.text).tolist()), document.name


def test_no_held_out_passage_is_found_in_training_text(library, whole):
    """Without the numbers, which could be wrong on both sides of the test above."""
    training = [document.text for document in of_split(library, "train")]

    def found(samples):
        return [sample for sample in samples if any(sample in text for text in training)]

    rng = random.Random(0)

    def passages_of(documents, count):
        long = [document.text for document in documents if len(document.text) >= PASSAGE]
        texts = rng.choices(long, weights=[len(text) for text in long], k=count)
        starts = [rng.randrange(len(text) - PASSAGE + 1) for text in texts]
        return [text[at : at + PASSAGE] for text, at in zip(texts, starts, strict=True)]

    assert not found(passages_of(of_split(library, "validation"), 400))
    uncut = [document for _, document in whole if held_out(document.name)]
    assert found(passages_of(uncut, 400)), "the standard library no longer copies itself"


def test_a_module_is_held_out_from_both_sources_or_from_none(library):
    modules = {
        (source, split): {document.name.split("#")[0] for document in library[source][split]}
        for source in SOURCES
        for split in SPLITS
    }
    trained = modules["prose", "train"] | modules["code", "train"]
    validated = modules["prose", "validation"] | modules["code", "validation"]
    assert not trained & validated
    assert modules["prose", "train"] & modules["code", "train"]
    assert modules["prose", "validation"] & modules["code", "validation"]


def test_another_process_reads_the_same_corpus(library):
    program = (
        "from tinyllama_jax.preparation.library import *\nprint(repr(standard_library()), end='')"
    )
    again = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        # String hashes differ from process to process, and with them the order of sets.
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout == repr(library)


def test_both_sources_are_large_enough_to_train_and_to_measure(library):
    for source in SOURCES:
        characters = {split: sum(len(d.text) for d in library[source][split]) for split in SPLITS}
        assert characters["validation"] >= 120_000, source
        assert characters["train"] >= 1_500_000, source


def test_training_documents_differ(library):
    for source in SOURCES:
        texts = [document.text for document in library[source]["train"]]
        assert len(texts) == len(set(texts)), source


def test_names_are_in_order_and_of_the_library_alone(library):
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    for source in SOURCES:
        names = [document.name for document in library[source]["train"]]
        assert names == sorted(names) and len(names) == len(set(names))
        for name in names:
            assert not left_out & set(name.removeprefix("text:").replace("/", ".").split(".")), name
            assert "_sysconfigdata" not in name and "config-" not in name
    assert "pydoc_data.topics" not in {d.name for d in of_split(library, "train")}
    assert any(d.name.startswith("topic:") for d in library["prose"]["train"])


@pytest.mark.filterwarnings("error")
def test_folder_is_read_without_what_is_left_out(tmp_path):
    long = "x" * 100
    for path, data in {
        "pack/__init__.py": f'"""Doc {long}"""\nx = "{long}"\n'.encode(),
        "pack/part.py": f'# -*- coding: latin-1 -*-\nx = "é{long}"\n'.encode("latin-1"),
        "pack/odd.py": f'"""\\d {long}"""\n'.encode(),
        "pack/half.py": f'"""\\ud800 {long}"""\n'.encode(),
        "pack/README": long.encode(),
        "pack/notes.txt": long.encode(),
        "pack/table.csv": long.encode(),
        "short.py": b'"""Doc."""\nx = 1\n',
        "binary.txt": b"text\n" * 200 + b"\xff",
        "undecoded.py": b'x = "\xff"' + b"\n" * 200,
        "unparsed.py": b"x =" + b"\n" * 200,
        "zeros.py": b"x = 1\0" + b"\n" * 200,
        "pydoc_data/topics.py": f'x = "{long}"\n'.encode(),
        "_sysconfigdata__linux_.py": f'x = "{long}"\n'.encode(),
        "config-3.11/README": long.encode(),
        "test/x.py": f'x = "{long}"\n'.encode(),
        "pack/tests/x.py": f'x = "{long}"\n'.encode(),
        "site-packages/x.py": f'x = "{long}"\n'.encode(),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    found = {
        (source, document.name): document.text
        for source, document in read_documents(tmp_path)
        if not document.name.startswith("topic:")
    }
    assert found == {
        ("code", "pack"): f'x = "{long}"\n',
        ("code", "pack.part"): f'# -*- coding: latin-1 -*-\nx = "é{long}"\n',
        ("prose", "pack"): f"Doc {long}",
        ("prose", "pack.half"): f"? {long}",
        ("prose", "pack.odd"): f"\\d {long}",
        ("prose", "text:pack/README"): long,
        ("prose", "text:pack/notes.txt"): long,
    }


def test_python_without_sources_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="ordinary installation"):
        standard_library()


def test_no_held_out_passage_stands_in_the_demos_training_rows(tmp_path):
    """The whole way of `make train`: its tokenizer, its datasets, and the text behind the rows."""
    model = tmp_path / "tokenizer.model"
    assert main(["tokenizer", "stdlib", "--vocab-size", "4096", "--out", str(model)]) == 0
    assert main(["prepare", "stdlib", "--tokenizer", str(model), "--out", str(tmp_path)]) == 0
    assert not [line for source in SOURCES for line in verify_dataset(tmp_path / source)]
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
