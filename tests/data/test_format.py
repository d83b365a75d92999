"""What is wrong with a dataset on disk is said before anything is read of it."""

import json
import shutil

import pytest

from tinyllama_jax.data.format import read_manifest
from tinyllama_jax.errors import UserError


def test_a_damaged_dataset_is_named(data, tmp_path):
    with pytest.raises(UserError, match="no dataset"):
        read_manifest(tmp_path / "nowhere")
    folder = tmp_path / "d"
    shutil.copytree(data.sources[0].path, folder)
    shard = next(folder.glob("*train.array_record*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=shard.name):
        read_manifest(folder)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        read_manifest(folder)
    shard.write_bytes(whole)
    text = (folder / "manifest.json").read_text()
    for damaged in (text[:100], json.dumps({"splits": 3}), text.replace("padding_tokens", "x")):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            read_manifest(folder)
