"""A corpus becomes the same bytes in every way of preparing it, interrupted or not."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from conftest import GOLDEN

from tinyllama_jax import cli
from tinyllama_jax.config import UserError
from tinyllama_jax.data import corpus as corpus_module
from tinyllama_jax.data import shards, workers
from tinyllama_jax.data.corpus import prepare_corpus
from tinyllama_jax.data.groups import make_groups
from tinyllama_jax.data.mixture import Rows
from tinyllama_jax.data.packing import RECORD, pack
from tinyllama_jax.data.prepare import read_manifest
from tinyllama_jax.data.readers import CORPORA, is_held_out
from tinyllama_jax.data.tokenizer import file_sha256, load_tokenizer
from tinyllama_jax.data.verify import verify_dataset

GROUP_BYTES = 5_000
# So few documents need a larger share for a record of validation in each group.
CASES = {
    "slimpajama": CORPORA["slimpajama"],
    "starcoder": dataclasses.replace(CORPORA["starcoder"], held_out_share=0.4),
}


def texts(seed: int, count: int = 24) -> list[str]:
    lines = (GOLDEN / "text.txt").read_text().splitlines()
    rng = np.random.default_rng(seed)
    return ["\n".join(rng.permutation(lines)[: rng.integers(5, len(lines))]) for _ in range(count)]


def write_slimpajama(folder: Path) -> None:
    sets = ["RedPajamaC4", "RedPajamaGithub", "RedPajamaArXiv"]
    for seed, name in enumerate(
        [f"train/chunk{c}/example_train_{f}" for c in (1, 10, 2) for f in (0, 1)]
        + ["validation/chunk1/example_holdout_0", "test/chunk1/example_test_0"]
    ):
        rows = [
            {"text": text, "meta": {"redpajama_set_name": sets[n % 3]}}
            for n, text in enumerate(texts(seed))
        ]
        path = folder / f"{name}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(pa.compress(data, codec="zstd", asbytes=True))


def write_starcoder(folder: Path) -> None:
    for seed, name in enumerate(["ada/train-00000-of-00001", "c/train-00000-of-00002",
                                 "c/train-00001-of-00002"]):  # fmt: skip
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"max_stars_count": range(99), "content": texts(seed, 99)}
        pq.write_table(pa.table(table), path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    write_slimpajama(folder / "slimpajama")
    write_starcoder(folder / "starcoder")
    return folder


@pytest.fixture
def prepared(sources, data, tmp_path):
    """Prepares a corpus in another way each time it is called, into a folder of the test."""

    def prepare(name, out="d", source=None, **options):
        options = {"processes": 1, "group_bytes": GROUP_BYTES} | options
        source = source or sources / name
        return prepare_corpus(
            name, CASES[name], source, Path(data.tokenizer), tmp_path / out, **options
        )

    return prepare


def hashes(folder: Path) -> dict[str, str]:
    """Of all that is in the folder: no leftover is overlooked."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", CASES)
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
            wanted += pack(ids, 400)
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
    # Threads of the tokenizer, where one group has all the cores.
    for worker in (2, 0):
        assert prepared(name, "three", worker=(worker, 3), processes=3) is None
        assert not (tmp_path / "three").exists()
    assert prepared(name, "three", worker=(1, 3))
    assert hashes(tmp_path / "three") == wanted
    before = (tmp_path / "one" / "manifest.json").stat().st_mtime_ns
    assert prepared(name, "one") == read_manifest(tmp_path / "one")
    assert (tmp_path / "one" / "manifest.json").stat().st_mtime_ns == before


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
from test_corpus import CASES, GROUP_BYTES
from tinyllama_jax.data.corpus import prepare_corpus

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
        cwd=Path(__file__).parent,
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


ORPHANS = """
import sys
from pathlib import Path
from tinyllama_jax.data.corpus import prepare_corpus
from tinyllama_jax.data.readers import CORPORA

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

    def others_are_faster(*arguments):
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


def test_progress_is_left_for_programs(prepared, tmp_path, sources):
    assert prepared("slimpajama", worker=(1, 2)) is None
    (file,) = (tmp_path / "d.partial" / "groups").glob("progress*.json")
    facts = json.loads(file.read_text())
    assert file.name == "progress-1-of-2.json"
    assert facts["bytes_read"] == facts["bytes"] > 0 and facts["groups_done"] == facts["groups"]
    assert facts["tokens"] > 0 and facts["tokens_per_sec"] > 0


FULL = """
import resource, sys
from tinyllama_jax.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_costs_one_sentence_and_the_same_command_goes_on(data, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "d"
    (source / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(pa.table({"text": texts(0, 400)}), source / f"data/{split}-0.parquet")
    options = {"--source": source, "--tokenizer": data.tokenizer, "--out": out}
    command = ["prepare", "tinystories", *map(str, sum(options.items(), ()))]
    # Files that may not grow fail as files on a full disk do.
    done = subprocess.run(
        [sys.executable, "-c", FULL, *command], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2, done.stderr
    assert "make room on that disk" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in (tmp_path / "d.partial").iterdir()) == ["groups", "plan.json"]
    assert cli.main(command) == 0
    assert "train" in capsys.readouterr().out
    assert cli.main(["verify", str(out)]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_the_exit_code_of_what_goes_on(number, monkeypatch, capsys):
    monkeypatch.setattr(
        corpus_module, "prepare_corpus", lambda *_, **__: os.kill(os.getpid(), number)
    )
    argv = ["prepare", "files", "--source", ".", "--tokenizer", "t", "--out", "out"]
    assert cli.main(argv) == 75
    assert "the same command goes on" in capsys.readouterr().err


def test_the_command_line_names_every_corpus():
    annotation = typing.get_type_hints(cli.prepare, include_extras=True)["dataset"]
    assert set(typing.get_args(typing.get_args(annotation)[0])) == {"stdlib", *CORPORA}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["starcoder"], "--source"),
        (["starcoder", "--source", "nowhere"], "no folder nowhere"),
        (["starcoder", "--source", ".", "--field", "x"], "fields of its own"),
        (["files", "--source", ".", "--drop", "x"], "FIELD=VALUE"),
        (["files", "--source", ".", "--worker", "3/3"], "give i/n"),
        (["files", "--source", ".", "--worker", "x"], "give i/n"),
        (["files", "--source", "."], "no readable file"),
        (["stdlib", "--field", "x"], "leave the rest out"),
    ],
)
def test_a_mistaken_command_costs_one_message(argv, words, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *argv, "--tokenizer", data.tokenizer, "--out", "out"]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_tokenizer_is_refused(sources, tmp_path, capsys):
    (tmp_path / "t.model").write_bytes(b"no model")
    argv = ["prepare", "starcoder", "--source", sources / "starcoder", "--tokenizer",
            tmp_path / "t.model", "--out", tmp_path / "out"]  # fmt: skip
    assert cli.main([str(arg) for arg in argv]) == 2
    assert "not a sentencepiece model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


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
