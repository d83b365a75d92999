"""The order of training: a pure function of (seed, row), mixed exactly and sliced by process last.

The whole position in the data is one number, rows consumed; everything else is computed from it.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from grain.python import DatasetSelectionMap

from tinyllama_jax.config import DataConfig, UserError, require
from tinyllama_jax.data.packing import RECORD
from tinyllama_jax.data.prepare import read_manifest
from tinyllama_jax.data.tokenizer import file_sha256


class Rows:
    """One split of a dataset as rows of `context` + 1 tokens, by index; ids are checked here.

    JAX is silent about an id outside the vocabulary: indexing clamps it.

    Raises:
      UserError: no dataset or split, a damaged shard, or a context that does not divide a record.
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
        self.records = builder.as_data_source(split)
        self.rows_per_record = RECORD // context

    def __len__(self) -> int:
        return len(self.records) * self.rows_per_record

    def __getitem__(self, index: int) -> np.ndarray:
        record, row = divmod(int(index), self.rows_per_record)
        try:
            tokens = self.records[record]["tokens"]
        except Exception as error:  # ArrayRecord's own errors share no class
            raise UserError(
                f"Record {record} of {self.folder} cannot be read: remove the folder and prepare "
                f"it again ({str(error).splitlines()[0]})."
            ) from None
        start = row * self.context
        row_T1 = tokens[start : start + self.context + 1].astype(np.int32)
        require(
            int(row_T1.max()) < self.vocab_size,
            f"Record {record} of {self.folder} holds the token id {row_T1.max()}, outside the "
            f"model's vocabulary of {self.vocab_size}: prepare it with the model's tokenizer.",
        )
        return row_T1

    def __repr__(self) -> str:
        return f"Rows({self.folder})"


class Mixture:
    """Which row of which source stands at each place of the global order, in closed form.

    Source 0 gets its share of all rows, source 1 its share of what is left, and so on, each by
    rounding: any stretch of rows is exact to within one row (for two sources; a prefix, for more).
    """

    def __init__(self, weights: Sequence[float]):
        # Fractions, because a float's error would show after some 1e9 rows.
        exact = [Fraction(str(weight)) for weight in weights]
        self.shares = [share / sum(exact[index:]) for index, share in enumerate(exact)]

    def locate(self, row: int) -> tuple[int, int]:
        """(source, row of that source) at a place of the global order."""
        for source, share in enumerate(self.shares):
            before = math.floor(row * share + Fraction(1, 2))
            if math.floor((row + 1) * share + Fraction(1, 2)) > before:
                return source, before
            row -= before
        raise AssertionError("the last share is 1, so the last source takes what is left")

    def counts(self, rows: int) -> list[int]:
        """Rows of each source among the first `rows` of the global order."""
        counts = []
        for share in self.shares:
            counts.append(math.floor(rows * share + Fraction(1, 2)))
            rows -= counts[-1]
        return counts


class _ProcessOrder(DatasetSelectionMap):
    """Grain's selection map: the rows that one process reads, out of the global order."""

    def __init__(self, mixture: Mixture, start: int, batch: tuple[int, int], process, processes):
        self.mixture, self.start = mixture, start
        self.micro_batches, self.rows = batch
        self.process, self.local_rows = process, batch[1] // processes

    def __len__(self) -> int:
        return 2**62  # sources repeat for ever

    def __getitem__(self, index: int) -> tuple[int, int]:
        micro_batch, row = divmod(index, self.local_rows)
        first = micro_batch * self.rows + self.process * self.local_rows
        return self.mixture.locate(self.start + first + row)


def batches(
    sources: Sequence[Rows],
    weights: Sequence[float],
    *,
    seed: int,
    start: int,
    micro_batches: int,
    rows: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[np.ndarray]:
    """Endless batches tokens_ABS of shape (micro_batches, rows / processes, context + 1).

    Args:
      sources: read in a fresh order each epoch, a pure function of (seed, source, epoch).
      weights: share of the rows of each source.
      seed: of the orders.
      start: rows consumed before the first batch, over all processes; restoring is O(1).
      micro_batches: micro-batches of a batch.
      rows: rows of a micro-batch over all processes.
      process: this one's index.
      processes: how many read, each its own rows of every micro-batch.
    """
    orders = []
    for index, source in enumerate(sources):
        order_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
        orders.append(grain.MapDataset.source(source).shuffle(seed=order_seed).repeat())
    order = _ProcessOrder(Mixture(weights), start, (micro_batches, rows), process, processes)
    local_rows = rows // processes
    dataset = grain.MapDataset.select_from_datasets(orders, order)
    dataset = dataset.batch(micro_batches * local_rows)
    prefetch = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    for batch in dataset.to_iter_dataset(prefetch):
        yield batch.reshape(micro_batches, local_rows, -1)


def ledger(
    names: Sequence[str], weights: Sequence[float], sources: Sequence[Rows], rows: int
) -> dict[str, float]:
    """Metrics of what has been read after `rows` rows: tokens and epochs of each source."""
    context = sources[0].context
    metrics: dict[str, float] = {"data/tokens": rows * context}
    for name, source, count in zip(names, sources, Mixture(weights).counts(rows), strict=True):
        metrics[f"data/{name}/tokens"] = count * context
        metrics[f"data/{name}/epochs"] = count / len(source)
    return metrics


def fingerprint(data: DataConfig, context: int, seed: int) -> dict[str, Any]:
    """What must not change when a run goes on, since rows consumed would mean other rows.

    Raises:
      UserError: a source that was prepared with another tokenizer.
    """
    tokenizer = file_sha256(data.tokenizer)
    sources = {}
    for source in data.sources:
        manifest = read_manifest(source.path)
        # Another one of the same size would train as well, and tell wrong bits per byte and text.
        require(
            manifest["tokenizer"]["sha256"] == tokenizer,
            f"{source.path} was prepared with another tokenizer than {data.tokenizer}: "
            "give that one as --data.tokenizer, or prepare the source again.",
        )
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        sources[source.name] = {"weight": source.weight, "manifest": digest}
    return {"tokenizer": tokenizer, "seed": seed, "context": context, "sources": sources}
