"""Generation: what the cache, the batch and the sampler give."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.models import SMALL
from tinyllama_jax.errors import UserError
from tinyllama_jax.inference import generate as inference
from tinyllama_jax.inference.generate import CHUNK, Sampler, filter_logits, generate, stream
from tinyllama_jax.model import llama
from tinyllama_jax.runtime.mesh import make_mesh, shardings

MODEL = dataclasses.replace(SMALL, context=256)
PROMPTS = [[5, 9, 301], list(range(1, 71)), [7], list(range(300, 333))]


@pytest.fixture(scope="module")
def weights():
    # Larger than at the start, so that the likeliest token depends on the text.
    weights = llama.init_weights(MODEL, jax.random.key(3))
    return jax.tree.map(lambda w: 4 * w, weights)


@pytest.fixture(scope="module")
def greedy(weights):
    """New tokens of each of `PROMPTS`."""
    return generate(MODEL, weights, PROMPTS, max_tokens=120, eos=None)


def test_greedy_takes_the_likeliest_token_of_the_bare_forward_pass(weights, greedy):
    """Past every size of cache and chunk, in rows of unequal length."""
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        assert len(new) == 120 and len(set(new)) > 60, "a text that repeats proves little"
        logits_TV = llama.apply(MODEL, weights, np.array([prompt + new]))[0]
        wanted = logits_TV.argmax(-1)[len(prompt) - 1 : -1].tolist()
        assert new == wanted


SAMPLERS = [Sampler(), Sampler(5.0), Sampler(5.0, top_k=50, top_p=0.9)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_row_is_what_its_prompt_gives_alone(weights, sampler):
    """With a seed that counts on by the row, so that equal prompts still give unequal samples."""
    prompts = [*PROMPTS, PROMPTS[0]]
    options = {"max_tokens": 40, "eos": 17, "sampler": sampler}
    together = generate(MODEL, weights, prompts, seed=8, **options)
    for index, prompt in enumerate(prompts):
        assert generate(MODEL, weights, [prompt], seed=8 + index, **options) == [together[index]]
    assert (together[0] == together[4]) == (sampler.temperature == 0)


def test_samples_follow_the_softmax_of_what_the_filters_leave(weights):
    prompt = [5, 9, 301]
    logits_V = np.asarray(llama.apply(MODEL, weights, np.array([prompt]))[0, -1])
    for sampler in SAMPLERS[1:]:
        drawn = generate(MODEL, weights, [prompt] * 2000, max_tokens=1, eos=None, sampler=sampler)
        scaled_V = logits_V / sampler.temperature
        if sampler.top_k:
            scaled_V = filter_logits(jnp.array(scaled_V)[None], sampler.top_k, sampler.top_p)[0]
        wanted_V = np.asarray(jax.nn.softmax(scaled_V))
        found_V = np.bincount(np.ravel(drawn), minlength=len(wanted_V)) / 2000
        spread_V = np.sqrt(wanted_V * (1 - wanted_V) / 2000)
        assert (np.abs(found_V - wanted_V) <= 5 * spread_V + 1e-3).all()
        assert (found_V > 0).sum() > 5


@pytest.mark.torch
@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(0.7),
        Sampler(1.3, 11),
        Sampler(0.6, 0, 0.8),
        Sampler(2.0, 40, 0.5),
        Sampler(1.0, 999),
    ],
    ids=str,
)
def test_filters_leave_what_transformers_leaves(sampler):
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_BV = 3 * np.random.default_rng(0).standard_normal((20, 301)).astype(np.float32)
    logits_BV[3] = np.round(logits_BV[3])  # equals, of which the k likeliest keep more than k
    theirs = TemperatureLogitsWarper(sampler.temperature)(None, torch.from_numpy(logits_BV))
    if sampler.top_k:
        theirs = TopKLogitsWarper(sampler.top_k)(None, theirs)
    if sampler.top_p < 1:
        theirs = TopPLogitsWarper(sampler.top_p)(None, theirs)
        logits_BV, theirs = np.delete(logits_BV, 3, 0), np.delete(theirs.numpy(), 3, 0)
    ours = filter_logits(jnp.array(logits_BV) / sampler.temperature, sampler.top_k, sampler.top_p)
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(jax.nn.softmax(ours), jax.nn.softmax(theirs), atol=1e-6)


def test_eos_ends_a_row_and_is_not_returned(weights, greedy):
    eos = greedy[0][50]
    found = generate(MODEL, weights, PROMPTS, max_tokens=120, eos=eos)
    assert found == [row[: row.index(eos)] if eos in row else row for row in greedy]


def test_stop_is_asked_after_each_token_and_ends_its_row_alone(weights, greedy):
    def stop(new):
        return new[-1] == greedy[1][20]

    asked = []
    found = generate(
        MODEL, weights, PROMPTS, max_tokens=40, eos=None,
        stop=lambda new: asked.append(len(new)) or stop(new),
    )  # fmt: skip
    for row, whole in zip(found, greedy, strict=True):
        ends = [n for n in range(1, 41) if stop(whole[:n])]
        assert row == whole[: min(ends, default=40)]
    assert len(found[1]) <= 21 and len(asked) == sum(map(len, found))


def test_a_row_ends_where_its_context_is_full(weights):
    rows = generate(SMALL, weights, [[1] * 63, [1] * 40, [2]], max_tokens=30, eos=None)
    assert [len(row) for row in rows] == [1, 24, 30]


def test_ids_stream_in_chunks(weights, greedy):
    chunks = list(stream(MODEL, weights, PROMPTS, max_tokens=2 * CHUNK + 2, eos=None))
    assert [len(chunk[2]) for chunk in chunks] == [1, CHUNK, CHUNK, 1]
    assert sum((chunk[2] for chunk in chunks), []) == greedy[2][: 2 * CHUNK + 2]


def test_nothing_is_compiled_again_as_texts_grow(weights, greedy):
    compiled = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        other = [[3] * length for length in (2, 66, 90, 127)]
        for sampler in SAMPLERS:
            generate(MODEL, weights, other, max_tokens=100, eos=5, sampler=sampler, seed=3)
        assert not compiled
        generate(MODEL, weights, other[:3], max_tokens=100, eos=5)
        assert compiled, "the event has another name now"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_each_device_goes_on_with_its_own_rows(weights, monkeypatch):
    """As on one device, from weights in parts; eleven rows, and five that no one asked for."""
    mesh = make_mesh(data=2)
    parts = jax.device_put(weights, shardings(weights, mesh))
    go_on, calls = inference._go_on, []

    def watched(*args):
        cache = args[2].cache
        arrays = *cache.keys_BKSH, *cache.values_BKSH
        shapes = [(x.shape, x.addressable_shards[0].data.shape) for x in arrays]
        calls.append((args[:2] + jax.tree.map(jax.typeof, args[2:]), shapes))
        return go_on(*args)

    prompts = [*PROMPTS, *PROMPTS, *PROMPTS[:3]]
    for sampler in (Sampler(), Sampler(5.0, top_k=50, top_p=0.9)):
        options = {"max_tokens": 40, "eos": 17, "sampler": sampler, "seed": 8}
        alone = generate(MODEL, weights, prompts, **options)
        with jax.set_mesh(mesh), monkeypatch.context() as patch:
            patch.setattr(inference, "_go_on", watched)
            assert generate(MODEL, parts, prompts, **options) == alone
    for _, shapes in calls:
        for (B, *rest), part in shapes:
            assert B == 16 and part == (2, *rest)
    with jax.set_mesh(mesh):
        program = go_on.lower(*calls[-1][0]).compile().as_text()
    collective = r"all-\w+|reduce-scatter|collective-\w+"
    moved = re.findall(rf"= (\w+\[[\d,]*\])\S* ({collective})\(", program)
    assert moved == [(f"s32[16,{CHUNK}]", "all-gather")], "only new tokens leave their device"


@pytest.mark.torch
@pytest.mark.parametrize("shape", ["gqa", "gqa_rope_factor"])
def test_greedy_equals_that_of_transformers(shape):
    """Token for token, in fp32, of unequal prompts, past 100 tokens."""
    import torch

    from support.transformers_models import CONFIGS, random_weights, transformers_model

    config = dataclasses.replace(CONFIGS[shape], context=256)
    weights = random_weights(config)
    model = transformers_model(config, weights).eval()
    prompts = [[5, 9, 30], list(range(1, 71)), [7]]
    found = generate(config, weights, prompts, max_tokens=110, eos=None)
    for prompt, new in zip(prompts, found, strict=True):
        options = dict(max_new_tokens=110, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.no_grad():
            theirs = model.generate(torch.tensor([prompt]), **options)
        assert theirs[0, len(prompt) :].tolist() == new
    assert len(set(sum(found, []))) > 30, "texts that repeat prove little"


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "empty"),
        ([400], {}, "outside the vocabulary"),
        ([-1], {}, "outside the vocabulary"),
        ([1] * 64, {}, "64 tokens, and the context of 64"),
        ([1], {"max_tokens": 0}, "max-tokens"),
        ([1], {"seed": -1}, "seed"),
    ],
)
def test_bad_requests_are_refused(weights, prompt, options, words):
    with pytest.raises(UserError, match=words):
        generate(SMALL, weights, [[1], prompt], **{"max_tokens": 4, "eos": None} | options)


@pytest.mark.parametrize("options", [{"temperature": -0.5}, {"top_k": -1}, {"top_p": 0}])
def test_samplers_that_cannot_be_are_refused(options):
    with pytest.raises(UserError, match="--" + next(iter(options)).replace("_", "-")):
        Sampler(**options)
