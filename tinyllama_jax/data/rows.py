"""A split of a dataset as rows of tokens, by index."""

import functools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from tinyllama_jax.data.format import RECORD, read_manifest
from tinyllama_jax.errors import UserError, first_line, require

OPEN_SHARDS = 200
"""How many shards of a split are open at once. Four splits then stay below the 1,024 files that
most systems let a process open; the index of a shard of 16,384 records takes 144 KB of memory."""


def _open_shard(path: str) -> ArrayRecordReader:
    # Neither read-ahead nor threads of its own: rows come in random order, to Grain's threads. An
    # index is shorter than the 1 MB that would be fetched for it, and so is a small shard.
    options = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:0"
    return ArrayRecordReader(path, options, file_reader_buffer_size=2**15)


class Rows:
    """One split of a dataset as rows of `context` + 1 tokens, by index; ids are checked here.

    JAX is silent about an id outside the vocabulary: indexing clamps it.

    Raises:
      UserError: no dataset or split, or a context that does not divide a record.
    """

    def __init__(self, folder: str | Path, split: str, context: int, vocab_size: int):
        self.folder, self.context, self.vocab_size = Path(folder), context, vocab_size
        manifest = read_manifest(folder)
        require(
            split in manifest["splits"],
            f"{folder} has no {split} split, only {', '.join(manifest['splits'])}.",
        )
        require(
            RECORD % context == 0,
            f"model.context is {context}: it must divide the {RECORD} tokens of a record.",
        )
        builder: Any = tfds.builder_from_directory(folder)  # whose decorators hide its signature
        self.features = builder.info.features
        files = builder.info.splits[split].file_instructions
        self.shards = [file.filename for file in files]
        self.ends = np.cumsum([file.examples_in_shard for file in files])  # of each, in records
        self.rows_per_record = RECORD // context
        self.fill = fill_rate(manifest, split)
        # A reader in use outlives its place here, and closes when nobody has it any more.
        self._reader = functools.lru_cache(OPEN_SHARDS)(_open_shard)

    def __len__(self) -> int:
        return int(self.ends[-1]) * self.rows_per_record

    def __getitem__(self, index: int) -> np.ndarray:
        return self.read([index])[0]

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows by index, in int32 (rows, `context` + 1). One call for many is faster than many.

        Raises:
          IndexError: no such row.
          UserError: a damaged shard, or an id outside the vocabulary.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"{self} has {len(self)} rows: {rows.min()} to {rows.max()} asked.")
        records_R, parts_R = np.divmod(rows, self.rows_per_record)
        shards_R = np.searchsorted(self.ends, records_R, side="right")
        rows_RS = np.empty((len(records_R), self.context + 1), np.int32)
        for shard in np.unique(shards_R).tolist():
            places = np.flatnonzero(shards_R == shard)
            first = self.ends[shard - 1] if shard else 0
            records = self._read_records(shard, records_R[places] - first)
            for place, tokens in zip(places, records, strict=True):
                start = parts_R[place] * self.context
                rows_RS[place] = tokens[start : start + self.context + 1]
        largest_R = rows_RS.view(np.uint32).max(axis=1)  # which no wrapped id escapes
        if (largest_R >= self.vocab_size).any():
            place = int(np.argmax(largest_R))
            raise UserError(
                f"Record {records_R[place]} of {self.folder} holds the token id "
                f"{largest_R[place]}, outside the model's vocabulary of {self.vocab_size}: prepare "
                "it with the model's tokenizer."
            )
        return rows_RS

    def _read_records(self, shard: int, positions: np.ndarray) -> list[np.ndarray]:
        try:
            examples = self._reader(self.shards[shard]).read(positions.tolist())
            return [self.features.deserialize_example_np(e)["tokens"] for e in examples]
        except Exception as error:  # ArrayRecord's own errors share no class
            raise UserError(
                f"{self.shards[shard]} cannot be read: remove {self.folder} and prepare it again "
                f"({first_line(error)})."
            ) from None

    def __repr__(self) -> str:
        return f"Rows({self.folder})"


def fill_rate(manifest: dict[str, Any], split: str) -> Fraction:
    """The share of a split's targets that are not padding, exactly."""
    facts = manifest["splits"][split]
    return 1 - Fraction(facts["padding_tokens"], facts["records"] * RECORD)
