"""Numbers of a run, on disk."""

import subprocess
import sys

import pytest

from tinyllama_jax.config import TINYLLAMA_1B
from tinyllama_jax.performance.flops import flops_per_token, mfu
from tinyllama_jax.training.metrics import Metrics, read_metrics


def test_steps_made_again_leave_no_old_line_and_a_torn_line_counts_for_nothing(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write(step, {"train/loss": float(step)})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 1, "train/lo\xff')  # killed within the line
    metrics = Metrics(tmp_path, 1)
    metrics.write(2, {"train/loss": 20.0})
    metrics.write(2, {"val/prose/loss": float("nan")})
    metrics.close()
    assert read_metrics(tmp_path) == {
        1: {"train/loss": 1.0},
        2: {"train/loss": 20.0, "val/prose/loss": None},
    }
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.torch
def test_a_run_leaves_torch_alone_and_others_may_still_import_it(tmp_path):
    script = f"""
import pathlib, sys
from tinyllama_jax.training import loop
from tinyllama_jax.training.metrics import Metrics
Metrics(pathlib.Path({str(tmp_path)!r}), 0).close()
assert "tensorboardX" in sys.modules and "torch" not in sys.modules
import torch
Metrics(pathlib.Path({str(tmp_path)!r}), 0).close()
assert sys.modules["torch"] is torch
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_flops_of_the_1b_are_those_of_the_recipe():
    assert flops_per_token(TINYLLAMA_1B, causal=False) == pytest.approx(7.314e9, rel=1e-4)
    assert flops_per_token(TINYLLAMA_1B, causal=True) == pytest.approx(6.761e9, rel=1e-4)


def test_mfu_of_the_original_and_of_an_unknown_chip():
    a100 = "NVIDIA A100-SXM4-40GB"
    assert mfu(TINYLLAMA_1B, 24_000, a100, causal=False) == pytest.approx(0.563, abs=5e-4)
    assert mfu(TINYLLAMA_1B, 24_000, a100, causal=True) == pytest.approx(0.520, abs=5e-4)
    assert mfu(TINYLLAMA_1B, 24_000, "cpu", causal=True) is None
