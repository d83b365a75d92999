"""Held-out loss and bits per byte, and the simple models they are measured against."""

import dataclasses
import gzip
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import ExecutionConfig, LlamaConfig
from tinyllama_jax.data.boundaries import loss_weights, segment_ids
from tinyllama_jax.model import llama
from tinyllama_jax.runtime.mesh import batch_sharding, process_rows, put_batch

Score = Callable[[llama.Weights, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats a token over `tokens` targets."""

    loss: float
    tokens: int

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits the model needs for a byte of the `text_bytes` behind the targets."""
        return self.loss * self.tokens / math.log(2) / text_bytes


def make_score(
    model: LlamaConfig,
    mesh: Mesh,
    dtype,
    execution: ExecutionConfig = ExecutionConfig(),
    *,
    mask_documents: bool = False,
) -> Score:
    """The compiled `score(weights, tokens_BS, weights_BT)`: sums as `llama.loss` gives them."""

    def score(weights, tokens_BS, weights_BT):
        # Rounded once, as in training.
        weights = jax.tree.map(lambda w: w.astype(dtype), llama.fold_gains(weights))
        weights = jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, P()))
        segment_ids_BT = segment_ids(tokens_BS[:, :-1]) if mask_documents else None
        return llama.loss(model, weights, tokens_BS, weights_BT, segment_ids_BT, execution)

    rows = batch_sharding(mesh, rows_axis=0)
    return jax.jit(score, in_shardings=(None, rows, rows))


def evaluate(
    score: Score, weights: llama.Weights, rows: Sequence[np.ndarray], batch_rows: int, mesh: Mesh
) -> Evaluation:
    """Mean loss over rows of context + 1 tokens, `batch_rows` at a time over all devices.

    All targets count but padding, the first tokens of documents too, whatever training leaves out.
    """
    losses, tokens, local = [], 0, process_rows(batch_rows)
    for start in range(0, len(rows), batch_rows):
        batch = [rows[i] for i in range(start, min(start + batch_rows, len(rows)))]
        tokens_BS = np.zeros((batch_rows, len(batch[0])), np.int32)
        tokens_BS[: len(batch)] = batch
        weights_BT = loss_weights(tokens_BS)
        weights_BT[len(batch) :] = 0  # rows that fill the batch
        tokens += int(weights_BT.sum())
        batch = put_batch(tokens_BS[local], mesh, 0), put_batch(weights_BT[local], mesh, 0)
        sums = score(weights, *batch)
        losses.append(sums[0])
    # Summed in fp64, once all batches are on their way.
    return Evaluation(loss=sum(map(float, losses)) / tokens, tokens=tokens)


def unigram_entropy(targets: np.ndarray, vocab_size: int) -> float:
    """Entropy of the targets' own frequencies, nats a token: what no context-free model beats."""
    counts = np.bincount(targets.ravel(), minlength=vocab_size)
    shares = counts[counts > 0] / targets.size
    return float(-(shares * np.log(shares)).sum())


def bigram_loss(train_rows: np.ndarray, rows: np.ndarray, vocab_size: int) -> float:
    """Loss of a bigram model counted on the training rows, nats a token that is no padding.

    Witten-Bell smoothing (Bell, Cleary and Witten 1990): a context hands the next-lower order the
    share of its tokens that were new kinds; below the unigrams lies the uniform distribution.
    """

    def pairs_of(rows):
        counted = loss_weights(rows) > 0
        return rows[:, :-1][counted].astype(np.int64), rows[:, 1:][counted].astype(np.int64)

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
    """Bits a byte that `gzip -9` needs for a text."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)
