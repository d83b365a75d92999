"""The same losses on every mesh, by both forms of the step."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from support.paths import ROOT

pytestmark = pytest.mark.long

STEPS = 20
GATHERS = ["step", "layer"]
ALONE = (1, 1)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}
# fp32 tells more than bf16, at a hundredth of the tolerance: in bf16, one mesh with both axes.
MESHES = {"float32": [(1, 8), (2, 4), (8, 1), (2, 8)], "bfloat16": [(2, 4)]}


def train(mesh_shape: tuple[int, int], gather: str, dtype: str) -> list[float]:
    """Losses of 20 steps on random rows."""
    import jax

    from support.models import SMALL
    from tinyllama_jax.config import Config, DataConfig, ExecutionConfig, OptimizerConfig
    from tinyllama_jax.data.boundaries import loss_weights
    from tinyllama_jax.runtime.mesh import make_mesh, put_batch
    from tinyllama_jax.training.step import init_state, make_step

    data, fsdp = mesh_shape
    config = Config(
        run_folder="",
        model=dataclasses.replace(SMALL, context=16),
        data=DataConfig(),
        steps=STEPS,
        batch_rows=48,
        micro_batches=3,  # the first, the last and one between
        compute_dtype=dtype,
        optimizer=OptimizerConfig(peak_lr=1e-2, end_lr=1e-3, warmup_steps=3),
        execution=ExecutionConfig(gather=gather, recompute="elementwise"),
    )
    mesh = make_mesh(data=data, devices=jax.devices()[: data * fsdp])
    shape = (STEPS, 3, 16, config.model.context + 1)
    batches = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    losses = []
    with jax.set_mesh(mesh):
        state, step = init_state(config, mesh), make_step(config, mesh)
        for tokens in batches:
            rows = (put_batch(x, mesh, 1) for x in (tokens, loss_weights(tokens)))
            state, metrics = step(state, *rows)
            losses.append(metrics["train/loss"])
    return [float(loss) for loss in losses]


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    """The losses on all meshes, from a process of its own: one mesh has 16 devices, the suite 8."""
    found = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "16", "PYTHONPATH": str(ROOT / "tests")},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(found.stdout)


@pytest.mark.parametrize(("dtype", "mesh"), [(d, m) for d in MESHES for m in MESHES[d]], ids=str)
@pytest.mark.parametrize("gather", GATHERS)
def test_every_mesh_gives_the_losses_of_one_device(losses, dtype, mesh, gather):
    alone, spread = (losses[f"{shape} {gather} {dtype}"] for shape in (ALONE, mesh))
    assert alone[-1] < alone[0] - 0.1, "it learns"
    np.testing.assert_allclose(spread, alone, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_forms_of_the_step_give_the_same_losses(losses, dtype):
    once, by_layer = (losses[f"{ALONE} {gather} {dtype}"] for gather in GATHERS)
    np.testing.assert_allclose(by_layer, once, rtol=TOLERANCE[dtype])


if __name__ == "__main__":
    combinations = [(m, g, d) for d in MESHES for m in (ALONE, *MESHES[d]) for g in GATHERS]
    print(json.dumps({f"{m} {g} {d}": train(m, g, d) for m, g, d in combinations}))
