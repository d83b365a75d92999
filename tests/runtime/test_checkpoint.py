"""Checkpoints: written whole, read back equal, refused when they are not what was asked for."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tinyllama_jax.config import CheckpointConfig
from tinyllama_jax.errors import UserError
from tinyllama_jax.runtime import checkpoint
from tinyllama_jax.runtime.checkpoint import Checkpoints, locked
from tinyllama_jax.runtime.mesh import make_mesh, named_leaves
from tinyllama_jax.training.step import abstract_state, init_state

RUN = {"rows": 7, "fingerprint": {}, "config": {}}


@pytest.fixture
def state(config, mesh):
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
    # Random optimizer leaves, so that a reset one shows.
    keys = jax.random.split(jax.random.key(5), 100)
    leaves = [
        jax.random.normal(key, leaf.shape) if leaf.shape else leaf
        for key, leaf in zip(keys, jax.tree.leaves(state), strict=False)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def save(folder, state, *steps, keep=9, permanent_every=0):
    policy = CheckpointConfig(every=1, keep=keep, permanent_every=permanent_every)
    checkpoints = Checkpoints(folder, policy)
    for step in steps:
        checkpoints.save(state | {"step": jnp.asarray(step, jnp.int32)}, RUN | {"rows": step})
    checkpoints.close()


def assert_same(a, b):
    a, b = named_leaves(a), named_leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_whole_state_comes_back_on_any_mesh(config, state, tmp_path, devices):
    save(tmp_path, state, 4)
    mesh = make_mesh(devices=jax.devices()[:devices])
    target = abstract_state(config, mesh)
    found = Checkpoints(tmp_path).restore(4, target)
    assert_same(found, state | {"step": jnp.asarray(4, jnp.int32)})
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding
    weights = Checkpoints(tmp_path).restore_weights(4, target["weights"])
    assert_same(weights, state["weights"])


def test_newest_is_by_number_and_old_ones_go(state, tmp_path):
    save(tmp_path, state, 8, 9, 10, 12, keep=2, permanent_every=4)
    assert Checkpoints(tmp_path).steps() == [8, 10, 12]
    assert Checkpoints(tmp_path).newest() == (12, RUN | {"rows": 12})


def test_saving_a_step_again_changes_nothing(state, tmp_path):
    save(tmp_path, state, 3)
    before = (tmp_path / "checkpoints" / "3" / "sha256.json").read_text()
    save(tmp_path, jax.tree.map(jnp.zeros_like, state), 3)
    assert (tmp_path / "checkpoints" / "3" / "sha256.json").read_text() == before


def test_a_flipped_bit_falls_back_to_the_checkpoint_before(state, tmp_path, capsys):
    save(tmp_path, state, 1, 2)
    data = [p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.stat().st_size > 5000]
    largest = max((path for path in data if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert Checkpoints(tmp_path).newest()[0] == 1
    assert "Checkpoint 2" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["empty folder", "lost item", "broken hashes"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(state, tmp_path, damage, capsys):
    save(tmp_path, state, 1, 2)
    folder = tmp_path / "checkpoints"
    if damage == "empty folder":
        (folder / "7").mkdir()
    elif damage == "lost item":
        shutil.rmtree(folder / "2" / "optimizer")
    else:
        (folder / "2" / "sha256.json").write_text("{")
    step, _ = Checkpoints(tmp_path).newest()
    assert step == (2 if damage == "empty folder" else 1)
    assert "passed over" in capsys.readouterr().out


def test_checkpoints_that_are_all_damaged_are_kept_and_named(state, tmp_path):
    save(tmp_path, state, 1)
    (tmp_path / "checkpoints" / "1" / "sha256.json").write_text("{")
    for policy in (None, CheckpointConfig()):
        with pytest.raises(UserError, match="Every checkpoint"):
            Checkpoints(tmp_path, policy).newest()
    assert Checkpoints(tmp_path).steps() == [1]


def test_a_checkpoint_that_was_not_hashed_yet_still_counts(state, tmp_path):
    save(tmp_path, state, 1, 2)
    (tmp_path / "checkpoints" / "2" / "sha256.json").unlink()
    assert Checkpoints(tmp_path).newest()[0] == 2
    for file in (tmp_path / "checkpoints" / "2" / "run").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")  # as after a power cut
    assert Checkpoints(tmp_path).newest()[0] == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"layers": 3}, "attention_norm_D"), ({"swiglu_width": 96}, "down_FD"), ({"width": 64}, "")],
)
def test_another_model_is_refused_before_anything_is_loaded(config, state, tmp_path, fields, words):
    save(tmp_path, state, 1)
    model = dataclasses.replace(config.model, **fields)
    other = abstract_state(dataclasses.replace(config, model=model), make_mesh())
    with pytest.raises(UserError, match=f"of another model.*{words}"):
        Checkpoints(tmp_path).restore(1, other)


def test_another_dtype_is_refused(config, state, tmp_path, mesh):
    save(tmp_path, state, 1)
    target = abstract_state(config, mesh)
    target["weights"] = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding),
        target["weights"],
    )
    with pytest.raises(UserError, match="float32.*bfloat16"):
        Checkpoints(tmp_path).restore(1, target)


def test_a_full_disk_is_said_before_anything_is_written(state, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    with pytest.raises(UserError, match="make room"):
        checkpoints.save(state, RUN)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_save_that_fails_in_the_background_is_said_once(state, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    checkpoints.save(state | {"step": jnp.asarray(5, jnp.int32)}, RUN)
    wait = ocp.CheckpointManager.wait_until_finished

    def fail(manager):
        wait(manager)
        raise ValueError("no space left\nand many more lines")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
        with pytest.raises(UserError, match=r"Checkpoint 5 .*\(no space left\)"):
            checkpoints.finish()
    checkpoints.close()
    assert not (tmp_path / "checkpoints" / "5" / "sha256.json").exists()


def test_the_next_writer_removes_what_a_killed_save_left(state, tmp_path):
    save(tmp_path, state, 1)
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (left / "weights").mkdir(parents=True)
    assert Checkpoints(tmp_path).steps() == [1] and left.is_dir(), "a reader removes nothing"
    save(tmp_path, state, 3)
    assert not left.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()  # whoever runs this: root may write where others may not
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path):
        pass


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
    program = "import sys; sys.stdin.read()"
    holder = f"""
from pathlib import Path
from tinyllama_jax.runtime.checkpoint import locked
with locked(Path({str(tmp_path)!r})):
    print("held", flush=True)
    {program}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"), locked(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    with locked(tmp_path):
        pass
