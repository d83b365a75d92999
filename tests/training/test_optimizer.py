"""AdamW, the schedules and what decays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from support.models import SMALL
from tinyllama_jax.config import OptimizerConfig
from tinyllama_jax.model import llama
from tinyllama_jax.runtime.mesh import named_leaves
from tinyllama_jax.training.optimizer import NORM_GAINS, make_optimizer, make_schedule

STEPS = 1_430_512

# The 3T run's published learning rates, to the digits given.
PUBLISHED = {
    0: (0.0, 0.0),
    1_000: (2e-4, 1e-9),
    2_000: (4e-4, 1e-9),
    50_000: (3.990e-4, 5e-8),
    240_000: (3.759e-4, 5e-8),
    480_000: (3.094e-4, 5e-8),
    715_000: (2.205e-4, 5e-8),  # 2.20497e-4, which the published table cuts to 2.204e-4
    955_000: (1.298e-4, 5e-8),
    1_195_000: (6.36e-5, 5e-8),
    STEPS: (4e-5, 1e-9),
}


@pytest.mark.parametrize(("step", "lr"), PUBLISHED.items())
def test_the_learning_rate_is_the_originals(step, lr):
    schedule = make_schedule(OptimizerConfig(), STEPS)
    assert float(schedule(step)) == pytest.approx(lr[0], abs=lr[1] + 1e-10)


def by_hand(config, steps, step):
    """The learning rate in closed form, in Python's floats."""
    peak, end, warmup = config.peak_lr, config.end_lr, config.warmup_steps
    if step < warmup:
        return peak * step / warmup
    decay_from = steps - config.decay_steps if config.schedule == "wsd" else warmup
    done = min(max(step - decay_from, 0) / (steps - decay_from), 1)
    if config.schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return peak + (end - peak) * done


@pytest.mark.parametrize("warmup", [0, 1, 2000])
@pytest.mark.parametrize(("schedule", "decay"), [("cosine", 0), ("linear", 0), ("wsd", 143_051)])
def test_every_schedule_is_its_closed_form_at_many_steps(schedule, decay, warmup):
    config = OptimizerConfig(schedule, 7e-4, 3e-5, warmup, decay)
    corners = [0, 1, warmup - 1, warmup, warmup + 1, STEPS - decay - 1, STEPS - decay]
    corners += [STEPS - decay + 1, STEPS - 1, STEPS, STEPS + 9]
    steps = np.array([*(c for c in corners if c >= 0), *range(0, STEPS, 4_999)])
    found = jax.vmap(make_schedule(config, STEPS))(jnp.asarray(steps, jnp.int32))
    wanted = [by_hand(config, STEPS, int(step)) for step in steps]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-10)


def test_the_three_schedules_differ_where_they_should():
    """The closed form above, at points whose values are plain to see."""
    rates = {}
    for schedule, decay in [("cosine", 0), ("linear", 0), ("wsd", 20)]:
        config = OptimizerConfig(schedule, 1.0, 0.2, 10, decay)
        rates[schedule] = [float(make_schedule(config, 110)(step)) for step in (5, 60, 90, 100)]
    assert rates["linear"] == pytest.approx([0.5, 0.6, 0.36, 0.28])
    assert rates["wsd"] == pytest.approx([0.5, 1.0, 1.0, 0.6])
    assert rates["cosine"][:2] == pytest.approx([0.5, 0.6])
    assert rates["cosine"][2] < 0.36 and rates["cosine"][3] < 0.28


def test_a_decay_of_every_step_after_the_warm_up_is_the_line():
    line = make_schedule(OptimizerConfig("linear", warmup_steps=10), 100)
    wsd = make_schedule(OptimizerConfig("wsd", warmup_steps=10, decay_steps=90), 100)
    for step in range(101):
        assert float(wsd(step)) == float(line(step))


@pytest.mark.parametrize("matrices_only", [False, True])
def test_ten_updates_follow_the_closed_form(matrices_only):
    # No option has its default, and eps is large enough to be seen beside the gradients.
    config = OptimizerConfig(
        peak_lr=1e-2, end_lr=1e-3, warmup_steps=3, beta1=0.8, beta2=0.9, eps=1e-3,
        weight_decay=0.2, decay_matrices_only=matrices_only, clip_norm=0.5,
    )  # fmt: skip
    optimizer, schedule = make_optimizer(config, 10), make_schedule(config, 10)
    weights, generator = llama.init_weights(SMALL, jax.random.key(0)), np.random.default_rng(0)
    state = optimizer.init(weights)

    @jax.jit
    def update(grads, state, weights):
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    by_hand = {name: np.asarray(w, np.float64) for name, w in named_leaves(weights).items()}
    m = {name: np.zeros_like(w) for name, w in by_hand.items()}
    v = {name: np.zeros_like(w) for name, w in by_hand.items()}
    for step in range(10):
        grads = jax.tree.map(lambda w: generator.normal(size=w.shape).astype(np.float32), weights)
        weights, state = update(grads, state, weights)

        g = {name: np.asarray(x, np.float64) for name, x in named_leaves(grads).items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for name, w in by_hand.items():
            clipped = g[name] * min(1, 0.5 / norm)
            m[name] = 0.8 * m[name] + 0.2 * clipped
            v[name] = 0.9 * v[name] + 0.1 * clipped**2
            adam = (m[name] / (1 - 0.8 ** (step + 1))) / (
                np.sqrt(v[name] / (1 - 0.9 ** (step + 1))) + 1e-3
            )
            decay = 0.0 if matrices_only and name in NORM_GAINS else 0.2
            by_hand[name] = w - float(schedule(step)) * (adam + decay * w)
    for name, w in named_leaves(weights).items():
        np.testing.assert_allclose(w, by_hand[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_norm_gains_are_all_weights_that_are_vectors_within_a_layer():
    names = named_leaves(llama.abstract_weights(SMALL))
    vectors = {name for name, leaf in names.items() if leaf.ndim - name.startswith("blocks.") == 1}
    assert vectors == set(NORM_GAINS)
