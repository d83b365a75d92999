"""Reading is timed on datasets of few and of many shards."""

import numpy as np
import pytest

from benchmarks.data import reading


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(reading, "STEPS", {"page cache": 3, "cold disk": 3})
    monkeypatch.setattr(reading, "ROWS", 2)


@pytest.mark.parametrize("cache", ["page cache", "cold disk"])
def test_a_dataset_is_written_and_read(few_steps, tmp_path, cache):
    stream = np.arange(3, 30_003, dtype=np.uint16)
    dataset = reading.write_dataset(tmp_path / "dataset", stream, shards=3, records=7)
    assert len(list(dataset.glob("*array_record*"))) == 3
    reading.set_page_cache(dataset, cache)
    measured = reading.read(dataset, cache)
    assert measured.keys() == {"first", "speed", "third", "end"}
    assert measured["first"] > 0 and measured["speed"] > 0
    assert 0 <= measured["third"] <= measured["end"]
