"""Held-out loss, and the models it is measured against."""

import gzip
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.models import SMALL
from tinyllama_jax.data.boundaries import loss_weights
from tinyllama_jax.data.tokenizer import EOS
from tinyllama_jax.evaluation.held_out import (
    bigram_loss,
    evaluate,
    gzip_bits_per_byte,
    make_score,
    unigram_entropy,
)
from tinyllama_jax.model import llama
from tinyllama_jax.runtime.mesh import make_mesh


@pytest.mark.parametrize("devices", [1, 8])
def test_the_mean_is_over_all_rows_whatever_the_batch(devices):
    weights = llama.init_weights(SMALL, jax.random.key(0))
    rows = np.random.default_rng(0).integers(0, SMALL.vocab_size, (13, 65)).astype(np.int32)
    logits = np.asarray(llama.apply(SMALL, weights, rows[:, :-1]), np.float64)
    by_hand = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, rows[:, 1:, None], -1
    ).squeeze(-1)
    mesh = make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        score = make_score(SMALL, mesh, jnp.float32)
        found = evaluate(score, weights, list(rows), batch_rows=8, mesh=mesh)
    assert found.tokens == 13 * 64
    assert found.loss == pytest.approx(by_hand.mean(), rel=1e-6)
    assert found.bits_per_byte(2000) == pytest.approx(by_hand.sum() / math.log(2) / 2000, rel=1e-6)


def test_unigram_entropy_of_a_coin():
    assert unigram_entropy(np.array([[0, 1, 0, 1]]), 5) == pytest.approx(math.log(2))
    assert unigram_entropy(np.array([[3, 3, 3]]), 5) == 0


def targets_of(row):
    counted = loss_weights(row) > 0
    return [pair for pair, c in zip(zip(row[:-1], row[1:], strict=True), counted, strict=True) if c]


def test_bigram_loss_equals_counting_by_hand():
    rng = np.random.default_rng(1)
    train, held_out = rng.integers(0, 6, (20, 9)) % 5, rng.integers(0, 7, (4, 9))
    train[:, 6:], held_out[:2, 6:] = EOS, EOS  # padding, which counts for nothing
    pairs, contexts, unigrams = Counter(), Counter(), Counter()
    for row in train:
        for a, b in targets_of(row):
            pairs[a, b] += 1
            contexts[a] += 1
            unigrams[b] += 1
    kinds = Counter(a for a, _ in pairs)
    total, losses = sum(unigrams.values()), []
    for row in held_out:
        for a, b in targets_of(row):
            unigram = (unigrams[b] + len(unigrams) / 7) / (total + len(unigrams))
            bigram = unigram
            if contexts[a]:
                bigram = (pairs[a, b] + kinds[a] * unigram) / (contexts[a] + kinds[a])
            losses.append(-math.log(bigram))
    assert bigram_loss(train, held_out, 7) == pytest.approx(np.mean(losses))


def test_gzip_is_level_nine():
    text = b"the same words, the same words, the same words" * 20
    assert gzip_bits_per_byte(text) == 8 * len(gzip.compress(text, 9)) / len(text)
