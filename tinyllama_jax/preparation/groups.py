"""Groups of input files, and how one becomes shards: the unit of work of a preparation.

A group is some consecutive files. Which files make a group depends on their order and sizes alone,
and the bytes of a shard on the files of its group, so any number of processes on any machines
writes the same. A group leaves a shard for each of its splits and then a sidecar, the JSON of what
was done; a group with a sidecar is done.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.data.tokenizer import load_tokenizer
from tinyllama_jax.files import write_aside
from tinyllama_jax.preparation.packing import BestFitPacker, Packer
from tinyllama_jax.preparation.readers import (
    Corpus,
    OnError,
    Tally,
    is_held_out,
    read_documents,
    record_bytes,
)
from tinyllama_jax.preparation.shards import ShardWriter, token_features
from tinyllama_jax.preparation.token_files import read_token_documents

GROUP_BYTES = 2**28
"""About how many bytes of records a group becomes at least; a group ends with a file."""
BATCH_BYTES = 2**20  # of text, handed to each of sentencepiece's threads at once

PACKER_FACTS = ("documents", "cut_documents", "dropped_tokens", "padding_tokens")
"""Attributes of a packer that the manifest gives for each split."""

Report = Callable[[int, int], None]
"""Called with bytes of input and tokens, as they pass."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Some consecutive files of a split."""

    index: int
    split: str
    files: tuple[tuple[str, int], ...]
    """(name, bytes) of each."""

    def size(self) -> int:
        """Bytes of input."""
        return sum(size for _, size in self.files)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What all groups share; travels to every process."""

    name: str
    corpus: Corpus
    source: Path
    tokenizer: Path
    out: Path
    """The dataset's folder, made in the last step."""
    on_error: OnError
    row_tokens: int | None
    """Length of the rows that best-fit packing fills; None: documents are concatenated."""

    @property
    def folder(self) -> Path:
        """Where shards and sidecars wait for the last step."""
        return self.out.with_name(f"{self.out.name}.partial")

    def sidecar(self, group: Group) -> Path:
        return self.folder / "groups" / f"{group.index:06d}.json"

    def shard(self, group: Group, split: str) -> Path:
        return self.folder / f"{split}-{group.index:06d}"

    def is_done(self, group: Group) -> bool:
        """Whether its sidecar and shards are there, made as `on_error` asks."""
        try:
            sidecar = json.loads(self.sidecar(group).read_text())
            sizes = {self.folder / s["file"]: s["bytes"] for s in sidecar["shards"].values()}
            whole = all(path.stat().st_size == size for path, size in sizes.items())
        except FileNotFoundError:
            return False
        return whole and not (sidecar["bad"] and self.on_error == "stop")


def make_groups(files: dict[str, list[tuple[str, int]]], group_bytes: int) -> list[Group]:
    """Cuts the files of each split into groups that become about `group_bytes` of records or more.

    Nothing but the files' order, sizes and formats counts. What is left over at the end of a split
    joins the group before it.
    """
    groups = []
    for split, named in files.items():
        cut: list[list[tuple[str, int]]] = [[]]
        expected = 0.0
        for name, size in named:
            if expected >= group_bytes:
                cut.append([])
                expected = 0.0
            cut[-1].append((name, size))
            expected += size * record_bytes(name)
        if expected < group_bytes and len(cut) > 1:
            left = cut.pop()
            cut[-1] += left
        groups += [
            Group(index, split, tuple(part)) for index, part in enumerate(cut, start=len(groups))
        ]
    return groups


def make_packer(vocab_size: int, row_tokens: int | None) -> Packer:
    """What packs the documents of one split. Raises `UserError` if rows do not fill a record."""
    return Packer(vocab_size) if row_tokens is None else BestFitPacker(vocab_size, row_tokens)


def write_group(
    preparation: Preparation, group: Group, report: Report, threads: int = 1
) -> dict[str, Any]:
    """Reads, tokenises, packs and writes one group; the bytes depend on nothing but its files.

    Args:
      preparation: what all groups share.
      group: the files to read.
      report: is called with the progress.
      threads: threads of the tokenizer.

    Returns:
      The sidecar, as it stands on disk: `PACKER_FACTS` and shards of each split that has
      documents, counts of what was left out, bytes of text or counts of bos and eos.

    Raises:
      UserError: bad input and `on_error` is "stop"; a file that cannot be read; a full disk.
    """
    processor = load_tokenizer(preparation.tokenizer)
    vocab_size, features = processor.get_piece_size(), token_features(processor.get_piece_size())
    tally = Tally(preparation.on_error)
    packers: dict[str, Packer] = {}
    writers: dict[str, ShardWriter] = {}
    text_bytes = 0
    is_text = preparation.corpus.raw_dtype is None
    if is_text:
        read = read_documents
        encode = functools.partial(processor.encode, num_threads=threads, return_type="numpy")
    else:
        read = functools.partial(read_token_documents, vocab_size=vocab_size)
        encode = list

    def add(split: str, documents: list[Any]) -> int:
        ids = encode(documents)
        if split not in packers:
            packers[split] = make_packer(vocab_size, preparation.row_tokens)
        write(split, packers[split].add(ids, add_eos=is_text))
        return is_text * len(ids) + sum(map(len, ids))

    def write(split: str, records_RS: np.ndarray) -> None:
        if len(records_RS) and split not in writers:
            writers[split] = ShardWriter(preparation.shard(group, split), features)
        if len(records_RS):
            writers[split].write(records_RS)

    with contextlib.ExitStack() as on_exit:
        on_exit.callback(lambda: [writer.discard() for writer in writers.values()])
        for batch, size, moved in _batches(preparation, group, tally, BATCH_BYTES * threads, read):
            text_bytes += size
            report(moved, sum(add(split, documents) for split, documents in batch.items()))
        for split, packer in packers.items():
            write(split, packer.finish())
        shards = {split: writers[split].finish() for split in sorted(writers)}
    sidecar = {
        **{
            fact: {split: getattr(packers[split], fact) for split in sorted(packers)}
            for fact in PACKER_FACTS
        },
        "shards": shards,
        **({"text_bytes": text_bytes} if is_text else tally.tokens),
        "dropped": dict(sorted(tally.dropped.items())),
        "bad": list(tally.bad.values()),
    }
    write_aside(preparation.sidecar(group), json.dumps(sidecar) + "\n", sync=True)
    return sidecar


def _batches(
    preparation: Preparation, group: Group, tally: Tally, size: int, read: Callable[..., Iterator]
) -> Iterator[tuple[dict[str, list[Any]], int, int]]:
    """({split: documents}, bytes of them, bytes of input since the batch before) of a group.

    `read` yields each document, a text or its ids, with the bytes that say whether it is held out.
    """
    share, batch, filled = preparation.corpus.held_out_share, {}, 0
    before = done = 0  # bytes of the files at the last batch, and of those that are read
    for file, bytes_of_file in group.files:
        for document, key in read(preparation.source, file, preparation.corpus, tally):
            held_out = share and is_held_out(key, share)
            batch.setdefault("validation" if held_out else group.split, []).append(document)
            filled += len(key)
            if filled >= size:
                now = done + tally.bytes_read
                yield batch, filled, now - before
                batch, filled, before = {}, 0, now
        done += bytes_of_file
    yield batch, filled, done - before
