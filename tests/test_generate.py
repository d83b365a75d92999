"""Generation."""

import jax
import numpy as np
import pytest
from conftest import SMALL

from tinyllama_jax.config import UserError
from tinyllama_jax.inference.generate import _next_token, generate
from tinyllama_jax.model import llama


@pytest.fixture(scope="module")
def weights():
    # Larger than at the start, so that the likeliest token depends on the text.
    weights = llama.init_weights(SMALL, jax.random.key(3))
    return jax.tree.map(lambda w: 4 * w, weights)


def test_greedy_takes_the_likeliest_token_of_the_bare_forward_pass(weights):
    text = [5, 9, 301]
    for token in generate(SMALL, weights, text, max_tokens=12, eos=None):
        logits_V = llama.apply(SMALL, weights, np.array([text]))[0, -1]
        assert token == int(logits_V.argmax())
        text.append(token)
    assert len(set(text)) > 4, "a model that repeats itself would prove little"


def test_samples_follow_the_softmax_and_the_seed(weights):
    prompt, temperature = [5, 9, 301], 2.0
    logits_V = llama.apply(SMALL, weights, np.array([prompt]))[0, -1] / temperature
    wanted_V = np.asarray(jax.nn.softmax(logits_V))
    options = {"max_tokens": 1, "eos": None, "temperature": temperature}
    drawn = [generate(SMALL, weights, prompt, seed=seed, **options)[0] for seed in range(600)]
    likeliest = int(wanted_V.argmax())
    share, spread = wanted_V[likeliest], np.sqrt(wanted_V[likeliest] / 600)
    assert abs(drawn.count(likeliest) / 600 - share) < 4 * spread
    assert generate(SMALL, weights, prompt, seed=4, **options) == [drawn[4]]


def test_eos_ends_the_text_and_is_not_returned(weights):
    whole = generate(SMALL, weights, [5, 9], max_tokens=10, eos=None)
    cut = whole.index(whole[6])
    assert generate(SMALL, weights, [5, 9], max_tokens=10, eos=whole[6]) == whole[:cut]


def test_one_program_serves_every_length(weights):
    before = _next_token._cache_size()
    for length in (1, 7, 30):
        generate(SMALL, weights, [3] * length, max_tokens=2, eos=None)
    assert _next_token._cache_size() <= before + 1


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "empty"),
        ([400], {}, "outside the vocabulary"),
        ([-1], {}, "outside the vocabulary"),
        ([1] * 60, {"max_tokens": 5}, "pass the context of 64"),
        ([1], {"max_tokens": 0}, "max-tokens"),
        ([1], {"temperature": -0.5}, "temperature"),
    ],
)
def test_bad_requests_are_refused(weights, prompt, options, words):
    with pytest.raises(UserError, match=words):
        generate(SMALL, weights, prompt, **{"max_tokens": 4, "eos": None} | options)
