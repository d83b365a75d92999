"""The published scores, and a model's own beside them."""

import json

import numpy as np
import pytest
from rich.console import Console

from tinyllama_jax.errors import UserError
from tinyllama_jax.evaluation import scores


@pytest.mark.parametrize("suite", scores.SUITES.values(), ids=scores.SUITES)
def test_the_published_rows_agree_with_their_means(suite):
    """A digit or a column that was copied wrong would move a score away from the mean."""
    for row in suite.published:
        assert len(row.scores) in (0, len(suite.columns))
        if row.scores and row.mean is not None:
            assert np.mean(row.scores) == pytest.approx(row.mean, abs=0.02)


def test_a_model_stands_below_the_published_ones_and_the_rest_apart():
    columns = scores.SUITES["commonsense"].columns
    found = {
        column.task: {"acc": 0.1, column.metric: 0.30 + 0.01 * i, f"{column.metric}_stderr": 0.02}
        for i, column in enumerate(columns)
    }
    found["lambada"] = {"perplexity": 12.5, "perplexity_stderr": 0.25}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(scores.render("step 9", found, ["commonsense", "lambada"], None))
    lines = [line.split() for line in capture.get().splitlines()]
    wanted = [f"{30 + i:.2f}" for i in range(7)]
    assert ["step", "9", *wanted, "33.00"] in lines
    assert lines.index(["step", "9", *wanted, "33.00"]) > lines.index(["OPT-1.3B", "51.44"])
    # A standard error stands beside its value, and not as a value of its own.
    assert ["lambada", "perplexity", "12.5000", "0.2500"] in lines
    assert "stderr" not in capture.get()
    assert not any(line[:1] == ["hellaswag"] for line in lines)


def test_results_of_several_evaluations_stand_together(tmp_path):
    scores.write_results(tmp_path, 10, {"piqa": {"acc": 0.5}}, None)
    scores.write_results(tmp_path, 20, {"piqa": {"acc": 0.6}}, 7)
    scores.write_results(tmp_path, 10, {"boolq": {"acc": 0.4}}, None)
    kept = json.loads((tmp_path / scores.FILE).read_text())
    assert {step: sorted(tasks) for step, tasks in kept.items()} == {
        "10": ["boolq", "piqa"],
        "20": ["piqa"],
    }
    assert kept["20"]["piqa"]["acc"] == 0.6 and kept["20"]["piqa"]["limit"] == 7
    (tmp_path / scores.FILE).write_text("[")
    with pytest.raises(UserError, match="damaged"):
        scores.write_results(tmp_path, 30, {}, None)
