"""Beam's workers write the bytes of every other way, and their errors reach the user."""

import urllib.request

import pytest

from support.corpora import write_starcoder
from tinyllama_jax import cli
from tinyllama_jax.preparation.verify import verify_dataset

pytestmark = pytest.mark.beam


def test_beam_writes_the_same_bytes_and_downloads_nothing(prepared, tmp_path, monkeypatch):
    wanted = prepared("starcoder", "one")
    addresses = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, *_: addresses.append(url))
    assert prepared("starcoder", "two", runner="DirectRunner", processes=None) == wanted
    assert verify_dataset(tmp_path / "two") == [] == addresses


def test_beam_in_processes_goes_on_with_the_groups_that_are_missing(prepared, tmp_path):
    wanted = prepared("tokens", "one")
    assert prepared("tokens", "two", worker=(1, 3)) is None
    options = ("direct_num_workers=2", "direct_running_mode=multi_processing")
    found = prepared("tokens", "two", runner="DirectRunner", beam_options=options, processes=None)
    assert found == wanted and len(wanted["splits"]["train"]["shards"]) > 2
    assert verify_dataset(tmp_path / "two") == []


@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_what_a_worker_meets_is_one_sentence_and_exit_code_2(mode, data, tmp_path, capsys):
    write_starcoder(tmp_path / "source")
    (tmp_path / "source/c/train-00001-of-00002.parquet").write_bytes(b"PAR1")
    options = {"--source": tmp_path / "source", "--tokenizer": data.tokenizer,
               "--out": tmp_path / "d", "--runner": "DirectRunner",
               "--beam-options": f"direct_running_mode={mode}"}  # fmt: skip
    assert cli.main(["prepare", "starcoder", *map(str, sum(options.items(), ()))]) == 2
    said = capsys.readouterr().err
    *_, line = said.splitlines()  # before it, Beam's processes tell of themselves
    assert line.startswith("tinyllama: c/train-00001-of-00002.parquet is damaged")
    assert "Traceback" not in said
    left = [path.name for path in (tmp_path / "d.partial" / "groups").iterdir()]
    assert not any(name.endswith(".error") for name in left), left


def test_a_signal_ends_with_the_exit_code_of_what_goes_on(
    sources, data, tmp_path, monkeypatch, capsys
):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tinyllama_jax.preparation.beam.write_group", interrupted)
    options = {"--source": sources / "starcoder", "--tokenizer": data.tokenizer,
               "--out": tmp_path / "d", "--runner": "DirectRunner"}  # fmt: skip
    assert cli.main(["prepare", "starcoder", *map(str, sum(options.items(), ()))]) == 75
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--runner", "NoRunner"], "--runner NoRunner: "),
        (["--runner", "no.module.Runner"], "--runner no.module.Runner: "),
        (["--runner", "DirectRunner", "--beam-options", "workers=2"], "no option workers"),
        (["--runner", "DirectRunner", "--beam-options", "direct_num_workers=x"], "invalid int"),
    ],
)
def test_a_runner_or_option_that_beam_lacks_costs_one_message(
    argv, words, sources, data, tmp_path, capsys
):
    options = {"--source": sources / "starcoder", "--tokenizer": data.tokenizer,
               "--out": tmp_path / "d"}  # fmt: skip
    assert cli.main(["prepare", "starcoder", *map(str, sum(options.items(), ())), *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []
