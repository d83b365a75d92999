"""Documents become records: their pieces, an eos after each, cut every 8,193 tokens."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tinyllama_jax.config import UserError
from tinyllama_jax.data.tokenizer import EOS

RECORD = 8192
"""Targets of a record. A record holds one token more, and serves every context dividing this."""
BATCH = 64  # documents that `pack` takes at once


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class Packer:
    """Concatenates documents and cuts records of `RECORD` + 1 tokens.

    Every token stands in one record; what `waiting` holds in the end is a tail shorter than a
    record, to be dropped and never padded. How documents are batched changes no record.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size, self.dtype = vocab_size, token_dtype(vocab_size)
        self.waiting = np.empty(0, self.dtype)
        self.documents = self.tokens = 0  # added so far, each document's eos included

    def add(
        self, documents: Sequence[Sequence[int] | np.ndarray], add_eos: bool = True
    ) -> np.ndarray:
        """Takes the ids of each document and returns the records that are now whole.

        Args:
          documents: ids, as long as each document is.
          add_eos: whether an eos is added to each; False: they have what they should have.

        Returns:
          records_RS of shape (records, `RECORD` + 1), maybe none, in the dtype of the vocabulary.

        Raises:
          UserError: an id outside the vocabulary.
        """
        arrays = [np.asarray(document, np.int64) for document in documents]
        ends = np.cumsum([len(array) for array in arrays])
        ids = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
        if add_eos and arrays:
            ids = np.insert(ids, ends, EOS)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise UserError(
                f"A document holds the token id {ids.max() if ids.min() >= 0 else ids.min()}, "
                f"outside the vocabulary of {self.vocab_size}: use the tokenizer it was made with."
            )
        self.documents += len(arrays)
        self.tokens += len(ids)
        stream = np.concatenate([self.waiting, ids.astype(self.dtype)])
        whole = len(stream) // (RECORD + 1) * (RECORD + 1)
        self.waiting = stream[whole:].copy()  # a view would keep the whole stream alive
        return stream[:whole].reshape(-1, RECORD + 1)


def pack(documents: Iterable[Sequence[int]], vocab_size: int) -> Iterator[np.ndarray]:
    """The records of a stream of documents, as `Packer` cuts them. Raises what `add` raises."""
    packer, documents = Packer(vocab_size), iter(documents)
    while batch := list(itertools.islice(documents, BATCH)):
        yield from packer.add(batch)
