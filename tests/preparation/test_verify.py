"""A dataset that is not what its manifest says is told from one that is."""

import json
import re
from pathlib import Path

from tinyllama_jax import cli


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_finds_what_is_bad_and_names_it(prepared, tmp_path, capsys):
    prepared("starcoder")
    folder = tmp_path / "d"
    assert cli.main(["verify", str(folder)]) == 0
    assert "whole" in capsys.readouterr().out
    shard = next(folder.glob("*train.array_record-00000*"))

    def manifest(change):
        facts = json.loads((folder / "manifest.json").read_text())
        change(facts)
        (folder / "manifest.json").write_text(json.dumps(facts))

    def one_token_less(facts):
        facts["splits"]["train"]["tokens"] -= 1

    def fewer_pieces(facts):
        facts["tokenizer"]["pieces"] = 300

    def other_lengths():
        file = folder / "dataset_info.json"
        lengths = re.compile(r'("shardLengths": \[\s*")\d')
        file.write_text(lengths.sub(r"\g<1>9", file.read_text()))

    cases = {
        f"{shard.name} has another sha256": lambda: flip(shard),
        f"{shard.name} is missing": lambda: shard.unlink(),
        f"{shard.name} has 0 bytes": lambda: shard.write_bytes(b""),
        "not in manifest": lambda: (folder / "d-train.array_record-9").write_bytes(b""),
        "TFDS cannot read it": lambda: (folder / "features.json").unlink(),
        "dataset_info.json has other shards": other_lengths,
        "its shards": lambda: manifest(one_token_less),
        "of 300": lambda: manifest(fewer_pieces),
        "manifest.json is damaged": lambda: (folder / "manifest.json").write_text("{"),
    }
    for words, damage in cases.items():
        before = {path: path.read_bytes() for path in folder.iterdir()}
        damage()
        assert cli.main(["verify", str(folder)]) == 1
        assert words in capsys.readouterr().out
        for path in folder.iterdir():
            path.unlink()
        for path, content in before.items():
            path.write_bytes(content)
    assert cli.main(["verify", str(folder)]) == 0
    assert cli.main(["verify", str(tmp_path / "nowhere")]) == 2
