"""One optimizer step."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest

from tinyllama_jax.config import ExecutionConfig
from tinyllama_jax.data.boundaries import loss_weights
from tinyllama_jax.data.tokenizer import BOS, EOS
from tinyllama_jax.errors import UserError
from tinyllama_jax.model import llama
from tinyllama_jax.runtime.mesh import check_fits, make_mesh, named_leaves, put_batch
from tinyllama_jax.training.step import abstract_state, init_state, make_step


def random_batches(config, count, seed=0):
    rows = config.batch_rows // config.micro_batches
    shape = (count, config.micro_batches, rows, config.model.context + 1)
    return np.random.default_rng(seed).integers(0, config.model.vocab_size, shape).astype(np.int32)


def train(config, mesh, batches, weights=loss_weights):
    """(losses, final state on the host)."""
    with jax.set_mesh(mesh):
        state, step, losses = init_state(config, mesh), make_step(config, mesh), []
        for tokens in batches:
            w = weights(tokens)
            state, metrics = step(state, put_batch(tokens, mesh, 1), put_batch(w, mesh, 1))
            losses.append(float(metrics["train/loss"]))
        return np.array(losses), jax.tree.map(np.asarray, state)


def worst(a, b):
    """Largest difference between two states, relative to each weight's own size."""
    a, b = named_leaves(a["weights"]), named_leaves(b["weights"])
    return max(np.linalg.norm(a[name] - b[name]) / np.linalg.norm(a[name]) for name in a)


def test_one_times_eight_equals_eight_times_one(config, mesh):
    # Unequal weights per micro-batch: a mean of means would be wrong.
    def uneven(tokens):
        weights = loss_weights(tokens)
        rows = weights.reshape(-1, weights.shape[-1])
        for row in range(len(rows)):
            rows[row, : 7 * row % 60] = 0
        return weights

    runs = []
    for micro_batches in (1, 8):
        split = dataclasses.replace(config, batch_rows=8, micro_batches=micro_batches)
        tokens = random_batches(split, 5).reshape(5, micro_batches, 8 // micro_batches, -1)
        runs.append(train(split, mesh, tokens, uneven))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=2e-6)
    assert worst(runs[0][1], runs[1][1]) < 2e-4


def test_the_gradient_norm_is_that_before_clipping(config, mesh):
    (tokens_ABS,) = random_batches(config, 1)

    @jax.jit
    def norm(weights):
        return optax.tree.norm(jax.grad(loss)(weights))

    def loss(weights):
        rows_BS = tokens_ABS.reshape(-1, tokens_ABS.shape[-1])
        logits_BTV = llama.apply(config.model, weights, rows_BS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows_BS[:, 1:]).mean()

    norms = {}
    for clip_norm in (1e-3, 1e3):
        optimizer = dataclasses.replace(config.optimizer, clip_norm=clip_norm)
        run = dataclasses.replace(config, optimizer=optimizer)
        with jax.set_mesh(mesh):
            state = init_state(run, mesh)
            exact = float(norm(state["weights"]))
            batch = put_batch(tokens_ABS, mesh, 1), put_batch(loss_weights(tokens_ABS), mesh, 1)
            norms[clip_norm] = float(make_step(run, mesh)(state, *batch)[1]["train/grad_norm"])
    assert exact > 0.1
    assert norms == pytest.approx(dict.fromkeys(norms, exact), rel=1e-4)


@pytest.mark.parametrize(
    "execution",
    [
        ExecutionConfig(recompute="elementwise"),
        ExecutionConfig(recompute="layers"),
        ExecutionConfig(),
        ExecutionConfig(recompute="elementwise", gather="layer"),
        ExecutionConfig(recompute="layers", gather="layer"),
    ],
    ids=str,
)
def test_every_way_to_compute_gives_the_losses_of_the_plain_one(config, mesh, execution):
    batches = random_batches(config, 4)
    plain, plain_state = train(config, mesh, batches)
    changed = dataclasses.replace(config, execution=execution)
    found, state = train(changed, make_mesh(data=2), batches)
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    assert worst(plain_state, state) < 2e-4


