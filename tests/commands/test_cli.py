"""The command line as users meet it: exit codes, and one sentence for each mistake."""

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from support.paths import ROOT
from support.runs import config_file, exit_code
from tinyllama_jax.cli import main
from tinyllama_jax.commands.options import read_options
from tinyllama_jax.commands.prepare import Corpus, PrepareOptions
from tinyllama_jax.commands.tokenizer import TokenizerOptions
from tinyllama_jax.commands.train import require_data
from tinyllama_jax.config import SourceConfig
from tinyllama_jax.config_file import load_config
from tinyllama_jax.data.tokenizer import EOS, load_tokenizer
from tinyllama_jax.errors import UserError
from tinyllama_jax.preparation.readers import CORPORA
from tinyllama_jax.training import loop

HERE = __file__


@pytest.fixture
def run(config, mesh):
    loop.run(dataclasses.replace(config, steps=4), mesh)
    return Path(config.run_folder)


@pytest.fixture
def file(config, tmp_path):
    return config_file(config, tmp_path / "config.py")


def test_verify_tells_a_whole_run_and_export_from_damaged_ones(run, tmp_path, capsys):
    export = tmp_path / "export"
    assert exit_code(["convert", run, "--to", "hf", export]) == 0
    assert exit_code(["verify", run]) == exit_code(["verify", export]) == 0
    assert f"{run}: whole" in capsys.readouterr().out
    file = max((run / "checkpoints" / "4" / "weights").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (run / "config.json").write_text("{")
    assert exit_code(["verify", run]) == 1
    out = capsys.readouterr().out
    assert "checkpoint 4 is damaged: weights/" in out and "config.json is damaged" in out
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (export / "tokenizer.model").write_bytes(b"no model")
    assert exit_code(["verify", export]) == 1
    out = capsys.readouterr().out
    assert "model.safetensors is not what was exported" in out
    assert "is not a sentencepiece model" in out


def test_help_names_every_verb(capsys):
    assert exit_code(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in ("train", "plan", "prepare", "tokenizer", "verify", "convert", "generate", "eval"):
        (about,) = re.findall(rf"^  {verb} +(\S.*)$", out, re.MULTILINE)
        assert exit_code([verb, "--help"]) == 0
        assert about in " ".join(capsys.readouterr().out.split())


def test_help_and_version_answer_before_jax_is_imported(capsys):
    asked = [["--help"], ["--version"], ["train", "--help"], ["convert", "--help"]]
    code = (
        "import sys\nfrom tinyllama_jax.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit('jax' in sys.modules)"
    )
    for argv in asked:
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, (argv, done.stderr)
    assert exit_code(["--version"]) == 0
    assert re.fullmatch(r"tinyllama-jax \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_prepare_offers_every_corpus_there_is():
    assert set(get_args(Corpus)) == set(CORPORA)


def test_missing_data_is_told_with_the_command_that_makes_it(data, tmp_path, monkeypatch, capsys):
    """From an empty folder, what each message says leads to the next."""
    monkeypatch.chdir(tmp_path)
    commands = []
    for makes in ("data/demo/tokenizer.model", "data/demo/prose", "data/demo/code"):
        assert exit_code(["train", "demo"]) == 2
        err = capsys.readouterr().err
        assert f" at {makes}: " in err
        commands += re.findall("`tinyllama ([^`]*)`", err)
        made = tmp_path / makes
        made.parent.mkdir(parents=True, exist_ok=True)
        made.symlink_to(data.tokenizer if made.suffix else data.sources[0].path)
    tokenizer, *prepare = [shlex.split(command) for command in commands]
    made = read_options(TokenizerOptions, *_verb(tokenizer))
    assert made == TokenizerOptions(("stdlib",), 4096, Path("data/demo/tokenizer.model"))
    stdlib = PrepareOptions("stdlib", made.out, Path("data/demo"))
    assert [read_options(PrepareOptions, *_verb(argv)) for argv in prepare] == [stdlib, stdlib]
    made.out.unlink()
    made.out.symlink_to(data.tokenizer)
    for name, corpus in (("fineweb_edu", "fineweb-edu"), ("own", "files")):
        config = load_config("demo")
        data_config = dataclasses.replace(config.data, sources=(SourceConfig(name, f"d/{name}"),))
        with pytest.raises(UserError) as refused:
            require_data(dataclasses.replace(config, data=data_config))
        (command,) = re.findall("`tinyllama ([^`]*)`", str(refused.value))
        assert read_options(PrepareOptions, *_verb(shlex.split(command))) == PrepareOptions(
            corpus, made.out, Path("d", name), source=Path("FOLDER")
        )


def _verb(argv):
    return argv[0], argv[1:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--optimizer.peek-lr", "1"], "--optimizer.peak-lr"),
        (["--steps", "many"], "steps"),
        (["--model.kv-heads", "4"], "kv heads that divide"),
        (["--execution.gather", "layer"], "recompute elementwise or layers"),
        (["--execution.attention", "cudnn"], "cudnn needs an NVIDIA GPU"),
        (["--batch-rows", "20"], "divisible by the 8 devices"),
        (["--data.tokenizer", "none.model"], "no tokenizer"),
        (["--data.sources.0.path", "nowhere"], "no dataset"),
        (["--data.sources.0.weight", "0"], "'prose' has weight 0 throughout"),
        (["--model.vocab-size", "500"], "make them equal"),
        (["--model.context", "100"], "must divide"),
        (["--sample.prompts", ""], "has 0 tokens"),
        (["--sample.prompts", "The " * 100], "fills the context"),
        (["--sample.prompts"], "at least one prompt"),
        (["--seed", "-1"], "seed is -1"),
        (["--optimizer.eps", "0"], "optimizer.eps"),
        (["--optimizer.weight-decay", "-1"], "optimizer.weight_decay"),
        (["--run-folder", HERE], "cannot be made"),
        (["--profile", "9:4"], "give START:STOP"),
    ],
)
def test_a_mistaken_option_costs_one_message_and_nothing_on_disk(
    file, config, options, words, capsys
):
    assert exit_code(["train", file, *options]) == 2
    out, err = capsys.readouterr()
    assert words in out + err
    assert "Traceback" not in out + err
    assert not Path(config.run_folder).exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "tinyllama VERB"),
        (["trian"], "no verb 'trian'"),
        (["train"], "Name a config"),
        (["train", "nowhere.py"], "no config file"),
        (["plan"], "Name a config"),
        (["plan", "nowhere.py", "--mesh", "a100_8"], "no config file"),
        (["generate", "nowhere", "--prompt", "x"], "no run"),
        (["generate", "nowhere"], "either --prompt"),
        (["convert", "nowhere", "out", "--to", "hf"], "no run"),
        (["convert", "nowhere", "out", "--to", "onnx"], "hf"),
        (["prepare", "stdlib", "--tokenizer", "none", "--out", "out"], "no tokenizer"),
        (["tokenizer", HERE, "--vocab-size", "400", "--out", f"{HERE}/m"], "cannot be made"),
        (["tokenizer", "nowhere.txt", "--vocab-size", "400"], "cannot be read"),
        (["tokenizer", "--vocab-size", "400"], "give more text"),
    ],
)
def test_a_mistaken_command_costs_one_message(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(argv) == 2
    out, err = capsys.readouterr()
    assert words in out + err
    assert list(tmp_path.iterdir()) == []


def test_every_field_of_the_config_is_an_option(file, capsys):
    with pytest.raises(SystemExit):
        main(["train", file, "--help"])
    out = capsys.readouterr().out
    for option in ("--steps", "--model.rope-base", "--optimizer.decay-matrices-only",
                   "--data.sources.1.weight", "--checkpoint.permanent-every", "--sample.prompts",
                   "--validation.rows", "--compute-dtype", "--profile"):  # fmt: skip
        assert option in out


def test_generate_prints_ids_alone_or_text(run, capsys):
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt-ids", "5", "9", "--max-tokens", "6", "--ids"]) == 0
    ids = [int(token) for token in capsys.readouterr().out.split()]
    assert 0 < len(ids) <= 6
    assert main(["generate", str(run), "--prompt", "The", "--max-tokens", "6"]) == 0
    text = capsys.readouterr().out
    tokenizer = load_tokenizer(run / "tokenizer.model")
    assert text.startswith("The") and len(tokenizer.encode(text)) > 1

    # Several prompts, each as alone; and a stop string, up to which the text stays.
    both = ["generate", run, "--prompt", "The", "--prompt", "A mesh of", "--max-tokens", 6]
    assert exit_code(both) == 0
    first, second = capsys.readouterr().out.split("---\n")
    assert first == text and second.startswith("A mesh of")
    stop = text.rstrip("\n")[-2:]
    assert exit_code(["generate", run, "--prompt", "The", "--max-tokens", 6, "--stop", stop]) == 0
    assert capsys.readouterr().out == text[: text.index(stop, 3)] + "\n"

    # A prompt that fills the context costs one sentence; one that nearly does is told so.
    assert exit_code(["generate", run, "--prompt", "a " * 100]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "the context of 64" in err and err.count("\n") == 1
    assert exit_code(["generate", run, "--prompt-ids", *[5] * 61, "--ids"]) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) <= 3 and "The context of 64 holds 3 new tokens" in err


def test_a_copied_run_folder_still_generates(run, tmp_path, capsys):
    moved = tmp_path / "moved"
    run.rename(moved)
    assert main(["generate", str(moved), "--prompt", "The", "--max-tokens", "3"]) == 0


@pytest.mark.torch
def test_an_exported_run_gives_the_same_ids_in_transformers_as_here(run, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "export"
    assert main(["convert", str(run), "--to", "hf", str(out), "--check"]) == 0
    assert "within" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("A mesh of", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    for folder in (run, out):
        argv = ["generate", folder, "--prompt", "A mesh of", "--max-tokens", 20, "--ids"]
        assert exit_code(argv) == 0
        ours = [int(token) for token in capsys.readouterr().out.split()]
        assert ours == [token for token in theirs if token != EOS]


@pytest.mark.torch
def test_a_difference_above_the_tolerance_is_exit_code_1(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tinyllama_jax.conversion.convert.TOLERANCE", 1e-12)
    argv = ["convert", str(run), "--to", "hf", str(tmp_path / "export"), "--check"]
    assert exit_code(argv) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_a_missing_step_is_named(run, tmp_path, capsys):
    argv = ["convert", str(run), str(tmp_path / "out"), "--to", "hf", "--step", "77"]
    assert exit_code(argv) == 2
    assert "no checkpoint of step 77" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_step_is_not_exported(run, tmp_path, capsys):
    files = (run / "checkpoints" / "4" / "weights").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    argv = ["convert", str(run), str(tmp_path / "out"), "--to", "hf", "--step", "4"]
    assert exit_code(argv) == 2
    assert "Checkpoint 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(config, tmp_path, number):
    config = dataclasses.replace(config, steps=5000)
    command = [sys.executable, "launch/cpu.py", config_file(config, tmp_path / "config.py")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    metrics = Path(config.run_folder) / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 75, out
    assert f"Stopped by {number.name}" in out and "same command again" in out
    assert list((Path(config.run_folder) / "checkpoints").glob("*/sha256.json"))
