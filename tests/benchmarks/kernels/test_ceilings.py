"""The speed of products and copies is measured and written."""

from benchmarks.kernels import ceilings


def test_ceilings_are_measured_and_written(tmp_path, capsys):
    options = ceilings.Options(seconds=0.001, quick=True, out=tmp_path / "table")
    assert ceilings.main(options) == 0
    table = (tmp_path / "table.md").read_text()
    assert table.count("TFLOP/s") == 5 and "| x + 1 over" in table
    assert "q/k/v: 64 x 64 x 80" in table and "of cpu" in capsys.readouterr().out
