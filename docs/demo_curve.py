"""Draws docs/demo.svg, the curve in the README: what the demo's run logged, beside simple models.

    make train                  # a run to draw: runs/demo, from data/demo
    python docs/demo_curve.py   # docs/demo.svg

The two levels of each source are those that the run prints when it ends: the entropy of the
held-out tokens' own frequencies, which no model without context can go below, and the loss of a
bigram model that was counted on the training rows.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.config_file import load_config
from tinyllama_jax.data.mixture import Rows
from tinyllama_jax.evaluation.held_out import bigram_loss, unigram_entropy
from tinyllama_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
COLORS = {"prose": "#c8384f", "code": "#2f6fb0"}


def levels(source: SourceConfig, context: int, vocab_size: int) -> tuple[float, float]:
    """Unigram entropy and bigram loss of the held-out rows of a dataset, in nats per token."""

    def rows(split: str) -> np.ndarray:
        found = Rows(ROOT / source.path, split, context, vocab_size)
        return np.stack([found[i] for i in range(len(found))])

    held_out = rows("validation")
    entropy = unigram_entropy(held_out[:, 1:].ravel(), vocab_size)
    # As many training rows as the run counts: all of prose, those spread over code.
    train = rows("train")
    some = np.linspace(0, len(train) - 1, min(len(train), 8192)).astype(int)
    return entropy, bigram_loss(train[some], held_out, vocab_size)


def draw(run: Path = ROOT / "runs/demo", out: Path = ROOT / "docs/demo.svg") -> None:
    """Draws the curve of the demo's run.

    Args:
      run: Folder of a complete run of configs/demo.py.
      out: The picture to write; its suffix is its format.
    """
    config = load_config(str(ROOT / "configs/demo.py"))
    metrics = read_metrics(run)

    def curve(name: str) -> tuple[list[int], list[float]]:
        points = {step: values[name] for step, values in metrics.items() if name in values}
        return list(points), list(points.values())

    # Text stays text in the file, and no two files differ by names drawn at random.
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "demo", "font.size": 10}
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    axes.plot(*curve("train/loss"), color="0.6", label="training batch (70 % prose, 30 % code)")
    for source in config.data.sources:
        color = COLORS[source.name]
        unigram, bigram = levels(source, config.model.context, config.model.vocab_size)
        for level, style in ((unigram, ":"), (bigram, "--")):
            axes.axhline(level, color=color, linestyle=style, linewidth=1)
        steps, losses = curve(f"val/{source.name}/loss")
        label = f"{source.name}, held out: {losses[-1]:.3f} at the end"
        axes.plot(steps, losses, "o-", color=color, label=label)
        print(f"{source.name}: loss {losses[-1]:.3f}, unigram {unigram:.3f}, bigram {bigram:.3f}")
    for style, what in ((":", "unigram entropy"), ("--", "bigram model")):
        axes.plot([], [], color="0.3", linestyle=style, linewidth=1, label=f"{what} of each")
    axes.set(xlim=(0, config.steps + 5), xlabel="step", ylabel="loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    tyro.cli(draw)
