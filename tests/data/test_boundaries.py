"""Documents and padding, told by the tokens alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.data.boundaries import loss_weights, segment_ids
from tinyllama_jax.data.tokenizer import BOS, EOS

TOKENS = st.lists(st.sampled_from([EOS, EOS, BOS, 3, 4]), min_size=20, max_size=20)


@settings(deadline=None, max_examples=50)
@given(st.lists(TOKENS, min_size=2, max_size=2))
def test_documents_are_numbered_and_padding_is_none(rows):
    found = np.asarray(segment_ids(np.array(rows)))
    for row, segments in zip(rows, found, strict=True):
        number = 1
        for place, token in enumerate(row):
            after_end = place > 0 and row[place - 1] == EOS
            number += after_end or token == BOS
            assert segments[place] == (0 if after_end and token == EOS else number)


@given(TOKENS)
def test_padding_counts_nothing_and_first_tokens_if_asked(row):
    for first_tokens in (True, False):
        weights = loss_weights(np.array([[row]]), first_tokens)
        assert weights.shape == (1, 1, 19) and weights.dtype == np.float32
        for place, weight in enumerate(weights[0, 0]):
            before, target = row[place : place + 2]
            padding = before == target == EOS
            after_padding = place > 0 and row[place - 1] == before == EOS
            first = before == EOS
            assert weight == (not padding and not after_padding and (first_tokens or not first))
