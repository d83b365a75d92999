"""Documents become records of 8,193 tokens: one after the other, or sorted into rows that fit them.

A document is its pieces and an eos. Padding, where there is any, is eos after eos: no document is
empty, so it cannot be mistaken, whatever dataset a row comes from (`boundaries.py`).
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tinyllama_jax.data.format import RECORD, is_padding, token_dtype
from tinyllama_jax.data.tokenizer import EOS
from tinyllama_jax.errors import UserError, require

BATCH = 64  # documents that `pack` takes at once
OPEN_ROWS = 512  # of best-fit packing: more fill rows better, but end half empty with a group


class Packer:
    """Concatenates documents and cuts records of `RECORD` + 1 tokens.

    Every token stands in one record, but for a tail shorter than a record: it is dropped and never
    padded. How documents are batched changes no record.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size, self.dtype = vocab_size, token_dtype(vocab_size)
        self.stream = np.empty(0, self.dtype)  # what no record holds yet
        self.documents = self.tokens = 0  # added so far, tokens with each document's eos
        self.cut_documents = self.padding_tokens = 0  # by best fit

    @property
    def dropped_tokens(self) -> int:
        """Tokens that no record holds, if nothing is added any more."""
        return len(self.stream)

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
            ends += np.arange(1, len(ends) + 1)
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise UserError(
                f"A document holds the token id {ids.max() if ids.min() >= 0 else ids.min()}, "
                f"outside the vocabulary of {self.vocab_size}: use the tokenizer it was made with."
            )
        self.documents += len(arrays)
        self.tokens += len(ids)
        return self._pack(ids.astype(self.dtype), ends)

    def finish(self) -> np.ndarray:
        """The records that only the end makes whole."""
        return np.empty((0, RECORD + 1), self.dtype)

    def _pack(self, ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The records made whole by documents, each of which ends before its place in `ends`."""
        stream = np.concatenate([self.stream, ids])
        whole = len(stream) // (RECORD + 1) * (RECORD + 1)
        self.stream = stream[whole:].copy()  # a view would keep the whole stream alive
        return stream[:whole].reshape(-1, RECORD + 1)


class BestFitPacker(Packer):
    """Puts each document into the open row that it fills best; pads what is left of a row.

    A document that fits a row is never cut. A longer one begins a row, fills as many as it can one
    after the other, and leaves the last of them open for others, so that the token after a row's
    end is what comes next in every document that crosses it, as in a plain concatenation. A record
    is some rows and the first token of the next, which serves as a target alone. (Ding et al. 2024,
    "Fewer Truncations Improve Language Modeling"; there documents are sorted by length first, here
    they come in their order and so many rows are open at once.)
    """

    def __init__(self, vocab_size: int, row_tokens: int):
        super().__init__(vocab_size)
        require(
            0 < row_tokens <= RECORD and RECORD % row_tokens == 0,
            f"--best-fit is {row_tokens}: give a divisor of the {RECORD} tokens of a record, best "
            "the model's context.",
        )
        self.row_tokens, self.rows_opened = row_tokens, 0
        self.open: list[tuple[int, int]] = []  # (free tokens, number of the row), sorted
        self.parts: dict[int, list[np.ndarray]] = {}  # of open rows, by number
        self.closed: list[np.ndarray] = []

    @property
    def dropped_tokens(self) -> int:
        return len(self.stream) - int(is_padding(self.stream).sum())

    def finish(self) -> np.ndarray:
        while self.open:
            self._close()
        return self._records(last=True)

    def _pack(self, ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        for document in np.split(ids, ends[:-1]) if len(ends) else []:
            self._place(document)
        return self._records(last=False)

    def _place(self, document: np.ndarray) -> None:
        self.cut_documents += len(document) > self.row_tokens
        # The first of the rows with as little room as will do.
        best = bisect_left(self.open, (len(document), 0))
        if best < len(self.open):
            free, row = self.open.pop(best)
            self.parts[row].append(document)
        else:
            if len(self.open) == OPEN_ROWS:
                self._close()
            free, row = -(-len(document) // self.row_tokens) * self.row_tokens, self.rows_opened
            self.rows_opened += 1
            self.parts[row] = [document]
        insort(self.open, (free - len(document), row))
        if self.open[0][0] == 0:
            self._close()

    def _close(self) -> None:
        """Closes the row with the least room."""
        free, row = self.open.pop(0)
        self.closed += [*self.parts.pop(row), np.full(free, EOS, self.dtype)]

    def _records(self, last: bool) -> np.ndarray:
        stream = np.concatenate([self.stream, *self.closed])
        self.closed = []
        # The last record has no next row to take a token of.
        count = max(len(stream) - (not last), 0) // RECORD
        ended = np.append(stream, self.dtype(EOS))
        self.stream = stream[count * RECORD :].copy()
        records_RS = np.empty((count, RECORD + 1), self.dtype)
        records_RS[:, :-1] = stream[: count * RECORD].reshape(count, RECORD)
        records_RS[:, -1] = ended[RECORD : count * RECORD + 1 : RECORD]
        self.padding_tokens += int(is_padding(records_RS[:, :-1]).sum())
        return records_RS


def pack(documents: Iterable[Sequence[int]], packer: Packer) -> Iterator[np.ndarray]:
    """The records of a stream of documents. Raises what `Packer.add` raises."""
    documents = iter(documents)
    while batch := list(itertools.islice(documents, BATCH)):
        yield from packer.add(batch)
    yield from packer.finish()
