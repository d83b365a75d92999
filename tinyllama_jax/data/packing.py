"""Documents become records: their pieces, an eos after each, cut every 8,193 tokens."""

from collections.abc import Iterable, Iterator

import numpy as np

from tinyllama_jax.config import UserError
from tinyllama_jax.data.tokenizer import EOS

RECORD = 8192
"""Targets of a record. A record holds one token more, and serves every context dividing this."""


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def pack(documents: Iterable[list[int]], vocab_size: int) -> Iterator[np.ndarray]:
    """Concatenates documents and cuts records of `RECORD` + 1 tokens.

    Every token stands in one record. A tail shorter than a record is dropped, never padded.

    Args:
      documents: ids of each document, without eos.
      vocab_size: ids lie in [0, vocab_size).

    Raises:
      UserError: an id outside the vocabulary.
    """
    dtype, waiting = token_dtype(vocab_size), np.empty(0, np.int64)
    for document in documents:
        ids = np.array([*document, EOS], np.int64)
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise UserError(
                f"A document holds the token id {ids.max() if ids.min() >= 0 else ids.min()}, "
                f"outside the vocabulary of {vocab_size}: use the tokenizer it was made with."
            )
        waiting = np.concatenate([waiting, ids])
        while len(waiting) > RECORD:
            yield waiting[: RECORD + 1].astype(dtype)
            waiting = waiting[RECORD + 1 :]
