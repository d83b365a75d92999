"""From runs, folders and the original's files to what other runtimes open."""

import contextlib
import dataclasses
import json
import re
import resource
import shutil
import weakref
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from support.exports import edit_json
from support.models import ODD, SMALL
from support.runs import exit_code, weights_of
from tinyllama_jax.config import CheckpointConfig
from tinyllama_jax.conversion import convert, huggingface, litgpt
from tinyllama_jax.conversion.gguf import export_gguf
from tinyllama_jax.conversion.safetensors_files import INDEX, split
from tinyllama_jax.conversion.tensors import Unread, tensors, unread_weights
from tinyllama_jax.errors import UserError
from tinyllama_jax.inference.generate import for_decoding, generate
from tinyllama_jax.model.llama import abstract_weights
from tinyllama_jax.runtime import checkpoint
from tinyllama_jax.runtime.checkpoint import Checkpoints
from tinyllama_jax.runtime.mesh import make_mesh, named_leaves
from tinyllama_jax.training.step import init_state


def assert_same(found, wanted):
    found, wanted = named_leaves(found), named_leaves(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(leaf), err_msg=path)


@pytest.fixture
def sharded(weights, small_tokenizer, tmp_path):
    """An export in several files."""
    folder = tmp_path / "sharded"
    huggingface.export(weights, ODD, small_tokenizer, folder, max_shard_bytes=60_000)
    return folder


def test_shards_hold_as_many_tensors_as_fit_and_at_least_one():
    shapes = {"a": (10,), "b": (6,), "c": (100,), "d": (1,), "e": (2,)}
    assert split(shapes, "float32", 64) == [["a", "b"], ["c"], ["d", "e"]]
    assert split(shapes, "float16", 64) == [["a", "b"], ["c"], ["d", "e"]]
    assert split(shapes, "bfloat16", 1000) == [list(shapes)]


def test_a_sharded_export_is_read_back_and_is_what_the_library_reads(sharded, weights):
    files = sorted(sharded.glob("*.safetensors"))
    names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2 and [file.name for file in files] == names
    index = json.loads((sharded / INDEX).read_text())
    held = {name: file.name for file in files for name in safetensors.numpy.load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == 4 * ODD.parameters()
    for file in files:
        stored = safetensors.numpy.load_file(file)
        assert sum(array.nbytes for array in stored.values()) <= 60_000 or len(stored) == 1
    assert_same(huggingface.load(sharded)[1], weights)
    assert huggingface.verify_export(sharded) == []


@pytest.mark.torch
def test_transformers_opens_a_sharded_export_in_bf16(weights, small_tokenizer, tmp_path):
    huggingface.export(
        weights,
        ODD,
        small_tokenizer,
        tmp_path / "model",
        dtype="bfloat16",
        max_shard_bytes=60_000,
    )
    assert huggingface.check(tmp_path / "model", ODD, weights, "bfloat16") < 2e-5
    assert huggingface.check(tmp_path / "model", ODD, weights, "float32") > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype, weights, small_tokenizer, tmp_path):
    huggingface.export(weights, ODD, small_tokenizer, tmp_path / "model", dtype=dtype)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == dtype
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), weights)
    assert_same(huggingface.load(tmp_path / "model")[1], rounded)


