"""Measures the loss on held-out text, and the losses of simple models to compare it with.

Losses are means in nats per token. Bits per byte compare models with different tokenizers.
"""

import dataclasses
import gzip
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from tinyllama_jax.config import ExecutionConfig, LlamaConfig
from tinyllama_jax.data.boundaries import loss_weights, segment_ids
from tinyllama_jax.model import llama
from tinyllama_jax.runtime.mesh import batch_sharding, process_rows, put_batch

Score = Callable[[llama.Weights, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The loss of a model on held-out text."""

    loss: float
    """The mean over all targets, in nats per token."""
    tokens: int
    """The number of targets."""

    def bits_per_byte(self, text_bytes: int) -> float:
        """The loss in bits per byte of text.

        Args:
          text_bytes: the number of bytes of the text that the targets spell.
        """
        return self.loss * self.tokens / math.log(2) / text_bytes


def make_score(
    model: LlamaConfig,
    mesh: Mesh,
    dtype: DTypeLike,
    execution: ExecutionConfig = ExecutionConfig(),
    *,
    mask_documents: bool = False,
) -> Score:
    """Makes the compiled function `score(weights, tokens_BS, weights_BT)`.

    It returns the sums that `llama.loss` returns for a batch of rows: of weighted losses and of
    weights.

    Args:
      model: the model.
      mesh: the mesh that the rows are spread over.
      dtype: the dtype to compute in.
      execution: how to compute attention and the loss.
      mask_documents: whether a token attends to its own document alone, as the model was trained.
    """

    def score(weights, tokens_BS, weights_BT):
        # Gains are folded in before the weights are rounded, as in training, so that each weight is
        # rounded once and the loss is that of the model as it trains. The constraint then gathers
        # the rounded weights on every device, once for a batch.
        weights = jax.tree.map(lambda w: w.astype(dtype), llama.fold_gains(weights))
        weights = jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, P()))
        segment_ids_BT = segment_ids(tokens_BS[:, :-1]) if mask_documents else None
        return llama.loss(model, weights, tokens_BS, weights_BT, segment_ids_BT, execution)

    rows = batch_sharding(mesh, rows_axis=0)
    return jax.jit(score, in_shardings=(None, rows, rows))


def evaluate(
    score: Score, weights: llama.Weights, rows: Sequence[np.ndarray], batch_rows: int, mesh: Mesh
) -> Evaluation:
    """Measures the mean loss over rows of tokens.

    All targets but padding count, including the first tokens of documents. Training may leave those
    out (`DataConfig.first_tokens`), but then losses of two runs would not compare.

    Args:
      score: the function to use, from `make_score`.
      weights: the weights, in any float dtype.
      rows: the rows, each of context + 1 tokens.
      batch_rows: the number of rows to score at a time, over all devices.
      mesh: the mesh of `score`.
    """
    losses, tokens, local = [], 0, process_rows(batch_rows)
    for start in range(0, len(rows), batch_rows):
        batch = [rows[i] for i in range(start, min(start + batch_rows, len(rows)))]
        tokens_BS = np.zeros((batch_rows, len(batch[0])), np.int32)
        tokens_BS[: len(batch)] = batch
        weights_BT = loss_weights(tokens_BS)
        # The last batch is filled up with rows that do not count. A smaller batch would have to be
        # compiled for itself.
        weights_BT[len(batch) :] = 0
        tokens += int(weights_BT.sum())
        batch = put_batch(tokens_BS[local], mesh, 0), put_batch(weights_BT[local], mesh, 0)
        sums = score(weights, *batch)
        losses.append(sums[0])
    # The sums are fetched only now. Fetching each in the loop would make the devices wait for the
    # host. Python adds them in fp64, where fp32 would lose digits over many batches.
    return Evaluation(loss=sum(map(float, losses)) / tokens, tokens=tokens)


def unigram_entropy(targets: np.ndarray, vocab_size: int) -> float:
    """The entropy of the tokens' own frequencies, in nats per token.

    No model that ignores context has a lower loss on these targets, so whatever lies below it was
    learned from context.
    """
    counts = np.bincount(targets.ravel(), minlength=vocab_size)
    shares = counts[counts > 0] / targets.size
    return float(-(shares * np.log(shares)).sum())


def bigram_loss(train_rows: np.ndarray, rows: np.ndarray, vocab_size: int) -> float:
    """The loss of a bigram model, in nats per token without padding.

    The model knows only the previous token. Its counts are smoothed by the method of Witten and
    Bell (Bell, Cleary and Witten 1990, Text Compression): the more different tokens have followed a
    context, the more probability goes to the unigram model, which gives some to the uniform
    distribution in the same way.

    Args:
      train_rows: the rows to count, of shape (rows, context + 1).
      rows: the rows to measure, of the same shape.
      vocab_size: the number of different tokens.
    """

    def pairs_of(rows):
        counted = loss_weights(rows) > 0
        return rows[:, :-1][counted].astype(np.int64), rows[:, 1:][counted].astype(np.int64)

    # A pair becomes one integer, context x vocab_size + target, so that the counts are a sorted
    # list. A dense table of all pairs would take gigabytes.
    kinds_by_context = np.zeros(vocab_size)
    contexts, targets = pairs_of(train_rows)
    seen, counts = np.unique(contexts * vocab_size + targets, return_counts=True)
    np.add.at(kinds_by_context, seen // vocab_size, 1)
    totals = np.bincount(contexts, minlength=vocab_size)
    unigrams = np.bincount(targets, minlength=vocab_size)
    kinds = np.count_nonzero(unigrams)
    unigram = (unigrams + kinds / vocab_size) / (unigrams.sum() + kinds)

    context, target = pairs_of(rows)
    asked = context * vocab_size + target
    place = np.minimum(np.searchsorted(seen, asked), len(seen) - 1)
    matches = np.where(seen[place] == asked, counts[place], 0)
    lower = kinds_by_context[context] * unigram[target]
    weight = totals[context] + kinds_by_context[context]
    probability = np.where(weight > 0, (matches + lower) / np.maximum(weight, 1), unigram[target])
    return float(-np.log(probability).mean())


def gzip_bits_per_byte(text: bytes) -> float:
    """The bits that `gzip -9` needs for each byte of a text."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)
