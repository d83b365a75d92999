"""A corpus becomes the same bytes in every way of preparing it, interrupted or not."""

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from support.corpora import CASES, GROUP_BYTES, texts, write_slimpajama, write_starcoder
from support.paths import GOLDEN, ROOT
from tinyllama_jax import cli
from tinyllama_jax.data.format import RECORD, read_manifest
from tinyllama_jax.data.rows import Rows
from tinyllama_jax.data.tokenizer import file_sha256, load_tokenizer
from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation import corpus as corpus_module
from tinyllama_jax.preparation import shards
from tinyllama_jax.preparation.groups import make_groups
from tinyllama_jax.preparation.packing import Packer, pack
from tinyllama_jax.preparation.readers import is_held_out
from tinyllama_jax.preparation.verify import verify_dataset


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in the folder, so that no leftover is overlooked."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["slimpajama", "starcoder"])
def test_the_records_are_the_documents_in_order(prepared, name, data, tmp_path, sources):
    manifest = prepared(name)
    assert manifest == read_manifest(tmp_path / "d")
    tokenizer, corpus = load_tokenizer(data.tokenizer), CASES[name]
    seeds = {"slimpajama": {"train": range(6), "validation": [6], "test": [7]},
             "starcoder": {"train": range(3), "validation": range(3)}}[name]  # fmt: skip
    groups = make_groups(corpus_module.list_files(corpus, sources / name)[0], GROUP_BYTES)
    sizes = [len(group.files) for group in groups if group.split == "train"]
    assert len(sizes) > 1, "more than one shard is put to the test"
    assert set(manifest["splits"]) == set(seeds)
    for split in seeds:
        documents = [texts(seed, 24 if name == "slimpajama" else 99) for seed in seeds[split]]
        if name == "slimpajama":
            documents = [[t for n, t in enumerate(part) if n % 3 != 1] for part in documents]
        else:
            held = split == "validation"
            documents = [
                [t for t in part if is_held_out(t.encode(), corpus.held_out_share) == held]
                for part in documents
            ]
        wanted, tokens, at = [], 0, 0
        for size in sizes if len(documents) > 1 else [1]:
            part = sum(documents[at : at + size], [])
            ids = [tokenizer.encode(text) for text in part]
            wanted += pack(ids, Packer(400))
            tokens += sum(len(document) + 1 for document in ids)
            at += size
        found = tfds.builder_from_directory(tmp_path / "d").as_data_source(split)
        assert len(found) == len(wanted) > 0
        for record, other in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(record, other["tokens"])
        facts = manifest["splits"][split]
        assert facts["documents"] == sum(map(len, documents))
        assert facts["tokens"] == len(wanted) * (RECORD + 1)
        assert facts["tokens"] + facts["dropped_tokens"] == tokens
    dropped = {"meta.redpajama_set_name is RedPajamaGithub": 64} if name == "slimpajama" else {}
    assert manifest["skipped"] == {"dropped": dropped, "bad": []}
    assert len(Rows(tmp_path / "d", "train", 2048, 400)[0]) == 2049
    assert not (tmp_path / "d.partial").exists()


@pytest.mark.parametrize("name", CASES)
def test_processes_and_workers_write_the_same_bytes(prepared, name, tmp_path, capsys):
    prepared(name, "one")
    wanted = hashes(tmp_path / "one")
    prepared(name, "two", processes=2)
    assert hashes(tmp_path / "two") == wanted
    assert prepared(name, "three", worker=(98, 99)) is None  # no group is left for it
    # Threads of the tokenizer, where one group has all the cores.
    for worker in (2, 0):
        assert prepared(name, "three", worker=(worker, 3), processes=3) is None
        assert not (tmp_path / "three").exists()
    assert prepared(name, "three", worker=(1, 3))
    assert hashes(tmp_path / "three") == wanted
    before = (tmp_path / "one" / "manifest.json").stat().st_mtime_ns
    assert prepared(name, "one") == read_manifest(tmp_path / "one")
    assert (tmp_path / "one" / "manifest.json").stat().st_mtime_ns == before


