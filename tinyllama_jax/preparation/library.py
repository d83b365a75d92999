"""The embedded corpus of the demo: the standard library of the running Python, as two sources.

Every installation carries it, so the demo downloads nothing. Prose is the language reference, the
docstrings and the text files; code is the modules without their docstrings.
"""

import ast
import hashlib
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import numpy as np

from tinyllama_jax.errors import require
from tinyllama_jax.preparation.documents import (
    Document,
    distinct,
    passages,
    prepare_documents,
    without_passages,
)

SOURCES = ("prose", "code")
SPLITS = ("train", "validation")

HELD_OUT_SHARE = 0.07
SHORTEST_DOCUMENT = 100  # characters

# Tests repeat what they test; idlelib, lib2to3 and installed packages are programs of their own.
LEFT_OUT_FOLDERS = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__")
)
# Written where Python was built or installed, so they speak of that machine.
LOCAL_FILES = re.compile(r"config-.*|_sysconfigdata.*|(site|user)customize\.py")

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# A comment on a docstring and the blank lines after it have no meaning without it.
REST_OF_LINE = re.compile(rb"[ \t]*(#[^\n]*)?(\n|\Z)([ \t\f]*\n)*")


def prepare_standard_library(
    tokenizer: str | Path, out: str | Path, *, processes: int = 1, best_fit: int | None = None
) -> dict[str, Path]:
    """Prepares the embedded corpus as one dataset per source: `out/prose` and `out/code`.

    Args:
      tokenizer: path of a sentencepiece model.
      out: folder for both datasets. One that is there already, made from the same text and
        tokenizer, is left alone.
      processes: see `prepare_documents`.
      best_fit: see `prepare_corpus`.

    Returns:
      The folder of each source.

    Raises:
      UserError: what `standard_library` and `prepare_documents` raise.
    """
    folders = {}
    for source, splits in standard_library().items():
        folders[source] = Path(out) / source
        prepare_documents(
            source, splits, tokenizer, folders[source], processes=processes, best_fit=best_fit
        )
    return folders


def standard_library() -> dict[str, dict[str, list[Document]]]:
    """Returns {source: {split: documents}}, the same on every machine with the same Python.

    Modules are held out whole, prose and code together, and no `PASSAGE` of a held-out document
    occurs in a training document of either source. Raises `UserError` where Python has no sources.
    """
    splits = {source: {split: [] for split in SPLITS} for source in SOURCES}
    for source, document in read_documents(Path(sysconfig.get_path("stdlib"))):
        split = "validation" if held_out(document.name) else "train"
        splits[source][split].append(document)
    for source in splits.values():
        require(
            all(source.values()),
            "This Python comes without the source files of its standard library, from which the "
            "demo reads its corpus: use an ordinary installation of Python.",
        )
        source["train"] = distinct(source["train"])
    numbers = [
        passages(document.text) for source in splits.values() for document in source["train"]
    ]
    trained = np.sort(np.concatenate(numbers))
    for source in splits.values():
        source["validation"] = [
            piece
            for document in source["validation"]
            for piece in without_passages(document, trained)
        ]
    return splits


def held_out(name: str) -> bool:
    """Returns whether the documents of this name are held out of training."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def read_documents(library: Path) -> Iterator[tuple[str, Document]]:
    """Returns (source, document) of everything readable in the folder, sorted by name."""
    pairs = sorted(_documents(library), key=lambda pair: (pair[1].name, pair[0]))
    for source, document in pairs:
        if len(document.text) >= SHORTEST_DOCUMENT:
            yield source, document


def _documents(library: Path) -> Iterator[tuple[str, Document]]:
    for topic, text in topics.topics.items():
        yield "prose", Document(f"topic:{topic}", text)
    for path in _files(library):
        inside = path.relative_to(library)
        name = f"text:{inside.as_posix()}"
        if path.suffix == ".py":
            name = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
        # Its text is in the prose, topic by topic.
        if name != topics.__name__:
            yield from ((source, Document(name, text)) for source, text in _texts(path).items())


def _files(library: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(library):
        # In place: os.walk then stays out of installed packages, which may be many.
        folders[:] = [
            name
            for name in folders
            if name not in LEFT_OUT_FOLDERS and not LOCAL_FILES.fullmatch(name)
        ]
        yield from (
            Path(folder, name)
            for name in files
            if name.endswith((".py", ".md", ".rst", ".txt")) or name.startswith("README")
            if not LOCAL_FILES.fullmatch(name)
        )


def _texts(path: Path) -> dict[str, str]:
    """{source: text} of one file; empty where it cannot be decoded or is not proper Python."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        if path.suffix != ".py":
            return {"prose": text}
        with warnings.catch_warnings():
            # Where warnings are errors, an old escape sequence would leave the module out.
            warnings.simplefilter("ignore")
            nodes = definitions(ast.parse(text))
    except (SyntaxError, ValueError):
        return {}
    return {"prose": docstrings(nodes), "code": without_docstrings(text, nodes)}


def definitions(tree: ast.Module) -> list[Definition]:
    """Returns all that can have a docstring, the module included, in the order of its lines."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, Definition)]
    return sorted(nodes, key=lambda node: getattr(node, "lineno", 0))


def docstrings(nodes: list[Definition]) -> str:
    """Returns the docstrings of a module's definitions with a blank line between them."""
    texts = [ast.get_docstring(node) for node in nodes]
    # Escapes in a docstring can stand for half a character, which no file could hold.
    return "\n\n".join(filter(None, texts)).encode(errors="replace").decode()


def without_docstrings(code: str, nodes: list[Definition]) -> str:
    """Returns the code of a module without the docstrings of its definitions; it compiles."""
    source = code.encode()
    lines = [0, *(newline.end() for newline in re.finditer(rb"\n", source))]
    cuts = []
    for node in nodes:
        for number, statement in enumerate(node.body, start=1):
            # A string after the docstring would become the docstring, so it goes too.
            if not _is_string(statement):
                break
            # Optional in the type only: the parser always knows where a statement ends.
            assert statement.end_lineno and statement.end_col_offset
            line = lines[statement.lineno - 1]
            start = line + statement.col_offset
            end = lines[statement.end_lineno - 1] + statement.end_col_offset
            rest = REST_OF_LINE.match(source, end)
            needed = number == len(node.body) and not isinstance(node, ast.Module)
            if needed or source[line:start].strip() or not rest:
                cuts.append((start, end, b"pass"))
            else:
                cuts.append((line, rest.end(), b""))
    pieces, position = [], 0
    for start, end, replacement in sorted(cuts):
        pieces += source[position:start], replacement
        position = end
    return b"".join([*pieces, source[position:]]).decode()


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
