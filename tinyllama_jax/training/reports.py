"""What a run tells about itself on the way: speed, validation, tasks, samples, simple baselines."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.table import Table
from sentencepiece import SentencePieceProcessor

from tinyllama_jax.config import Config
from tinyllama_jax.data.boundaries import loss_weights
from tinyllama_jax.data.rows import Rows
from tinyllama_jax.data.tokenizer import EOS, ByteCounter
from tinyllama_jax.evaluation.held_out import (
    Score,
    bigram_loss,
    evaluate,
    gzip_bits_per_byte,
    unigram_entropy,
)
from tinyllama_jax.evaluation.scores import TaskScores
from tinyllama_jax.files import write_aside
from tinyllama_jax.inference.generate import Sampler, generate
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.performance.flops import mfu
from tinyllama_jax.runtime import processes
from tinyllama_jax.training.inputs import Inputs

Values = dict[str, float]
"""Metrics by name, as metrics.jsonl and TensorBoard have them."""
ScoreTasks = Callable[[Weights], TaskScores]

BASELINE_ROWS = 8192
"""Training rows that the bigram model is counted on: all of the demo's, and seconds of counting."""


class Clock:
    """The time of training, without the pauses for validation, samples and checkpoints."""

    def __init__(self, first_step: int):
        self._start, self._paused = time.monotonic(), 0.0
        self._last_step, self._last_time = first_step, 0.0
        self._first_report: tuple[int, float] | None = None

    def seconds(self) -> float:
        """Since the clock was made."""
        return time.monotonic() - self._start - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of this block."""
        before = time.monotonic()
        yield
        self._paused += time.monotonic() - before

    def rates(self, step: int, config: Config, mesh: Mesh) -> Values:
        """The speed since the last call, in tokens a second, and the share of the chips' peak.

        The share is there for chips whose peak is known.
        """
        now = self.seconds()
        rows = config.rows_after(step) - config.rows_after(self._last_step)
        per_second = rows * config.model.context / (now - self._last_time)
        self._last_step, self._last_time = step, now
        self._first_report = self._first_report or (step, now)
        values = {
            "perf/tokens_per_sec": per_second,
            "perf/tokens_per_sec_per_device": per_second / mesh.size,
        }
        kind = mesh.devices.flat[0].device_kind
        for name, causal in (("full", False), ("causal", True)):
            share = mfu(config.model, per_second / mesh.size, kind, causal=causal)
            if share is not None:
                values[f"perf/mfu_{name}"] = share
        return values

    def eta(self, step: int, config: Config) -> float | None:
        """Seconds left at the mean speed since the first report; None until there is a second.

        What came before the first report was mostly compilation, and would promise hours.
        """
        first_step, first_time = self._first_report or (step, 0.0)
        if step == first_step:
            return None
        first, now, last = map(config.rows_after, (first_step, step, config.steps))
        return (self.seconds() - first_time) / (now - first) * (last - now)


def line_of(values: Values) -> str:
    """The metrics of a step as the terminal shows them."""
    share = values.get("perf/mfu_full")
    return (
        f"loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}  "
        f"{values['perf/tokens_per_sec']:,.0f} tokens/s  "
        f"mfu {'n/a' if share is None else format(share, '.1%')}"
    )


def validate(
    weights: Weights,
    score: Score,
    held_out: Rows,
    count_bytes: ByteCounter,
    batch_rows: int,
    mesh: Mesh,
    rows: int | None = None,
) -> tuple[float, float]:
    """(loss in nats a token, bits per byte of text) on one source's held-out rows.

    Args:
      weights: of the run.
      score: as `held_out.make_score` gives it.
      held_out: the source's rows.
      count_bytes: tells how many bytes of text stand behind tokens.
      batch_rows: rows at a time, over all devices.
      mesh: the devices.
      rows: how many of the rows, from the first on; all by default.
    """
    count = len(held_out) if rows is None else min(rows, len(held_out))
    rows_BS = held_out.read(np.arange(count))
    result = evaluate(score, weights, list(rows_BS), batch_rows, mesh)
    return result.loss, result.bits_per_byte(count_bytes(rows_BS))


def make_task_scorer(
    config: Config, mesh: Mesh, tokenizer: SentencePieceProcessor, dtype: jnp.dtype
) -> ScoreTasks | None:
    """Scores weights by the tasks that the config names; None if it names none.

    Raises:
      UserError: the tasks or their data cannot be had.
    """
    asked = config.evaluation
    if not asked.every:
        return None
    from tinyllama_jax.evaluation import harness  # here, because lm-eval is an extra

    return harness.Tasks(
        asked.tasks,
        config.model,
        tokenizer,
        mesh,
        dtype,
        limit=asked.limit,
        include_path=None if asked.include_path is None else Path(asked.include_path),
        execution=config.execution,
        quiet=True,
    ).score


def task_values(scores: TaskScores) -> dict[str, Values]:
    """Metrics of each task by its name, without the standard errors."""
    return {
        task: {name: value for name, value in results.items() if not name.endswith("_stderr")}
        for task, results in scores.items()
    }


def sample(
    weights: Weights, tokenizer: SentencePieceProcessor, config: Config, dtype: jnp.dtype
) -> list[str]:
    """The config's prompts as the model continues them. All processes call it together."""
    prompts = [tokenizer.encode(prompt) for prompt in config.sample.prompts]
    new_ids = generate(
        config.model,
        jax.tree.map(lambda w: w.astype(dtype), weights),
        prompts,
        max_tokens=config.sample.max_tokens,
        sampler=Sampler(config.sample.temperature),
        seed=config.seed,
        eos=EOS,
    )
    return [tokenizer.decode(ids + new) for ids, new in zip(prompts, new_ids, strict=True)]


def write_samples(texts: list[str], run_folder: Path, step: int) -> None:
    """Writes `RUN/samples/STEP.txt`; of several processes the first does."""
    if processes.is_first():
        (run_folder / "samples").mkdir(exist_ok=True)
        write_aside(run_folder / "samples" / f"{step:07}.txt", "\n---\n".join(texts) + "\n")


def baselines(values: Values, inputs: Inputs, vocab_size: int) -> Table:
    """The last validation beside what simple models reach on the same held-out tokens.

    Args:
      values: `val/<source>/loss` and `val/<source>/bpb` of each source, over all held-out rows.
      inputs: of the run.
      vocab_size: of the model.
    """
    table = Table("held out", "tokens", "loss", "unigram", "bigram", "bits/byte", "gzip -9")
    for name, train, held_out in zip(inputs.names, inputs.train, inputs.held_out, strict=True):
        rows_BS = held_out.read(np.arange(len(held_out)))
        # Rows from all over the training split: the first ones are those of a few documents.
        some = np.linspace(0, len(train) - 1, min(len(train), BASELINE_ROWS)).astype(int)
        targets = rows_BS[:, 1:][loss_weights(rows_BS) > 0]
        # All rows are decoded at once: one by one, each would lose its leading space.
        text = inputs.tokenizer.decode(rows_BS[:, 1:].ravel().tolist()).encode()
        table.add_row(
            name,
            f"{len(targets):,}",
            f"{values[f'val/{name}/loss']:.3f}",
            f"{unigram_entropy(targets, vocab_size):.3f}",
            f"{bigram_loss(train.read(some), rows_BS, vocab_size):.3f}",
            f"{values[f'val/{name}/bpb']:.3f}",
            f"{gzip_bits_per_byte(text):.3f}",
        )
    return table