def test_a_weight_above_fp16_is_refused_and_nothing_is_left(weights, small_tokenizer, tmp_path):
    large = {**weights, "norm_D": weights["norm_D"].at[3].set(7e4)}
    with pytest.raises(UserError, match="norm_D holds values too large for float16"):
        huggingface.export(large, ODD, small_tokenizer, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stored", ["no head", "the same head"])
def test_a_tied_head_is_the_embedding(stored, exported, weights, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "tied"))
    (folder / huggingface.HASHES).unlink()
    edit_json(folder / "config.json", tie_word_embeddings=True)
    tensors_ = safetensors.numpy.load_file(folder / "model.safetensors")
    if stored == "no head":
        del tensors_["lm_head.weight"]
    else:
        tensors_["lm_head.weight"] = tensors_["model.embed_tokens.weight"]
    # Frequencies of RoPE that older versions of transformers saved are no weights.
    tensors_["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    safetensors.numpy.save_file(tensors_, folder / "model.safetensors")
    assert_same(
        huggingface.load(folder)[1], {**weights, "head_DV": np.asarray(weights["embedding_VD"]).T}
    )
    edit_json(folder / "config.json", tie_word_embeddings=False)
    if stored == "no head":
        with pytest.raises(UserError, match="lm_head.weight is missing"):
            huggingface.load(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 3, ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(name, sharded):
    (sharded / huggingface.HASHES).unlink()
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="no safetensors file of the folder"):
        huggingface.load(sharded)


def test_an_export_knows_every_flipped_bit(sharded):
    for file in sorted(sharded.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        if file.name == huggingface.CARD:
            huggingface.load(sharded)
        else:
            with pytest.raises(UserError):
                huggingface.load(sharded)
        file.write_bytes(whole)
    huggingface.load(sharded)


def test_one_layer_is_in_memory_at_a_time(exported, weights, small_tokenizer, tmp_path):
    alive = []

    def read(path, index):
        assert path.startswith("blocks.") == (index is not ...)
        assert not any(array() is not None for array in alive), f"another is there beside {path}"
        array = np.array(named_leaves(weights)[path][index])
        alive.append(weakref.ref(array))
        return array

    unread = unread_weights(ODD, read)
    huggingface.export(unread, ODD, small_tokenizer, tmp_path / "hf")
    export_gguf(unread, ODD, small_tokenizer, tmp_path / "model.gguf")
    assert len(alive) == 2 * len(tensors(ODD))
    whole, again = (folder / "model.safetensors" for folder in (exported, tmp_path / "hf"))
    assert whole.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("share", [0, 0.25])
def test_a_disk_that_is_full_leaves_nothing(share, exported, tmp_path, capsys):
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    size = int(share * (folder / "model.safetensors").stat().st_size)
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for to, out in (("hf", tmp_path / "new"), ("gguf", tmp_path / "new.gguf"), ("hf", folder)):
        # The kernel refuses what goes beyond, as it does on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit))
        try:
            assert exit_code(["convert", folder, out, "--to", to]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        said = capsys.readouterr().err
        assert re.fullmatch(rf".*{out.name} cannot be written \(.*(large|written)\): .*\n", said)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert huggingface.verify_export(folder) == []


# Runs.


def test_a_run_is_converted_with_the_weights_of_the_step(
    source,
    config,
    mesh,
    tmp_path,
    capsys,
):
    argv = ["convert", source, tmp_path / "hf", "--to", "hf"]
    assert exit_code([*argv, "--step", "9", "--max-shard-size", "50KB"]) == 0
    found, loaded = huggingface.load(tmp_path / "hf")
    assert found == SMALL and (tmp_path / "hf" / INDEX).is_file()
    assert named_leaves(loaded).keys() == (wanted := weights_of(config, source, 9, mesh)).keys()
    for name, leaf in named_leaves(loaded).items():
        np.testing.assert_array_equal(leaf, wanted[name])
    # A folder is converted like a run.
    argv = ["convert", tmp_path / "hf", tmp_path / "half", "--to", "hf", "--dtype", "float16"]
    assert exit_code(argv) == 0
    halves = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), loaded)
    assert_same(huggingface.load(tmp_path / "half")[1], halves)


def test_all_steps_go_into_folders_of_their_own(source, config, mesh, tmp_path):
    argv = ["convert", source, tmp_path / "all", "--to", "hf", "--step", "all"]
    assert exit_code(argv) == exit_code(argv) == 0
    names = {path.name for path in (tmp_path / "all").iterdir()}
    # The fixture's runs have read `step` rows of 64 tokens.
    assert names == {"step-9-token-576", "step-10-token-640"}
    for step, name in ((9, "step-9-token-576"), (10, "step-10-token-640")):
        loaded = named_leaves(huggingface.load(tmp_path / "all" / name)[1])
        for path, leaf in weights_of(config, source, step, mesh).items():
            np.testing.assert_array_equal(loaded[path], leaf)
    assert exit_code([*argv[:2], tmp_path / "all" / "step-9-token-576", *argv[3:]]) == 2


def test_the_intermediate_releases_have_the_originals_names():
    steps = (50_000, 240_000, 480_000, 715_000, 955_000, 1_195_000, 1_430_512)
    names = convert.release_names({step: step * 2_097_152 for step in steps}).values()
    tokens = ("105B", "503B", "1T", "1.5T", "2T", "2.5T", "3T")
    short = ("50k", "240k", "480k", "715k", "955k", "1195k", "1431k")
    assert list(names) == [f"step-{a}-token-{b}" for a, b in zip(short, tokens, strict=True)]


def test_names_of_small_runs_are_their_own():
    assert convert.release_names({400: 819_200, 12_300: 999_600_000, 12_400: 10**9}) == {
        400: "step-400-token-819K",
        12_300: "step-12300-token-1B",
        12_400: "step-12400-token-1B",
    }
    counts = {0: "0", 999: "999", 1_000: "1K", 9_949: "9.9K", 9_960: "10K", 2_500_000: "2.5M"}
    assert {count: convert.short_count(count) for count in counts} == counts


def test_the_card_tells_what_the_runs_files_tell(source, config, tmp_path):
    lines = [
        {"step": 8, "train/loss": 3.25, "data/prose/tokens": 400, "data/code/tokens": 112},
        {"step": 6, "val/prose/loss": 2.5, "val/prose/bpb": 1.125},
        {"step": 9, "train/loss": None, "data/prose/tokens": 450, "data/code/tokens": 126},
        {"step": 10, "train/loss": 1.75},
    ]
    (source / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["convert", source, tmp_path / "hf", "--to", "hf"]
    assert exit_code([*argv, "--step", "9"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    for row in (
        "| step | 9 of 12 |",
        "| tokens read | 576 |",
        "| training loss at step 9 | not finite |",
        "| prose | 450 | 78.12% | 2.5000 | 1.1250 | 6 |",
        "| code | 126 | 21.88% |  |  |  |",
        f"{SMALL.parameters():,}",
        'from_pretrained("hf"',
    ):
        assert row in card, row
    assert exit_code([*argv, "--step", "10"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| training loss at step 10 | 1.7500 |" in card
    assert "| code |  |  |" in card  # what was read up to step 10 is written nowhere


def test_a_mistaken_option_of_convert_leaves_nothing(source, tmp_path, capsys):
    out = tmp_path / "out"
    for to, argv, words in (
        ("hf", ["--max-shard-size", "5"], "give it as 5GB"),
        ("hf", ["--step", "8"], "no checkpoint of step 8, only [9, 10]"),
        ("hf", ["--config", "configs/demo.py"], "leave --config out"),
        ("hf", ["--tokenizer", "x.model"], "leave --tokenizer out"),
        ("hf", ["--step", "all", "--tokenizer", "x.model"], "for runs"),
        ("gguf", ["--check"], "for --to hf"),
        ("gguf", ["--dtype", "float32"], "for --to hf"),
        ("gguf", [], "does not end in .gguf"),
    ):
        assert exit_code(["convert", source, out, "--to", to, *argv]) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("hashed", [True, False])
def test_a_file_of_a_checkpoint_that_was_cut_off_is_said(hashed, source, tmp_path, capsys):
    """Without its hashes too, as a machine that lost its power leaves it."""
    folder, out = source / "checkpoints" / "10", tmp_path / "out"
    if not hashed:
        (folder / "sha256.json").unlink()
    for file in sorted((folder / "weights").rglob("*")):
        if file.is_dir() or not (whole := file.read_bytes()):
            continue
        file.write_bytes(whole[: len(whole) // 2])
        code = exit_code(["convert", source, out, "--to", "hf", "--step", "10"])
        said = capsys.readouterr().err
        # Not all files are needed for reading on one device.
        if code == 0 and not hashed:
            huggingface.load(out)
            shutil.rmtree(out)
        else:
            assert code == 2 and said.count("\n") == 1, file
            assert "Checkpoint 10" in said and "damaged" in said and "take another" in said
        assert not out.exists() and not list(tmp_path.glob(".*"))
        file.write_bytes(whole)
    assert exit_code(["convert", source, out, "--to", "hf", "--step", "10"]) == 0


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_checkpoint_is_read_by_the_layer(devices, chunked, config, tmp_path, monkeypatch):
    """And one whose weights lie in one chunk each, as they once did."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
    if not chunked:
        monkeypatch.setattr(checkpoint, "_chunks", lambda tree: None)
    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig(every=1))) as checkpoints:
        checkpoints.save(state, {"rows": 1, "fingerprint": {}, "config": {}})
    read = Checkpoints(tmp_path).weight_reader(0, abstract_weights(SMALL))
    for path, leaf in named_leaves(state["weights"]).items():
        np.testing.assert_array_equal(read(path, ...), leaf)
        if path.startswith("blocks."):
            layers = [read(path, layer) for layer in range(SMALL.layers)]
            np.testing.assert_array_equal(layers, leaf)


def test_generation_reads_a_layer_of_a_weight_at_a_time(source):
    """And makes no copy of what it was given so."""
    model, reads = convert.open_model(source), []

    def watched(weight: Unread) -> Unread:
        return Unread(weight.shape, lambda index: reads.append(index) or weight.read(index))

    weights = jax.tree.map(watched, model.weights)
    mesh = make_mesh()
    ready = dataclasses.replace(model, weights=weights).for_decoding(mesh)
    wanted = [*range(model.config.layers)] * len(weights["blocks"]) + [...] * 3
    assert Counter(reads) == Counter(wanted)
    with jax.set_mesh(mesh):
        assert for_decoding(ready) is ready
        stacked = jax.tree.map(np.asarray, model.weights)
        found = [
            generate(model.config, given, [[5, 9]], max_tokens=20, eos=None)
            for given in (ready, stacked)
        ]
    assert found[0] == found[1]


def test_a_damaged_checkpoint_stops_all_steps_before_the_first(source, tmp_path, capsys):
    weights_ = source / "checkpoints" / "10" / "weights"
    file = max(weights_.rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    argv = ["convert", source, tmp_path / "all", "--to", "hf", "--step", "all"]
    assert exit_code(argv) == 2
    assert "Checkpoint 10" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


# The original's checkpoints.


# Hugging Face's names -> TinyLlama's, as its lit_gpt/model.py has them; query, key and value apart.
ORIGINAL = {
    "model.embed_tokens": "transformer.wte",
    "model.layers.{}.input_layernorm": "transformer.h.{}.norm_1",
    "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.proj",
    "model.layers.{}.post_attention_layernorm": "transformer.h.{}.norm_2",
    "model.layers.{}.mlp.gate_proj": "transformer.h.{}.mlp.swiglu.w1",
    "model.layers.{}.mlp.up_proj": "transformer.h.{}.mlp.swiglu.w2",
    "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.swiglu.w3",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


def as_the_original(stored, config):
    """A Hugging Face model's tensors as lit-gpt has them, query, key and value row by row."""
    H, group = config.head_width, config.query_heads // config.kv_heads
    found = {}
    for layer in range(config.layers):
        for ours, theirs in ORIGINAL.items():
            name = ours.format(layer) + ".weight"
            found[theirs.format(layer) + ".weight"] = stored[name]
        q, k, v = (stored[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkv")
        rows = []
        for head in range(config.kv_heads):
            rows += list(q[head * group * H : (head + 1) * group * H])
            rows += list(k[head * H : (head + 1) * H]) + list(v[head * H : (head + 1) * H])
        found[f"transformer.h.{layer}.attn.attn.weight"] = np.stack(rows)
    return found


@pytest.fixture
def pth(exported, tmp_path):
    """The original's file of the exported model, in a training state."""
    import torch

    def save(edit=lambda model: model, name="lit.pth", **options):
        stored = as_the_original(safetensors.numpy.load_file(exported / "model.safetensors"), ODD)
        model = {key: torch.from_numpy(array) for key, array in stored.items()}
        state = {"model": edit(model), "iter_num": 7, "optimizer": {"state": {}}}
        torch.save(state, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.mark.torch
def test_the_originals_checkpoint_gives_the_same_weights(pth, weights):
    assert_same(litgpt.open_litgpt(pth(), ODD), weights)
    assert_same(
        litgpt.open_litgpt(pth(lambda model: {k: v.bfloat16() for k, v in model.items()}), ODD),
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), weights),
    )


@pytest.mark.torch
def test_the_command_line_converts_the_originals_checkpoint(
    pth,
    exported,
    small_tokenizer,
    tmp_path,
    capsys,
):
    file = tmp_path / "config.py"
    file.write_text(
        "from tinyllama_jax.config import *\n"
        f"model = LlamaConfig(**{dataclasses.asdict(ODD)})\n"
        "def get_config():\n"
        "    return Config('run', model, DataConfig(), steps=9000, batch_rows=1)\n"
    )
    argv = ["convert", pth(), tmp_path / "hf", "--to", "hf"]
    assert exit_code(argv) == 2
    assert "give both, as in --config" in capsys.readouterr().err
    assert exit_code([*argv, "--config", file, "--tokenizer", small_tokenizer]) == 0
    one, other = (folder / "model.safetensors" for folder in (tmp_path / "hf", exported))
    assert one.read_bytes() == other.read_bytes()


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the bomb went off')",))


@pytest.mark.torch
def test_litgpt_files_that_do_not_fit_are_refused(pth, tmp_path):
    def refused(file, words, config=ODD):
        with pytest.raises(UserError, match=words):
            jax.tree.map(np.asarray, litgpt.open_litgpt(file, config))

    norm, fused = "transformer.ln_f.weight", litgpt.QKV.format(1)
    refused(pth(lambda m: {k: v for k, v in m.items() if k != norm}), f"{norm} is missing")
    refused(pth(lambda m: {**m, "lora": m[norm]}), "lora is unknown")
    refused(pth(lambda m: {**m, fused: m[fused].T}), f"Tensor {fused}")
    refused(pth(lambda m: {**m, norm: m[norm].double()}), "float64")
    refused(pth(lambda m: {**m, norm: m[norm] * np.nan}), "not finite")
    refused(pth(lambda m: {**m, norm: 3}), "int")
    refused(pth(lambda m: [m]), "unknown in")
    refused(pth(), "transformer.h.3", dataclasses.replace(ODD, layers=4))
    refused(pth(lambda m: {**m, "x": Bomb()}), "could run anything")
    refused(pth(name="old.pth", _use_new_zipfile_serialization=False), "torch 1.6")
    cut = pth(name="cut.pth")
    cut.write_bytes(cut.read_bytes()[:-100])
    refused(cut, "cut off")
    refused(tmp_path / "nowhere.pth", "no file")
