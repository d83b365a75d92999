"""The order of training."""

import itertools
import shutil

import numpy as np
import pytest
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllama_jax.config import UserError
from tinyllama_jax.data.mixture import Mixture, Rows, batches, ledger


class Numbers:
    """A source whose row i is the number i, with the source's own offset."""

    context = 1

    def __init__(self, count, offset):
        self.count, self.offset = count, offset

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return np.array([self.offset + int(index)])

    def __repr__(self):
        return f"Numbers({self.offset})"


SOURCES = [Numbers(50, 0), Numbers(20, 1000)]


def read(rows, start=0, seed=0, per_batch=4, micro_batches=2, **process):
    found = batches(SOURCES, (0.7, 0.3), seed=seed, start=start, micro_batches=micro_batches,
                    rows=per_batch // micro_batches, **process)  # fmt: skip
    share = per_batch // process.get("processes", 1)
    return [batch for batch in itertools.islice(found, rows // per_batch)], share


def flat(rows, **options):
    return np.concatenate([batch.ravel() for batch in read(rows, **options)[0]])


@settings(deadline=None)
@given(weight=st.integers(1, 999), start=st.integers(0, 10**12), length=st.just(1000))
def test_any_thousand_rows_are_exact_to_within_one(weight, start, length):
    mixture = Mixture((weight / 1000, 1 - weight / 1000))
    before, after = mixture.counts(start), mixture.counts(start + length)
    for source, share in enumerate((weight / 1000, 1 - weight / 1000)):
        assert abs(after[source] - before[source] - share * length) <= 1 + 1e-6


@settings(deadline=None)
@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4), st.integers(0, 10**9))
def test_counts_add_up_and_locate_is_their_difference(weights, row):
    mixture = Mixture(weights)
    before, after = mixture.counts(row), mixture.counts(row + 1)
    source, index = mixture.locate(row)
    assert sum(before) == row
    assert index == before[source]
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        int(i == source) for i in range(len(weights))
    ]
    for count, weight in zip(before, weights, strict=True):
        assert abs(count - row * weight / sum(weights)) <= 2


def test_the_real_stream_holds_seventy_to_thirty():
    rows = flat(2000)
    for start in range(0, 1000, 37):
        assert abs(np.count_nonzero(rows[start : start + 1000] < 1000) - 700) <= 1


def test_every_row_is_read_once_an_epoch_in_a_fresh_order():
    prose = [row for row in flat(400) if row < 1000]
    epochs = [prose[start : start + 50] for start in range(0, 250, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_is_a_function_of_seed_and_row():
    rows = flat(400)
    np.testing.assert_array_equal(flat(400), rows)
    assert not np.array_equal(flat(400, seed=1), rows)
    for start in (4, 100, 396):
        np.testing.assert_array_equal(flat(400 - start, start=start), rows[start:])


def test_the_order_does_not_depend_on_the_number_of_readers():
    whole, _ = read(160, per_batch=16)
    for processes in (2, 4, 8):
        parts = [
            read(160, per_batch=16, process=process, processes=processes)[0]
            for process in range(processes)
        ]
        for batch, *pieces in zip(whole, *parts, strict=True):
            np.testing.assert_array_equal(np.concatenate(pieces, axis=1), batch)


def test_a_far_position_is_reached_at_once():
    mixture = Mixture((0.693584, 0.306416))
    source, row = mixture.locate(1_400_000 * 1024)
    assert row == mixture.counts(1_400_000 * 1024)[source]
    assert flat(4, start=10**12).shape == (4,)


def test_the_ledger_counts_tokens_and_epochs():
    found = ledger(["prose", "code"], (0.7, 0.3), SOURCES, 100)
    assert found == {
        "data/tokens": 100,
        "data/prose/tokens": 70,
        "data/prose/epochs": 70 / 50,
        "data/code/tokens": 30,
        "data/code/epochs": 30 / 20,
    }


def test_rows_cut_records_without_losing_a_target(data):
    path, size = data.sources[0].path, SMALL.vocab_size
    short, long = Rows(path, "train", 64, size), Rows(path, "train", 8192, size)
    assert len(short) == 128 * len(long)
    rows = [short[i] for i in range(128)]
    np.testing.assert_array_equal(np.concatenate([row[1:] for row in rows]), long[0][1:])
    np.testing.assert_array_equal(np.concatenate([row[:-1] for row in rows]), long[0][:-1])


def test_ids_outside_the_models_vocabulary_are_named(data):
    rows = Rows(data.sources[0].path, "train", 64, vocab_size=300)
    with pytest.raises(UserError, match="outside the model's vocabulary of 300"):
        for index in range(len(rows)):
            rows[index]


def test_the_error_of_a_row_reaches_the_reader_of_batches(data):
    rows = Rows(data.sources[0].path, "train", 64, vocab_size=300)
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        next(batches([rows], [1.0], seed=0, start=0, micro_batches=1, rows=64))


def test_a_context_or_split_that_does_not_fit_is_refused(data):
    with pytest.raises(UserError, match="must divide"):
        Rows(data.sources[0].path, "train", 100, 400)
    with pytest.raises(UserError, match="no test split"):
        Rows(data.sources[0].path, "test", 64, 400)


def test_flipped_bits_are_an_error_or_harmless_but_never_other_tokens(data, tmp_path):
    folder = tmp_path / "flipped"
    shutil.copytree(data.sources[0].path, folder)
    shard = next(folder.glob("*train.array_record*"))
    whole, rows = shard.read_bytes(), Rows(folder, "train", 8192, SMALL.vocab_size)
    true_rows = [rows[index] for index in range(len(rows))]
    caught, rng = 0, np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 40):
        content = bytearray(whole)
        content[place] ^= 4
        shard.write_bytes(content)
        try:
            found = Rows(folder, "train", 8192, SMALL.vocab_size)
            for index, row in enumerate(true_rows):
                np.testing.assert_array_equal(found[index], row)
        except UserError as error:
            assert "prepare it again" in str(error)
            caught += 1
    assert caught > 0
