"""The order of training."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import time
from fractions import Fraction
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from support.models import SMALL
from tinyllama_jax.config import DataConfig, SourceConfig, StageConfig
from tinyllama_jax.data import rows as rows_module
from tinyllama_jax.data.format import MANIFEST
from tinyllama_jax.data.mixture import (
    Mixture,
    _floor,
    batches,
    check_epochs,
    fingerprint,
    ledger,
    make_mixture,
)
from tinyllama_jax.data.rows import Rows
from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation.shards import (
    ShardWriter,
    shard_name,
    token_features,
    write_tfds_metadata,
)


class Numbers:
    """A source whose row i is the number i, with the source's own offset, in each of two tokens."""

    context, fill = 1, Fraction(1)

    def __init__(self, count, offset):
        self.count, self.offset = count, offset

    def __len__(self):
        return self.count

    def read(self, rows):
        return np.stack([self.offset + rows] * 2, axis=1)

    def __repr__(self):
        return f"Numbers({self.offset})"


SOURCES = [Numbers(50, 0), Numbers(20, 1000)]
SEVENTY_TO_THIRTY = Mixture((0.7, 0.3))


def read(rows, start=0, seed=0, per_batch=4, micro_batches=2, mixture=SEVENTY_TO_THIRTY, **process):
    found = batches(SOURCES, mixture, seed=seed, start=start, micro_batches=micro_batches,
                    rows=per_batch // micro_batches, **process)  # fmt: skip
    share = per_batch // process.get("processes", 1)
    return [batch for batch in itertools.islice(found, rows // per_batch)], share


def flat(rows, **options):
    return np.concatenate([batch[..., 0].ravel() for batch in read(rows, **options)[0]])


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


@pytest.mark.parametrize("threads,ahead", [(1, 1), (2, 3), (16, 20)])
def test_the_order_does_not_depend_on_readers_threads_or_prefetch(monkeypatch, threads, ahead):
    whole, _ = read(320, per_batch=16)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    monkeypatch.setattr(grain, "ReadOptions", lambda **_: options)
    for processes in (1, 2, 4, 8):
        parts = [
            read(320, per_batch=16, process=process, processes=processes)[0]
            for process in range(processes)
        ]
        union = [np.concatenate(pieces, axis=1) for pieces in zip(*parts, strict=True)]
        np.testing.assert_array_equal(union, whole)
        found = np.concatenate([batch[..., 0].ravel() for batch in union])
        for source, count in ((found[found < 1000], 50), (found[found >= 1000] - 1000, 20)):
            epochs = [source[start : start + count] for start in range(0, len(source), count)]
            assert len(epochs) > 4
            for epoch in epochs[:-1]:
                assert sorted(epoch) == list(range(count)), "each row once an epoch, none skipped"
            assert len(set(epochs[-1])) == len(epochs[-1])


def test_readers_of_a_dataset_divide_every_batch(data):
    sources = [Rows(s.path, "train", 64, SMALL.vocab_size) for s in data.sources]

    def first(**process):
        found = batches(sources, SEVENTY_TO_THIRTY, seed=3, start=48, micro_batches=2, rows=24,
                        **process)  # fmt: skip
        return list(itertools.islice(found, 20))

    whole = first()
    for processes in (2, 4, 8):
        parts = [first(process=process, processes=processes) for process in range(processes)]
        for batch, *pieces in zip(whole, *parts, strict=True):
            np.testing.assert_array_equal(np.concatenate(pieces, axis=1), batch)


@pytest.mark.parametrize("step", [0, 1, 1_400_000])
def test_a_position_is_restored_without_a_walk(step):
    """The first batch costs no more places and rows than are read ahead, wherever it stands."""
    places, rows = [], []

    class CountedMixture(Mixture):
        def locate(self, row):
            places.append(row)
            return super().locate(row)

    class CountedNumbers(Numbers):
        def read(self, asked):
            rows.extend(asked)
            return super().read(asked)

    mixture = CountedMixture((0.693584, 0.306416))
    sources = [CountedNumbers(10**9, offset) for offset in (0, 10**9)]
    start = step * 1024
    stream = batches(sources, mixture, seed=0, start=start, micro_batches=8, rows=128)
    first = next(stream)[..., 0]
    stream.close()
    before, after = mixture.counts(start), mixture.counts(start + 1024)
    assert len(np.unique(first)) == 1024
    assert np.count_nonzero(first < 10**9) == after[0] - before[0]
    # Eight batches ahead, and the four that threads may be at.
    assert len(rows) <= len(places) <= 13 * 1024
    assert min(places) == start and max(places) < start + 13 * 1024


@st.composite
def staged_weights(draw, sources):
    """(weights, stages) of mixtures whose sources come and go, at once or by ramps."""
    weight = st.sampled_from([0, 0, 1, 2, 3.5, 0.693584, 10])
    weights = st.tuples(*[weight] * sources).filter(any)
    stages, start = [], 0
    for _ in range(draw(st.integers(0, 4))):
        start += draw(st.integers(0, 40))
        ramp = draw(st.sampled_from([0, 1, 2, 7, 60]))
        stages.append((start, ramp, draw(weights)))
        start += ramp
    return draw(weights), stages


def shares_at(weights, stages, row):
    """The share of each source at a row's beginning and end, step by step as stages are defined."""
    norm = [Fraction(str(weight)) / sum(map(Fraction, map(str, weights))) for weight in weights]
    first = last = norm
    for start, ramp, new in stages:
        new = [Fraction(str(weight)) / sum(map(Fraction, map(str, new))) for weight in new]
        if row >= start + ramp:
            first = last = new
        elif row >= start:
            at = [Fraction(row + side - start, ramp) for side in (0, 1)]
            first, last = (
                [a + (b - a) * done for a, b in zip(first, new, strict=True)] for done in at
            )
            break
    return first, last


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4).flatmap(staged_weights))
def test_stages_are_what_a_walk_row_by_row_finds(drawn):
    weights, stages = drawn
    mixture, sources = Mixture(weights, stages), len(weights)
    ideal, counts = [Fraction(0)] * sources, [0] * sources
    off = []
    for row in range(200):
        assert mixture.counts(row) == counts
        # A share is linear over a row, so what it adds is the mean of its ends.
        first, last = shares_at(weights, stages, row)
        source, index = mixture.locate(row)
        assert index == counts[source]
        assert first[source] > 0 or last[source] > 0, "a source of weight 0 was read"
        counts[source] += 1
        ideal = [x + (a + b) / 2 for x, a, b in zip(ideal, first, last, strict=True)]
        off.append([count - x for count, x in zip(counts, ideal, strict=True)])
        assert counts[0] == math.floor(ideal[0] + Fraction(1, 2))
    low, high = np.min(off, axis=0), np.max(off, axis=0)
    if sources <= 2:
        assert all(b - a <= 1 for a, b in zip(low, high, strict=True)), "not any rows in a row"
    else:
        stretches = 1 + sum(1 + (ramp > 0) for _, ramp, _ in stages)
        assert max(map(abs, [*low, *high])) <= sources * stretches


@given(
    st.fractions(-50, 50, max_denominator=40),
    st.fractions(-9, 9, max_denominator=40),
    st.fractions(0, 99, max_denominator=40),
)
def test_the_floor_of_a_root_is_exact(p, q, radicand):
    found = _floor(p, q, radicand)

    def reached(bound):
        """p + q sqrt(radicand) >= bound, without a root."""
        left, square = bound - p, q * q * radicand
        return left <= 0 or left**2 <= square if q >= 0 else left <= 0 and left**2 >= square

    assert reached(found) and not reached(found + 1)


V1_1_TOKENS = [1_500_000_000_000, 6_000_000_000]


def v1_1_mixture(context=2048):
    names = ("slimpajama", "starcoder", "proofpile")
    sources = [SourceConfig(name, name, float(name == names[0])) for name in names]
    stage = StageConfig(V1_1_TOKENS[0], (75, 15, 10), V1_1_TOKENS[1])
    return make_mixture(DataConfig(tuple(sources), (stage,)), context)


def test_a_trillion_tokens_of_stages_are_exact_and_reached_at_once():
    mixture, first = v1_1_mixture(), 732_421_875  # 1.5e12 / 2,048
    end = (V1_1_TOKENS[0] + V1_1_TOKENS[1]) // 2048
    assert mixture.counts(first) == [first, 0, 0]
    # A ramp from 100 to 75 has a mean of 87.5.
    slimpajama, starcoder, proofpile = mixture.counts(end)
    assert abs(slimpajama - first - 0.875 * (end - first)) <= 1
    assert abs(starcoder - 0.075 * (end - first)) <= 1
    assert abs(proofpile - 0.05 * (end - first)) <= 1
    far = mixture.counts(976_562_500)  # 2e12 / 2,048
    for source, share in enumerate((0.75, 0.15, 0.1)):
        added = far[source] - (slimpajama, starcoder, proofpile)[source]
        assert abs(added - share * (976_562_500 - end)) <= 1
    for row in (first - 1, first, first + 1_000_003, end - 1, end, 1_400_000_000):
        source, index = mixture.locate(row)
        assert index == mixture.counts(row)[source] == mixture.counts(row + 1)[source] - 1
    start = time.perf_counter()
    for row in range(first + 1_000_000, first + 1_001_000):
        mixture.locate(row)
    assert time.perf_counter() - start < 1  # a walk would take hours


def test_a_context_that_cuts_a_stage_gives_it_the_whole_row():
    mixture = v1_1_mixture(context=8192)
    first = V1_1_TOKENS[0] // 8192
    assert mixture.counts(first + 10**9)[0] < first + 10**9
    assert mixture.counts(first) == [first, 0, 0]
    stage = StageConfig(130, (0.0, 1.0))
    sources = (SourceConfig("a", "a"), SourceConfig("b", "b", 0.0))
    mixture = make_mixture(DataConfig(sources, (stage,)), 64)
    assert [mixture.locate(row) for row in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_real_stream_follows_its_stages():
    mixture = Mixture((1, 0), [(100, 200, (0.25, 0.75)), (500, 0, (0, 1))])
    prose = flat(600, mixture=mixture) < 1000
    assert prose[:100].all() and not prose[500:].any()
    assert np.count_nonzero(prose[100:300]) == 125  # the mean of 1 and 1/4 of 200 rows
    assert np.count_nonzero(prose[300:500]) == 50
    for start in (96, 200, 496):
        np.testing.assert_array_equal(
            flat(600 - start, start=start, mixture=mixture) < 1000, prose[start:]
        )


def test_the_fingerprint_knows_the_stages(data):
    plain = fingerprint(data, 64, 0)
    found = [
        fingerprint(dataclasses.replace(data, stages=(StageConfig(640, (0.5, 0.5), ramp),)), 64, 0)
        for ramp in (0, 64)
    ]
    assert plain != found[0] != found[1] != plain


def test_the_ledger_counts_tokens_and_epochs():
    found = ledger(["prose", "code"], SEVENTY_TO_THIRTY, SOURCES, 100)
    assert found == {
        "data/tokens": 100,
        "data/prose/rows": 70,
        "data/prose/tokens": 70,
        "data/prose/epochs": 70 / 50,
        "data/code/rows": 30,
        "data/code/tokens": 30,
        "data/code/epochs": 30 / 20,
    }


@pytest.mark.parametrize(("start", "first_row"), [(64, 1), (100, 1), (127, 1), (128, 2)])
def test_a_stage_begins_with_the_row_that_holds_its_first_token(start, first_row):
    sources = (SourceConfig("before", "", 1.0), SourceConfig("after", "", 0.0))
    mixture = make_mixture(DataConfig(sources, (StageConfig(start, (0.0, 1.0)),)), 64)
    assert [mixture.locate(row)[0] for row in range(4)] == [0] * first_row + [1] * (4 - first_row)


def test_a_source_with_padding_gives_more_rows_and_the_same_tokens():
    sources = (SourceConfig("padded", "", 0.7), SourceConfig("full", "", 0.3))
    fills = [Fraction(4, 5), Fraction(1)]
    data = DataConfig(sources, (StageConfig(64 * 10**6, (0.2, 0.8)),))
    mixture = make_mixture(data, 64, fills)
    for start, share in ((0, Fraction(7, 10)), (10**6, Fraction(1, 5))):
        before = mixture.counts(start)
        for rows in (1000, 2000, 10**6):
            counts = [b - a for a, b in zip(before, mixture.counts(start + rows), strict=True)]
            tokens = [count * fill for count, fill in zip(counts, fills, strict=True)]
            assert abs(tokens[0] - share * sum(tokens)) <= 1, "not exact to within a row"
    padded, full = Numbers(50, 0), Numbers(20, 1000)
    padded.fill = fills[0]
    found = ledger(["padded", "full"], mixture, [padded, full], 1000)
    assert found["data/padded/rows"] + found["data/full/rows"] == 1000
    assert found["data/padded/tokens"] == round(found["data/padded/rows"] * 0.8)
    assert found["data/tokens"] == found["data/padded/tokens"] + found["data/full/tokens"] < 1000


def test_a_run_that_repeats_a_source_too_often_is_refused():
    def data(cap):
        return DataConfig((SourceConfig("prose", "", 0.7), SourceConfig("code", "", 0.3, cap)))

    for cap in (None, 15):
        check_epochs(data(cap), SEVENTY_TO_THIRTY, SOURCES, 1000)
    with pytest.raises(UserError, match="code 15.05 times and its max_epochs is 15"):
        check_epochs(data(15), SEVENTY_TO_THIRTY, SOURCES, 1003)


def test_rows_cut_records_without_losing_a_target(data):
    path, size = data.sources[0].path, SMALL.vocab_size
    short, long = Rows(path, "train", 64, size), Rows(path, "train", 8192, size)
    assert len(short) == 128 * len(long)
    rows = [short[i] for i in range(128)]
    np.testing.assert_array_equal(np.concatenate([row[1:] for row in rows]), long[0][1:])
    np.testing.assert_array_equal(np.concatenate([row[:-1] for row in rows]), long[0][:-1])


@pytest.fixture
def many_shards(data, tmp_path):
    """A dataset with a shard for each record, its folder and TFDS's own reading of it."""
    records = tfds.builder_from_directory(data.sources[0].path).as_data_source("train")
    features, shards = token_features(SMALL.vocab_size), []
    for index, record in enumerate(records):
        name = shard_name("prose", "train", index, len(records))
        writer = ShardWriter(tmp_path / name, features)
        writer.write([record["tokens"]])
        shards.append(writer.finish())
    splits = {"train": {"records": len(records), "padding_tokens": 0, "shards": shards}}
    write_tfds_metadata(tmp_path, "prose", features, splits)
    manifest = {"splits": splits, "tokenizer": {"sha256": ""}}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    return tmp_path, [record["tokens"] for record in records]


def test_rows_are_what_tfds_reads_in_any_order_and_repeated(many_shards):
    folder, records = many_shards
    rows = Rows(folder, "train", 2048, SMALL.vocab_size)
    assert len(rows) == 4 * len(records) and len(records) > 3
    asked = np.random.default_rng(0).integers(0, len(rows), 200)
    found = rows.read(asked)
    assert found.shape == (200, 2049) and found.dtype == np.int32
    for index, row in zip(asked, found, strict=True):
        start = index % 4 * 2048
        np.testing.assert_array_equal(row, records[index // 4][start : start + 2049])
        np.testing.assert_array_equal(row, rows[index])
    assert rows.read([]).shape == (0, 2049)
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError, match="asked"):
            rows[outside]


def test_no_more_than_so_many_shards_are_open_at_once(many_shards, monkeypatch):
    folder, records = many_shards
    monkeypatch.setattr(rows_module, "OPEN_SHARDS", 2)
    rows = Rows(folder, "train", 8192, SMALL.vocab_size)

    def open_files():
        there = [Path(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(path).startswith(str(folder)) for path in there)

    assert open_files() == 0, "a shard is opened when it is read"
    for _ in range(2):
        for index, tokens in enumerate(records):
            np.testing.assert_array_equal(rows[index], tokens)
            assert 1 <= open_files() <= 2


def test_the_first_id_outside_the_vocabulary_is_outside(data):
    folder = data.sources[0].path
    rows = Rows(folder, "train", 64, SMALL.vocab_size)
    largest = int(rows.read(range(len(rows))).max())
    assert Rows(folder, "train", 64, largest + 1).read(range(len(rows))).max() == largest
    with pytest.raises(UserError, match=f"token id {largest}, outside"):
        Rows(folder, "train", 64, largest).read(range(len(rows)))


def test_ids_outside_the_models_vocabulary_are_named(data):
    rows = Rows(data.sources[0].path, "train", 64, vocab_size=300)
    with pytest.raises(UserError, match="outside the model's vocabulary of 300"):
        rows.read(range(len(rows)))


def test_the_error_of_a_row_reaches_the_reader_of_batches(data):
    rows = Rows(data.sources[0].path, "train", 64, vocab_size=300)
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        next(batches([rows], Mixture([1.0]), seed=0, start=0, micro_batches=1, rows=64))


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
