"""Runs that begin with the weights of others."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from support.models import SMALL
from support.paths import ROOT
from support.runs import assert_same_run, elsewhere, losses, stop_at, weights_of
from tinyllama_jax.conversion import huggingface
from tinyllama_jax.data.tokenizer import file_sha256
from tinyllama_jax.errors import UserError
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh, named_leaves, shardings
from tinyllama_jax.training import loop, warm_start
from tinyllama_jax.training.step import abstract_state


def start(config, mesh):
    found = warm_start.find_source(config)
    assert found is not None
    with jax.set_mesh(mesh):
        return found.state(config, mesh), found.origin


def assert_begins_with(state, wanted):
    found = named_leaves(state["weights"])
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
    for name, leaf in named_leaves({k: v for k, v in state.items() if k != "weights"}).items():
        assert not np.any(leaf), f"{name} is not fresh"


@pytest.mark.parametrize(("suffix", "step"), [("", 10), ("@9", 9), ("@10", 10)])
@pytest.mark.parametrize("devices", [1, 8])
def test_weights_come_from_the_run_bit_for_bit_and_all_else_is_fresh(
    config, mesh, source, suffix, step, devices
):
    config = dataclasses.replace(config, init_from=f"{source}{suffix}")
    target = make_mesh(devices=jax.devices()[:devices])
    state, origin = start(config, target)
    assert_begins_with(state, weights_of(config, source, step, mesh))
    wanted = shardings(state, target)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert origin["path"] == str(source) and origin["step"] == step
    assert len(origin["sha256"]) == 64


def test_the_hash_tells_two_checkpoints_apart_and_a_copy_is_the_same(source, tmp_path):
    first, second = (Checkpoints(source).sha256(step, "weights") for step in (9, 10))
    assert first != second
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    assert Checkpoints(copy).sha256(10, "weights") == second


@pytest.mark.parametrize("devices", [1, 8])
def test_weights_come_from_a_hugging_face_folder(config, mesh, source, tmp_path, devices):
    with jax.set_mesh(mesh):
        weights = Checkpoints(source).restore(9, abstract_state(config, mesh))["weights"]
    folder = tmp_path / "hf"
    huggingface.export(weights, SMALL, Path(config.data.tokenizer), folder)
    config = dataclasses.replace(config, init_from=str(folder))
    state, origin = start(config, make_mesh(devices=jax.devices()[:devices]))
    assert_begins_with(state, weights_of(config, source, 9, mesh))
    digest = file_sha256(folder / "model.safetensors")
    assert origin == {"path": str(folder), "step": None, "sha256": digest}
    with pytest.raises(UserError, match="has no steps"):
        warm_start.find_source(dataclasses.replace(config, init_from=f"{folder}@9"))
    several = {"max_shard_bytes": 60_000}
    huggingface.export(weights, SMALL, Path(config.data.tokenizer), folder, **several)
    found = warm_start.find_source(config)
    assert found is not None and found.origin["sha256"] not in (None, digest)
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match="There is no .*model-00002"):
        loop.run(config, mesh)
    assert not Path(config.run_folder).exists()


def test_a_longer_context_may_begin_with_a_shorter_ones_weights(config, mesh, source):
    model = dataclasses.replace(SMALL, context=128, rope_factor=2.0)
    config = dataclasses.replace(config, model=model, init_from=str(source))
    assert_begins_with(start(config, mesh)[0], weights_of(config, source, 10, mesh))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": 3}, "layers 2 and model.layers is 3"),
        ({"width": 96}, "width 48 and model.width is 96"),
        ({"layers": 3, "width": 96}, "layers 2 and"),  # the first of them
        ({"rope_base": 5e3}, "rope_base 10000.0 and"),
        ({"kv_heads": 3}, "kv_heads 2 and"),
    ],
)
def test_another_model_is_refused_by_the_first_thing_that_differs(config, source, fields, words):
    model = dataclasses.replace(config.model, **fields)
    with pytest.raises(UserError, match=words):
        warm_start.find_source(dataclasses.replace(config, model=model, init_from=str(source)))


def test_a_source_that_is_not_there_leaves_nothing_on_disk(config, mesh, source, tmp_path):
    (tmp_path / "empty").mkdir()
    for init_from, words in {
        "nowhere": "no run and no Hugging Face folder at nowhere",
        "nowhere@9": "no run and no Hugging Face folder at nowhere",
        f"{source}@11": r"no checkpoint of step 11, only \[9, 10\]",
        f"{source}@last": "after the @ stands a step",
        str(tmp_path / "empty"): "is no run",
    }.items():
        with pytest.raises(UserError, match=words):
            loop.run(dataclasses.replace(config, init_from=init_from), mesh)
    assert not Path(config.run_folder).exists()


def test_a_damaged_checkpoint_is_refused_when_asked_for_and_else_passed_over(
    config, mesh, source, capsys
):
    largest = max((source / "checkpoints/10/weights").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        warm_start.find_source(dataclasses.replace(config, init_from=f"{source}@10"))
    config = dataclasses.replace(config, init_from=str(source))
    assert start(config, mesh)[1]["step"] == 9
    assert "passed over" in capsys.readouterr().out


def test_weights_that_mean_other_pieces_are_refused(config, source):
    (source / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(UserError, match="another tokenizer"):
        warm_start.find_source(dataclasses.replace(config, init_from=str(source)))


def test_a_run_goes_on_after_its_source_was_deleted(config, mesh, source, monkeypatch):
    config = dataclasses.replace(config, init_from=f"{source}@9")
    unbroken, broken = elsewhere(config, "unbroken"), elsewhere(config, "broken")
    assert loop.run(unbroken, mesh)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert not loop.run(broken, mesh)
    origin = Checkpoints(unbroken.run_folder).newest()[1]["origin"]
    shutil.rmtree(source)
    assert loop.run(broken, mesh)
    assert_same_run(unbroken, broken)
    for run in (unbroken, broken):
        assert Checkpoints(run.run_folder).newest()[1]["origin"] == origin
        environment = json.loads((Path(run.run_folder) / "environment.json").read_text())
        assert environment["began_with"] == origin
        stored = json.loads((Path(run.run_folder) / "config.json").read_text())
        assert stored["init_from"] == f"{source}@9"
    # A fresh start would have had the loss of other weights.
    fresh = elsewhere(config, "fresh", init_from=None, steps=4)
    assert loop.run(fresh, mesh)
    assert losses(fresh)[1] != losses(broken)[1]


def test_the_config_of_code_8k_begins_with_the_3t_run():
    from tinyllama_jax.config_file import load_config

    configs = ROOT / "configs"
    base = load_config(str(configs / "tinyllama_1b.py"))
    assert load_config(str(configs / "tinyllama_code_8k.py")).init_from == base.run_folder
