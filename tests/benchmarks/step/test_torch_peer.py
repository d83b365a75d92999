"""The PyTorch step that ours is compared with computes the same."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from benchmarks.running import TINY
from benchmarks.step import training
from support.benchmark_workers import our_spec
from tinyllama_jax.conversion import huggingface
from tinyllama_jax.model.llama import init_weights


@pytest.mark.torch
def test_the_torch_peer_is_the_same_model_and_update(one_thread):
    import torch

    from benchmarks.step import torch_peer

    model = dataclasses.replace(TINY, rope_base=3e3, norm_eps=1e-3)
    spec = our_spec(model, 8)
    trainer = torch_peer.Trainer(
        model,
        device="cpu",
        precision="float32",
        optimizer=training.OPTIMIZER,
        steps=training.SCHEDULED,
        compiled=False,
    )
    weights = init_weights(model, jax.random.key(0))
    flat = traverse_util.flatten_dict(weights, sep=".")
    tensors = {
        name: torch.from_numpy(row.to_hf(np.asarray(flat[row.path][row.index])).copy())
        for name, row in huggingface.tensors(model).items()
    }
    torch_peer.load_hf_tensors(trainer.model, tensors)
    theirs = torch_peer.timed_steps(trainer, training.token_batches(spec), spec["begun"])
    ours = training.run(spec)  # starts from the same weights, those of seed 0
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=2e-5)
    assert ours["losses"][-1] != pytest.approx(ours["losses"][0], rel=1e-3), "it does not move"