def test_best_fit_holds_the_documents_whole(prepared, data, tmp_path):
    prepared("slimpajama", "two", best_fit=2048)
    prepared("slimpajama", "three", best_fit=2048, processes=2)
    assert hashes(tmp_path / "two") == hashes(tmp_path / "three")
    manifest = prepared("slimpajama", "one", best_fit=2048, group_bytes=10**9)
    assert manifest["packing"] == {"kind": "best fit", "row_tokens": 2048}
    assert not verify_dataset(tmp_path / "one")

    tokenizer, facts = load_tokenizer(data.tokenizer), manifest["splits"]["train"]
    documents = [t for seed in range(6) for n, t in enumerate(texts(seed)) if n % 3 != 1]
    wanted = {tuple([*tokenizer.encode(text), 2]) for text in documents}
    records = tfds.builder_from_directory(tmp_path / "one").as_data_source("train")
    # A record's last token begins the next row.
    stream = np.concatenate([record["tokens"][:RECORD] for record in records])
    parts = [part.tolist() for part in np.split(stream, np.flatnonzero(stream == 2) + 1)]
    found = {tuple(part) for part in parts if len(part) > 1}
    assert found < wanted and facts["cut_documents"] == 0
    assert facts["documents"] == len(wanted)
    assert facts["dropped_tokens"] == sum(map(len, wanted - found))
    assert facts["padding_tokens"] == sum(part == [2] for part in parts) > 0
    assert facts["fill_rate"] == 1 - facts["padding_tokens"] / len(stream)
    with pytest.raises(UserError, match="made from other files, options"):
        prepared("slimpajama", "one", best_fit=4096, group_bytes=10**9)


def test_groups_are_a_function_of_order_and_size():
    files = {"train": [(f"{n}.txt", size) for n, size in enumerate([5, 5, 100, 5, 5, 5])]}
    groups = make_groups(files, 4)
    assert [[size for _, size in group.files] for group in groups] == [[5, 5], [100], [5, 5, 5]]
    assert [group.index for group in groups] == [0, 1, 2]
    assert sum((group.files for group in groups), ()) == tuple(files["train"])
    assert len(make_groups(files, 10**6)) == 1


def test_an_interrupt_at_any_rename_loses_nothing(prepared, tmp_path, monkeypatch):
    """Between two renames nothing that counts changes on disk, so these are all the cases."""
    prepared("starcoder", "whole")
    wanted, rename, stopped = hashes(tmp_path / "whole"), Path.rename, 0
    for after in (False, True):
        for last in range(99):
            renames = 0

            def interrupted(path, target, last=last, after=after):
                nonlocal renames
                renames += 1
                if after or renames <= last:
                    rename(path, target)
                if renames > last:
                    raise KeyboardInterrupt

            monkeypatch.setattr(Path, "rename", interrupted)
            try:
                prepared("starcoder", "d")
                break  # there was no rename number `last`
            except KeyboardInterrupt:
                stopped += 1
            finally:
                monkeypatch.setattr(Path, "rename", rename)
            prepared("starcoder", "d")
            assert hashes(tmp_path / "d") == wanted
            assert not (tmp_path / "d.partial").exists()
            (tmp_path / "d").rename(tmp_path / f"seen-{after}-{last}")
    assert stopped > 15


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from support.corpora import CASES, GROUP_BYTES
from tinyllama_jax.preparation.corpus import prepare_corpus

def begin():
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        try:
            prepare_corpus("slimpajama", CASES["slimpajama"], *map(Path, sys.argv[1:4]),
                           processes=1, group_bytes=GROUP_BYTES)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child

