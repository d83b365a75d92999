"""The same weights give the same logits and gradients in transformers and here."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from support.transformers_models import CONFIGS, hf_arrays, random_weights, transformers_model
from tinyllama_jax.config import Config, DataConfig, OptimizerConfig
from tinyllama_jax.model import llama
from tinyllama_jax.runtime.mesh import make_mesh
from tinyllama_jax.training.step import init_state, make_step

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """A config, its weights and transformers' model with them."""
    config = CONFIGS[request.param]
    weights = random_weights(config)
    return config, weights, transformers_model(config, weights).eval()


def random_tokens(config, length):
    return np.random.default_rng(length).integers(config.vocab_size, size=(2, length))


@pytest.mark.parametrize("length", [1, 7, 64])
def test_logits_equal_those_of_transformers(pair, length):
    import torch

    config, weights, model = pair
    tokens_BT = random_tokens(config, length)
    ours_BTV = jax.jit(functools.partial(llama.apply, config))(weights, tokens_BT)
    with torch.no_grad():
        theirs_BTV = model(torch.from_numpy(tokens_BT)).logits.numpy()
    assert theirs_BTV.std() > 0.5, "logits too small to tell anything"
    np.testing.assert_allclose(ours_BTV, theirs_BTV, rtol=0, atol=2e-5)


def test_gradients_equal_those_of_transformers(pair):
    import torch

    config, weights, model = pair
    tokens_BT = random_tokens(config, 64)

    @jax.jit
    @jax.grad
    def gradients(weights):
        logits_BTV = llama.apply(config, weights, tokens_BT[:, :-1])
        log_BTV = jax.nn.log_softmax(logits_BTV)
        return -jnp.take_along_axis(log_BTV, tokens_BT[:, 1:, None], axis=-1).mean()

    ours = hf_arrays(config, traverse_util.flatten_dict(gradients(weights), sep="."))
    model.zero_grad()
    tokens = torch.from_numpy(tokens_BT)
    logits = model(tokens[:, :-1]).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    theirs = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        size = np.linalg.norm(gradient)
        assert size > 0, name
        assert np.linalg.norm(ours[name] - gradient) < 1e-4 * size, name


def test_fifty_steps_of_the_recipe_give_the_losses_of_torch():
    """AdamW, warm-up, cosine, clipping and accumulation beside the same loop in torch."""
    import torch

    steps, micro_batches, rows = 50, 2, 4
    model = dataclasses.replace(CONFIGS["gqa"], vocab_size=101, context=32)
    optimizer = OptimizerConfig(peak_lr=5e-3, end_lr=5e-4, warmup_steps=8, clip_norm=1.0)
    config = Config(
        run_folder="unused",
        model=model,
        data=DataConfig(),
        steps=steps,
        batch_rows=micro_batches * rows,
        micro_batches=micro_batches,
        compute_dtype="float32",
        optimizer=optimizer,
    )
    # Walks that a model can learn: each row counts on by its own stride, with a slip now and then.
    generator = np.random.default_rng(2)
    shape = (steps, micro_batches, rows, 1)
    strides = generator.integers(1, 4, shape) + (generator.random((*shape[:3], 33)) < 0.1)
    batches = (np.cumsum(strides, axis=-1) % model.vocab_size).astype(np.int32)

    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state, step = init_state(config, mesh), make_step(config, mesh)
        theirs_model = transformers_model(model, state["weights"])
        ours, norms = [], []
        for tokens in batches:
            state, metrics = step(state, tokens, np.ones_like(tokens[..., 1:], np.float32))
            ours.append(float(metrics["train/loss"]))
            norms.append(float(metrics["train/grad_norm"]))

    adamw = torch.optim.AdamW(
        theirs_model.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    theirs = []
    for index, tokens in enumerate(batches):
        if index < optimizer.warmup_steps:
            lr = optimizer.peak_lr * index / optimizer.warmup_steps
        else:
            done = (index - optimizer.warmup_steps) / (steps - optimizer.warmup_steps)
            lr = optimizer.end_lr + 0.5 * (optimizer.peak_lr - optimizer.end_lr) * (
                1 + math.cos(math.pi * done)
            )
        adamw.param_groups[0]["lr"] = lr
        losses = []
        for rows_BS in torch.tensor(tokens).long():
            logits = theirs_model(rows_BS[:, :-1]).logits
            losses.append(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows_BS[:, 1:].flatten())
            )
            (losses[-1] / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(theirs_model.parameters(), optimizer.clip_norm)
        adamw.step()
        adamw.zero_grad()
        theirs.append(float(sum(losses).detach()) / micro_batches)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours[-1] < ours[0] - 1.5, "nothing was learnt, so little was compared"
    assert max(norms) > optimizer.clip_norm, "clipping never acted"
