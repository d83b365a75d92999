"""Packing: nothing is lost, invented or padded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.config import UserError
from tinyllama_jax.data.packing import RECORD, pack, token_dtype


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 20_000), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_records_are_the_documents_with_eos_in_order(lengths, seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(3, 500, length).tolist() for length in lengths]
    stream = np.concatenate([[*document, 2] for document in documents])
    records = list(pack(documents, vocab_size=500))
    assert all(record.shape == (RECORD + 1,) for record in records)
    assert len(records) == len(stream) // (RECORD + 1)
    whole = len(records) * (RECORD + 1)
    found = np.concatenate(records) if records else np.empty(0)
    np.testing.assert_array_equal(found, stream[:whole])


def test_the_dtype_is_the_smallest_that_holds_the_vocabulary():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32
    (record,) = pack([[69_999] * RECORD], vocab_size=70_000)
    assert record.dtype == np.uint32 and record[0] == 69_999


@pytest.mark.parametrize("token", [-1, 500, 70_000])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(UserError, match=f"token id {token}"):
        list(pack([[5, token, 6]], vocab_size=500))