rng, kills = random.Random(int(sys.argv[4])), 0
while True:
    child = begin()
    # Longer each time: a call does something before it is killed, and one of them ends.
    time.sleep(rng.uniform(0, 0.02 * (kills + 1)))
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
print(kills, status)
"""


def test_killed_at_random_and_begun_again_it_ends_in_the_same_bytes(
    prepared, sources, data, tmp_path
):
    prepared("slimpajama", "whole")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, sources / "slimpajama", data.tokenizer, tmp_path / "d", "7"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    kills, status = map(int, done.stdout.split())
    assert status == 0, done.stderr
    assert kills >= 3
    assert hashes(tmp_path / "d") == hashes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "whole"]


def test_bad_input_is_left_out_counted_and_told(prepared, tmp_path, capsys):
    source = tmp_path / "source"
    write_slimpajama(source)
    bad = source / "train/chunk1/example_train_0.jsonl.zst"
    bad.write_bytes(bad.read_bytes()[:-9])
    with pytest.raises(UserError, match="example_train_0.jsonl.zst is damaged or truncated"):
        prepared("slimpajama", source=source)
    manifest = prepared("slimpajama", source=source, on_error="skip")
    (facts,) = manifest["skipped"]["bad"]
    assert facts["file"] == "train/chunk1/example_train_0.jsonl.zst"
    assert facts["reason"] == "is damaged or truncated" and "after row" in facts["detail"]
    assert verify_dataset(tmp_path / "d") == []
    assert "BAD INPUT in 1 place" in corpus_module.summary(manifest)


def test_what_was_skipped_is_not_taken_over_by_a_call_that_stops(prepared, tmp_path):
    source = tmp_path / "source"
    write_slimpajama(source)
    bad = source / "train/chunk1/example_train_0.jsonl.zst"
    bad.write_bytes(bad.read_bytes()[:-9])
    assert prepared("slimpajama", source=source, on_error="skip", worker=(0, 2)) is None
    with pytest.raises(UserError, match="is damaged or truncated"):
        prepared("slimpajama", source=source)


@pytest.mark.parametrize("moment", ["run_groups", "_wait_for_lock"])
def test_a_worker_that_another_overtakes_is_content(prepared, tmp_path, monkeypatch, moment):
    function = getattr(corpus_module, moment)

    def others_are_faster(*_, **__):
        monkeypatch.setattr(corpus_module, moment, function)
        prepared("starcoder")

    monkeypatch.setattr(corpus_module, moment, others_are_faster)
    assert prepared("starcoder") == read_manifest(tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_shard_that_was_damaged_while_it_waits_is_written_again(prepared, tmp_path):
    prepared("starcoder", "whole")
    prepared("starcoder", worker=(0, 2))
    shard = next((tmp_path / "d.partial").glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    prepared("starcoder")
    assert hashes(tmp_path / "d") == hashes(tmp_path / "whole")


def test_records_that_did_not_arrive_are_missed(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "record_count", lambda path: 0)
    with pytest.raises(UserError, match="0 of [0-9]+ records arrived"):
        prepared("starcoder")
    assert [path.name for path in (tmp_path / "d.partial").glob("*train*")] == []


def test_other_files_or_options_do_not_mix_with_what_is_there(prepared, tmp_path):
    source = tmp_path / "source"
    write_starcoder(source)
    assert prepared("starcoder", source=source, worker=(0, 2)) is None
    (source / "ada" / "more.parquet").write_bytes(
        (source / "ada").glob("*").__next__().read_bytes()
    )
    with pytest.raises(UserError, match="was begun with other files"):
        prepared("starcoder", source=source)
    prepared("starcoder", "e")
    with pytest.raises(UserError, match="made from other files"):
        prepared("starcoder", "e", source=source)
    (tmp_path / "f").mkdir()
    with pytest.raises(UserError, match="no dataset: remove it"):
        prepared("starcoder", "f")


# Files that may not grow fail as files on a full disk do.
LIMITED = """
import resource, sys
from tinyllama_jax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.exit(main(sys.argv[1:]))
"""

# A disk of its own in the memory of a new namespace, which needs no root; then there is room.
FULL = """
import os, shutil, subprocess, sys
from tinyllama_jax.cli import main
disk, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], check=True)
command += ["--out", disk + "/d", "--processes", "1"]
found = main(command), os.listdir(disk + "/d.partial"), os.listdir(disk + "/d.partial/groups")
subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
print(*found, main(command), sep=chr(10))
shutil.copytree(disk + "/d", disk + ".copy")
"""


@pytest.fixture
def tinystories(data, tmp_path):
    """A command that prepares a corpus of more than one record, but for its --out."""
    source = tmp_path / "source"
    (source / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(pa.table({"text": texts(0, 400)}), source / f"data/{split}-0.parquet")
    return ["prepare", "tinystories", "--source", str(source), "--tokenizer", data.tokenizer]


def test_a_file_that_cannot_grow_costs_one_sentence_and_the_same_command_goes_on(
    tinystories, tmp_path, capsys
):
    command = [*tinystories, "--out", str(tmp_path / "d")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2, done.stderr
    assert "make room on that disk" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "d.partial").iterdir()) == ["groups", "plan.json"]
    assert cli.main(command) == 0
    assert "train" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "d")]) == 0
    assert cli.main([*tinystories, "--out", str(tmp_path / "roomy"), "--processes", "1"]) == 0
    assert hashes(tmp_path / "d") == hashes(tmp_path / "roomy")


def test_a_full_disk_in_the_middle_leaves_no_shard_and_room_brings_the_same_bytes(
    tinystories, tmp_path
):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"]).returncode:
        pytest.skip("this system gives no user namespace to mount a small disk in")
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        [*namespace, sys.executable, "-c", FULL, tmp_path / "disk", *tinystories],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    code, left, groups, code_with_room = done.stdout.splitlines()[-4:]
    assert code == "2" and sorted(ast.literal_eval(left)) == ["groups", "plan.json"]
    assert not [name for name in ast.literal_eval(groups) if name[0].isdigit()], "none was done"
    assert "make room on that disk" in done.stderr and done.stderr.count("\n") == 1
    assert code_with_room == "0"
    assert cli.main([*tinystories, "--out", str(tmp_path / "roomy"), "--processes", "1"]) == 0
    assert hashes(tmp_path / "disk.copy") == hashes(tmp_path / "roomy")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_the_exit_code_of_what_goes_on(number, monkeypatch, capsys):
    monkeypatch.setattr(
        corpus_module, "prepare_corpus", lambda *_, **__: os.kill(os.getpid(), number)
    )
    argv = ["prepare", "files", "--source", ".", "--tokenizer", "t", "--out", "out"]
    # A suite that was started in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(argv) == 75
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["starcoder"], "--source"),
        (["starcoder", "--source", "nowhere"], "no folder nowhere"),
        (["starcoder", "--source", ".", "--field", "x"], "are for `prepare files`"),
        (["files", "--source", ".", "--drop", "x"], "FIELD=VALUE"),
        (["files", "--source", ".", "--worker", "3/3"], "give i/n"),
        (["files", "--source", ".", "--worker", "x"], "give i/n"),
        (["files", "--source", "."], "no readable file"),
        (["files", "--source", ".", "--dtype", "uint16"], "is for `prepare tokens`"),
        (["files", "--source", ".", "--held-out", "1"], "a share between 0 and 1"),
        (["tinystories", "--source", ".", "--held-out", "0.1"], "a validation split of its own"),
        (["files", "--source", ".", "--beam-options", "x=1"], "are for a --runner"),
        (["files", "--source", ".", "--runner", "x", "--worker", "0/2"], "of its own"),
        (["stdlib", "--field", "x"], "leave the rest out"),
        (["stdlib", "--runner", "x"], "leave the rest out"),
        (["stdlib", "--held-out", "0.1"], "leave the rest out"),
    ],
)
def test_a_mistaken_command_costs_one_message(argv, words, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *argv, "--tokenizer", data.tokenizer, "--out", "out"]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_small_corpus_of_ones_own_needs_a_larger_share_for_validation(data, tmp_path, capsys):
    source, out = tmp_path / "notes", tmp_path / "out"
    source.mkdir()
    lines = (GOLDEN / "text.txt").read_text().splitlines()
    notes = ["\n".join(random.Random(index).sample(lines, len(lines))) for index in range(60)]
    for index, note in enumerate(notes):
        (source / f"{index}.txt").write_text(note)
    command = ["prepare", "files", "--source", source, "--tokenizer", data.tokenizer, "--out", out]
    command = [*map(str, command), "--processes", "1"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "give more text or a larger --held-out, and remove" in said
    shutil.rmtree(said.split("and remove ")[1].rstrip(".\n"))
    assert cli.main([*command, "--held-out", "0.3"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["held_out_share"] == 0.3
    counts = {split: facts["documents"] for split, facts in manifest["splits"].items()}
    held = sum(is_held_out(note.encode(), 0.3) for note in notes)
    assert counts == {"train": 60 - held, "validation": held}
    assert cli.main(["verify", str(out)]) == 0


def test_beam_that_is_not_installed_is_named(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "tinyllama_jax.preparation.beam", raising=False)
    monkeypatch.delattr("tinyllama_jax.preparation.beam", raising=False)
    with pytest.raises(UserError, match=r"pip install 'tinyllama-jax\[beam\]'"):
        prepared("starcoder", runner="DirectRunner", processes=None)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_tokenizer_is_refused(sources, tmp_path, capsys):
    (tmp_path / "t.model").write_bytes(b"no model")
    argv = ["prepare", "starcoder", "--source", sources / "starcoder", "--tokenizer",
            tmp_path / "t.model", "--out", tmp_path / "out"]  # fmt: skip
    assert cli.main([str(arg) for arg in argv]) == 2
    assert "not a sentencepiece model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]
