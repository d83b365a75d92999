"""Packing: nothing is lost or invented, and what is padding can be told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.data.format import RECORD, token_dtype
from tinyllama_jax.data.tokenizer import EOS
from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation import packing
from tinyllama_jax.preparation.packing import BestFitPacker, Packer, pack


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 20_000), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_records_are_the_documents_with_eos_in_order(lengths, seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(3, 500, length).tolist() for length in lengths]
    stream = np.concatenate([[*document, 2] for document in documents])
    records = list(pack(documents, Packer(500)))
    assert all(record.shape == (RECORD + 1,) for record in records)
    assert len(records) == len(stream) // (RECORD + 1)
    whole = len(records) * (RECORD + 1)
    found = np.concatenate(records) if records else np.empty(0)
    np.testing.assert_array_equal(found, stream[:whole])


def test_the_dtype_is_the_smallest_that_holds_the_vocabulary():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32
    (record,) = pack([[69_999] * RECORD], Packer(70_000))
    assert record.dtype == np.uint32 and record[0] == 69_999


@pytest.mark.parametrize("token", [-1, 500, 70_000])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(UserError, match=f"token id {token}"):
        list(pack([[5, token, 6]], Packer(500)))


ROW = 256


def documents_of(stream):
    """The documents, without eos, of a stream in which an eos after an eos is padding."""
    parts = np.split(stream, np.flatnonzero(stream == EOS) + 1)
    assert not len(parts[-1]), "the stream ends with an eos"
    return [part[:-1].tolist() for part in parts[:-1] if len(part) > 1]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 3 * ROW) | st.just(ROW - 1), min_size=60, max_size=300),
    batch=st.sampled_from([1, 7, 300]),
    open_rows=st.sampled_from([1, 3, 100]),
    seed=st.integers(0, 9),
)
def test_best_fit_keeps_all_documents_and_cuts_no_short_one(lengths, batch, open_rows, seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(3, 500, length).tolist() for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", open_rows)
        packer = BestFitPacker(500, ROW)
        records = [packer.add(documents[at : at + batch]) for at in range(0, len(lengths), batch)]
        records_RS = np.concatenate([*records, packer.finish()])
        whole = list(pack(documents, BestFitPacker(500, ROW)))
    np.testing.assert_array_equal(records_RS, np.reshape(whole, (-1, RECORD + 1)))
    # A record ends with what the next begins with: each token is a target once.
    np.testing.assert_array_equal(records_RS[:-1, -1], records_RS[1:, 0])

    stream = np.concatenate([*records_RS[:, :-1], packer.stream])
    found = documents_of(stream)
    assert sorted(found) == sorted(documents)
    ends = np.flatnonzero((stream == EOS) & (np.roll(stream, 1) != EOS)) + 1
    for end, document in zip(ends.tolist(), found, strict=True):
        start = end - len(document) - 1
        if len(document) < ROW:
            assert start // ROW == (end - 1) // ROW, "a document that fits a row is cut"
        else:
            assert start % ROW == 0, "a longer one begins a row"
    assert packer.cut_documents == sum(length >= ROW for length in lengths)
    assert packer.tokens == sum(lengths) + len(lengths)
    assert packer.tokens == records_RS[:, :-1].size - packer.padding_tokens + packer.dropped_tokens
    assert len(packer.stream) < RECORD


def test_best_fit_fills_rows():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 1, 30_000), 5, 5 * ROW).astype(int)
    packer = BestFitPacker(500, ROW)
    records = list(pack([[7] * length for length in lengths], packer))
    assert packer.padding_tokens < 0.01 * len(records) * RECORD


@pytest.mark.parametrize("row", [0, -256, 100, 2 * RECORD])
def test_rows_that_do_not_fill_a_record_are_refused(row):
    with pytest.raises(UserError, match="a divisor of the 8192 tokens"):
        BestFitPacker(500, row)