@pytest.mark.parametrize(
    "execution",
    [
        ExecutionConfig(),
        ExecutionConfig(recompute="elementwise", gather="layer"),
    ],
    ids=str,
)
def test_masked_documents_are_learned_as_if_each_stood_alone(config, execution):
    data = dataclasses.replace(config.data, mask_documents=True)
    config = dataclasses.replace(config, data=data, execution=execution)
    (tokens_ABS,) = random_batches(config, 1)
    rng = np.random.default_rng(1)
    tokens_ABS[rng.random(tokens_ABS.shape) < 0.1] = EOS
    tokens_ABS[:, ::3, -9:] = EOS  # padding
    documents, targets = [], []
    for row in tokens_ABS.reshape(-1, tokens_ABS.shape[-1]):
        begins = np.flatnonzero((row[:-2] == EOS) | (row[1:-1] == BOS)) + 1
        bounds = [0, *begins.tolist(), len(row) - 1]
        for start, end in itertools.pairwise(bounds):
            if start == 0 or row[start] != EOS:  # one of an eos alone is padding
                documents.append(row[start:end])
                targets.append(row[start + 1 : end + 1])
    # Whatever stands behind a document, it cannot see that.
    alone_DT = np.zeros((len(documents), config.model.context), np.int32)
    for row, document in zip(alone_DT, documents, strict=True):
        row[: len(document)] = document
    weights = llama.init_weights(config.model, jax.random.key(config.seed))
    logits = np.asarray(jax.nn.log_softmax(llama.apply(config.model, weights, alone_DT)))
    losses = [
        -logits[number, place, target]
        for number, wanted in enumerate(targets)
        for place, target in enumerate(wanted)
        if not documents[number][place] == target == EOS
    ]
    found, _ = train(config, make_mesh(), [tokens_ABS])
    assert found[0] == pytest.approx(np.mean(losses), rel=2e-6)


def test_moments_are_split_like_their_weight(config):
    mesh = make_mesh()
    state = named_leaves(abstract_state(config, mesh))
    for name, leaf in state.items():
        if leaf.shape:
            weight = next(n for n in state if n.startswith("weights.") and name.endswith(n[8:]))
            assert leaf.sharding == state[weight].sharding
            assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape, f"{name} is not split"


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(config, mesh):
    with jax.set_mesh(mesh):
        step = make_step(config, mesh)
        batches = random_batches(config, 4)
        state = init_state(config, mesh)
        for tokens, bad in zip(batches, (False, True, True, False), strict=True):
            before = jax.tree.map(np.array, state)
            weights = loss_weights(tokens)
            if bad:
                weights[0, 0, 0] = np.nan
            args = put_batch(tokens, mesh, 1), put_batch(weights, mesh, 1)
            state, metrics = step(state, *args)
            after = jax.tree.map(np.asarray, state)
            assert after["step"] == before["step"] + 1
            for part in ("weights", "optimizer"):
                same = jax.tree.map(np.array_equal, before[part], after[part])
                assert all(jax.tree.leaves(same)) == bad or before["step"] == 0
        assert (after["skipped"], after["skipped_in_a_row"]) == (2, 0)
        # Two updates were made, so the third would use the schedule's third rate.
        assert float(metrics["train/lr"]) == pytest.approx(1e-2 / 3, rel=1e-5)


def test_a_gradient_that_is_not_finite_is_left_out_though_the_loss_is_finite(config, mesh):
    (tokens_ABS,) = random_batches(config, 1)
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        state["weights"]["head_DV"] *= 1e25  # fp32 holds it, and not the square in a norm
        before = jax.tree.map(np.array, state)
        batch = put_batch(tokens_ABS, mesh, 1), put_batch(loss_weights(tokens_ABS), mesh, 1)
        state, metrics = make_step(config, mesh)(state, *batch)
    assert np.isfinite(metrics["train/loss"]) and not np.isfinite(metrics["train/grad_norm"])
    assert metrics["train/skipped"] == metrics["train/skipped_in_a_row"] == 1
    for part in ("weights", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state[part]), before[part])


def test_no_step_after_the_first_compiles(config, mesh):
    with jax.set_mesh(mesh):
        state, step = init_state(config, mesh), make_step(config, mesh)
        for tokens in random_batches(config, 3):
            args = (
                put_batch(tokens, mesh, 1),
                put_batch(loss_weights(tokens), mesh, 1),
            )
            state, _ = step(state, *args)
            assert step._cache_size() == 1


def test_the_state_is_donated(config, mesh):
    with jax.set_mesh(mesh):
        state, step = init_state(config, mesh), make_step(config, mesh)
        tokens = random_batches(config, 1)[0]
        args = (
            put_batch(tokens, mesh, 1),
            put_batch(loss_weights(tokens), mesh, 1),
        )
        step(state, *args)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state["weights"]))


def test_a_batch_or_model_that_cannot_be_split_is_refused(config):
    mesh = make_mesh()
    with pytest.raises(UserError, match="not divisible by the 8 devices"):
        check_fits(dataclasses.replace(config, batch_rows=12, micro_batches=1), mesh)
    model = dataclasses.replace(config.model, width=36)
    with pytest.raises(UserError, match="width"):
        check_fits(dataclasses.replace(config, model=model), mesh)
    with pytest.raises(UserError, match="data axis of 3"):
        make_mesh(data=3)
