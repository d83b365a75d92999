"""Processes of one machine: they fail loudly, end with their parent, and tell their progress."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.corpora import write_starcoder
from support.paths import GOLDEN
from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation import workers

ORPHANS = """
import sys
from pathlib import Path
from tinyllama_jax.preparation.corpus import prepare_corpus
from tinyllama_jax.preparation.readers import CORPORA

if __name__ == "__main__":
    prepare_corpus("files", CORPORA["files"], *map(Path, sys.argv[1:4]), processes=2, group_bytes=1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which processes are left")
def test_processes_end_with_a_parent_that_is_killed(data, tmp_path):
    source, script = tmp_path / "source", tmp_path / "script.py"
    source.mkdir()
    script.write_text(ORPHANS)
    row = json.dumps({"text": (GOLDEN / "text.txt").read_text()}) + "\n"
    for name in ("a.jsonl", "b.jsonl"):  # more than can be done before the kill
        (source / name).write_text(row * (40_000_000 // len(row)))
    parent = subprocess.Popen(
        [sys.executable, script, source, data.tokenizer, tmp_path / "d"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
    )
    partial, deadline = tmp_path / "d.partial", time.monotonic() + 60
    try:
        while not len(list(partial.glob(".train-*"))) == 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
    finally:
        parent.kill()
        parent.wait()
    children = [Path(f"/proc/{child}") for child in listed.split()]
    assert len(children) >= 2

    def running(process):
        try:
            return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    while any(map(running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, children))
    assert [path.name for path in partial.glob("train-*")] == []


def test_a_process_that_is_killed_or_fails_is_told_and_nothing_is_half_written(
    prepared, tmp_path, sources, monkeypatch
):
    source = tmp_path / "source"
    write_starcoder(source)
    (source / "c" / "train-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="c/train-00001-of-00002.parquet is damaged"):
        prepared("starcoder", source=source, processes=2)
    left = [path.name for path in (tmp_path / "d.partial").iterdir()]
    assert not any(name.startswith(".") for name in left), left
    assert not (tmp_path / "d").exists()

    monkeypatch.setattr(workers, "_begin_process", os.abort)
    with pytest.raises(UserError, match="was killed"):
        prepared("starcoder", "e", processes=2)  # as if for want of memory


def test_progress_is_left_for_programs(prepared, tmp_path, sources):
    assert prepared("slimpajama", worker=(1, 2)) is None
    (file,) = (tmp_path / "d.partial" / "groups").glob("progress*.json")
    facts = json.loads(file.read_text())
    assert file.name == "progress-1-of-2.json"
    assert facts["bytes_read"] == facts["bytes"] > 0 and facts["groups_done"] == facts["groups"]
    assert facts["tokens"] > 0 and facts["tokens_per_sec"] > 0
