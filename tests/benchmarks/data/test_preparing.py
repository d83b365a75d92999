"""The corpora that preparing is timed on hold the same text in both formats."""

from benchmarks.data import preparing


def test_both_corpora_hold_the_same_documents(tmp_path):
    sizes = preparing.write_corpora(tmp_path, 5_000_000)
    expected = sorted(preparing.texts(5_000_000))
    assert 5_000_000 < sum(len(text.encode()) for text in expected) < 5_300_000
    for name in ("slimpajama", "starcoder"):
        assert 500_000 < sizes[name] < 5_000_000  # compressed
        assert sorted(preparing.documents(name, tmp_path / name)) == expected
