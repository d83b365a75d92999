"""Documents held in memory: how they become a dataset, and which passages two of them share."""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.files import write_aside
from tinyllama_jax.preparation.corpus import prepare_corpus
from tinyllama_jax.preparation.readers import Corpus

PASSAGE = 100
"""Characters of the shortest text that a held-out document may not share with training."""
SHORTEST_PIECE = 200
"""What a cut leaves of a held-out document is dropped below this many characters."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    name: str
    """Where it came from: a module ("asyncio.events"), "topic:NAME" or "text:PATH"."""
    text: str


def prepare_documents(
    name: str,
    splits: Mapping[str, Sequence[Document]],
    tokenizer: str | Path,
    out: str | Path,
    *,
    processes: int = 1,
    best_fit: int | None = None,
) -> dict[str, Any]:
    """Prepares documents as the dataset `out`, by way of a folder with a .jsonl file per split.

    Args:
      name: the name that TFDS gives the dataset.
      splits: the documents of each split, in order.
      tokenizer: path of a sentencepiece model.
      out: folder to make. One that holds the dataset of these very documents is left alone.
      processes: how many prepare them. What fits into memory is mostly done by one before another
        has started.
      best_fit: see `prepare_corpus`.

    Returns:
      The manifest.

    Raises:
      UserError: what `prepare_corpus` raises; a disk for temporary files that is full.
    """
    with tempfile.TemporaryDirectory() as folder:
        manifest = prepare_corpus(
            name,
            write_documents(splits, Path(folder)),
            Path(folder),
            Path(tokenizer),
            Path(out),
            processes=processes,
            best_fit=best_fit,
        )
    assert manifest is not None, "no group was left to another worker"
    return manifest


def write_documents(splits: Mapping[str, Sequence[Document]], folder: Path) -> Corpus:
    """Writes a .jsonl file for each split into `folder`, and returns the corpus that they are.

    A file has the hash of its content in its name, since a preparation knows its input by the names
    and sizes of files: two texts of the same length would pass for one another.
    """
    files = {}
    for split, documents in splits.items():
        rows = [json.dumps(dataclasses.asdict(document)) + "\n" for document in documents]
        text = "".join(rows)
        digest = hashlib.sha256(text.encode()).hexdigest()
        files[split] = f"{split}-{digest[:16]}.jsonl"
        write_aside(folder / files[split], text)
    return Corpus(files)


def distinct(documents: Sequence[Document]) -> list[Document]:
    """The documents without those that repeat the text of an earlier one."""
    first = {}
    for document in documents:
        first.setdefault(document.text, document)
    return list(first.values())


def passages(text: str, length: int = PASSAGE) -> np.ndarray:
    """Returns a uint64 number for each window of `length` characters; equal windows, equal numbers.

    It is a polynomial of the characters modulo 2**64. Those of windows as long as a power of two
    come from halves, and the binary digits of `length` say which of them make a window.
    """
    windows = max(len(text) - length + 1, 0)
    numbers, covered = np.zeros(windows, np.uint64), 0
    block = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    for digit in range(length.bit_length() if windows else 0):
        size = 1 << digit
        shift = np.uint64(pow(0x9E3779B97F4A7C15, size, 2**64))
        if length & size:
            numbers = numbers * shift + block[covered : covered + windows]
            covered += size
        block = block[:-size] * shift + block[size:]
    return numbers


def without_passages(document: Document, trained: np.ndarray) -> list[Document]:
    """Returns what is left of a document when each passage in `trained` (sorted) is cut.

    The pieces are unbroken stretches of whole lines, so none has a passage that was not there.
    """
    text, numbers = document.text, passages(document.text)
    nearest = trained.take(np.searchsorted(trained, numbers), mode="clip")
    starts = np.flatnonzero(nearest == numbers)
    if not len(starts):
        return [document]
    depth = np.zeros(len(text) + 1, np.int64)
    depth[starts] += 1
    depth[starts + PASSAGE] -= 1
    kept = np.cumsum(depth)[:-1] == 0
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))
    stretches = [_whole_lines(text, *edge) for edge in edges.reshape(-1, 2).tolist()]
    pieces = [stretch for stretch in stretches if len(stretch) >= SHORTEST_PIECE]
    return [Document(f"{document.name}#{n}", piece) for n, piece in enumerate(pieces, start=1)]


def _whole_lines(text: str, start: int, end: int) -> str:
    """The lines of the text that lie in text[start:end] as a whole."""
    if start and text[start - 1] != "\n":
        start = text.find("\n", start, end) + 1 or end
    if end < len(text) and text[end] != "\n":
        end = text.rfind("\n", start, end) + 1
    return text[start:end].strip("\n")
