import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from support.exports import changed, edit_json
from support.models import ODD
from tinyllama_jax.conversion import huggingface, tensors
from tinyllama_jax.errors import UserError
from tinyllama_jax.model import llama


@pytest.fixture
def copied(exported, tmp_path):
    """A folder to damage; without its hashes, as if another program had saved it."""
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    (folder / huggingface.HASHES).unlink()
    return folder


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    stored = safetensors.numpy.load_file(file)
    edit(stored)
    safetensors.numpy.save_file(stored, file)


def test_table_of_names_covers_the_tree_both_ways():
    ours = set(traverse_util.flatten_dict(llama.abstract_weights(ODD), sep="."))
    assert ours == set(tensors.NAMES)
    table = tensors.tensors(ODD)
    per_layer = sum("{}" in name for name, _ in tensors.NAMES.values())
    assert len(table) == ODD.layers * per_layer + len(tensors.NAMES) - per_layer
    stored = sum(int(np.prod(tensor.hf_shape)) for tensor in table.values())
    assert stored == ODD.parameters()


def test_a_weight_without_a_row_raises(monkeypatch):
    monkeypatch.delitem(tensors.NAMES, "blocks.up_DF")
    with pytest.raises(KeyError, match="blocks.up_DF"):
        tensors.tensors(ODD)


def test_load_returns_what_export_was_given_bit_for_bit(exported, weights):
    config, loaded = huggingface.load(exported)
    assert config == ODD
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


def test_matrices_are_stored_out_by_in_with_heads_outermost(exported, weights):
    stored = safetensors.numpy.load_file(exported / "model.safetensors")
    D, F, H, V = ODD.width, ODD.swiglu_width, ODD.head_width, ODD.vocab_size
    shapes = {name: array.shape for name, array in stored.items()}
    assert (
        shapes.items()
        >= {
            "model.embed_tokens.weight": (V, D),
            "model.layers.1.self_attn.k_proj.weight": (ODD.kv_heads * H, D),
            "model.layers.1.self_attn.v_proj.weight": (ODD.kv_heads * H, D),
            "model.layers.1.mlp.gate_proj.weight": (F, D),
            "model.layers.1.mlp.up_proj.weight": (F, D),
            "model.layers.1.mlp.down_proj.weight": (D, F),
            "model.norm.weight": (D,),
            "lm_head.weight": (V, D),
        }.items()
    )
    query = stored["model.layers.1.self_attn.q_proj.weight"]
    assert query.shape == (ODD.query_heads * H, D)
    assert query[2 * H + 3, 5] == weights["blocks"]["query_DNH"][1, 5, 2, 3]
    output = stored["model.layers.2.self_attn.o_proj.weight"]
    assert output.shape == (D, ODD.query_heads * H)
    assert output[5, 2 * H + 3] == weights["blocks"]["output_NHD"][2, 2, 3, 5]


def test_export_writes_exactly_the_files_it_may_replace(exported):
    assert {path.name for path in exported.iterdir()} == {*huggingface.FILES, "model.safetensors"}
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_configs_hold_what_each_transformers_reads(weights, small_tokenizer, tmp_path):
    config = dataclasses.replace(ODD, rope_factor=4.0)
    huggingface.export(weights, config, small_tokenizer, tmp_path / "model")
    written = {
        name: json.loads((tmp_path / "model" / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config", "special_tokens_map")
    }
    scaling = {"rope_type": "linear", "factor": 4.0}
    assert (
        written["config"].items()
        >= {
            "architectures": ["LlamaForCausalLM"],
            "rms_norm_eps": 1e-4,
            "rope_parameters": {**scaling, "rope_theta": 7e3},
            "rope_theta": 7e3,
            "rope_scaling": scaling,
            "dtype": "float32",
            "torch_dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }.items()
    )
    assert written["generation_config"] == {"bos_token_id": 1, "eos_token_id": 2}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert written["special_tokens_map"] == special
    adds = {"add_bos_token": False, "add_eos_token": False}
    assert written["tokenizer_config"].items() >= {**special, **adds}.items()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_load_reads_half_precision_as_fp32(copied, weights, dtype):
    def halve(tensors):
        tensors.update({name: array.astype(dtype) for name, array in tensors.items()})

    edit_tensors(copied, halve)
    _, loaded = huggingface.load(copied)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf.astype(dtype).astype(np.float32)), weights)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": "drop", "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": "drop", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_theta": "drop",
            "rope_scaling": "drop",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 7e3, "factor": 4.0},
        },
    ],
    ids=["older transformers 4", "transformers 4", "transformers 5"],
)
def test_load_reads_rope_as_every_transformers_writes_it(copied, changes):
    edit_json(copied / "config.json", **changes)
    config, _ = huggingface.load(copied)
    assert config == dataclasses.replace(ODD, rope_factor=4.0)


def test_load_derives_what_old_configs_leave_out(copied):
    edit_json(
        copied / "config.json",
        **dict.fromkeys(("rope_parameters", "rope_theta", "attention_bias", "mlp_bias"), "drop"),
    )
    assert huggingface.load(copied)[0] == dataclasses.replace(ODD, rope_base=10_000.0)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model_type", "mistral", "model_type 'mistral'"),
        ("model_type", "drop", "model_type None"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("attention_bias", True, "attention_bias True"),
        ("mlp_bias", True, "mlp_bias True"),
        ("tie_word_embeddings", True, "is tied to the embedding, and the weights hold another"),
        ("sliding_window", 4096, "sliding_window 4096"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("num_hidden_layers", 4, "4 layers and the weights 3"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "rope_type 'llama3'"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}, "rope_type 'yarn'"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor 0.5"),
        ("intermediate_size", "drop", "no 'intermediate_size'"),
        ("num_attention_heads", "drop", "no 'num_attention_heads'"),
        ("num_key_value_heads", 3, "kv_heads"),
    ],
    ids=str,
)
def test_load_refuses_another_model(copied, key, value, named):
    edit_json(copied / "config.json", **{key: value})
    with pytest.raises(UserError, match=named):
        huggingface.load(copied)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "wide"),
        ("rms_norm_eps", None),
        ("rms_norm_eps", float("nan")),
        ("num_hidden_layers", 3.0),
        ("vocab_size", 10**12),
    ],
)
def test_load_refuses_values_that_cannot_be(copied, key, value):
    edit_json(copied / "config.json", **{key: value})
    with pytest.raises(UserError, match="value that cannot be"):
        huggingface.load(copied)


def test_load_refuses_tensors_that_do_not_fit(copied, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"

    def transpose(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    def spoil(tensors):
        tensors[name][3, 4] = np.inf

    for number, (edit, named) in enumerate(
        [
            (lambda tensors: tensors.pop(name), f"{name} is missing"),
            (lambda tensors: tensors.update(extra=np.zeros(3, np.float32)), "extra is unknown"),
            (lambda tensors: tensors.update({name: tensors[name].astype(np.int32)}), name),
            (transpose, name),
            (spoil, name),
        ]
    ):
        folder = Path(shutil.copytree(copied, tmp_path / str(number)))
        edit_tensors(folder, edit)
        with pytest.raises(UserError, match=named):
            huggingface.load(folder)


def test_load_refuses_damaged_and_absent_files(copied):
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        huggingface.load(copied)
    file.rename(copied / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"no .*model.safetensors, be it in another format"):
        huggingface.load(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        huggingface.load(copied)
    with pytest.raises(UserError, match="config.json"):
        huggingface.load(copied / "nowhere")


def bad_exports():
    """Arguments of `export` that differ from good ones, and what the message must name."""
    nan = jnp.zeros((ODD.layers, ODD.width)).at[1, 2].set(jnp.nan)
    replace = dataclasses.replace
    return {
        "not finite": (lambda w: changed(w, "blocks.swiglu_norm_D", nan), ODD, "not finite"),
        "unknown weight": (lambda w: {**w, "bias_D": jnp.zeros(3)}, ODD, "bias_D"),
        "missing weight": (lambda w: {k: w[k] for k in w if k != "norm_D"}, ODD, "norm_D"),
        "another config": (lambda w: w, replace(ODD, swiglu_width=36), "down_FD"),
        "other pieces": (lambda w: w, replace(ODD, vocab_size=601), "600 pieces"),
        "indivisible width": (lambda w: w, replace(ODD, width=26), "query_heads"),
    }


@pytest.mark.parametrize("case", bad_exports())
def test_export_refuses_and_leaves_nothing(case, weights, small_tokenizer, tmp_path):
    edit, config, named = bad_exports()[case]
    with pytest.raises(UserError, match=named):
        huggingface.export(edit(weights), config, small_tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("foreign", ["notes.txt", "no hashes", "other model", "empty"])
def test_export_leaves_folders_alone_that_it_did_not_write(
    foreign, exported, weights, small_tokenizer, tmp_path
):
    folder = tmp_path / "mine"
    if foreign == "empty":
        folder.mkdir()
    else:
        shutil.copytree(exported, folder)
    if foreign == "notes.txt":
        (folder / "notes.txt").write_text("mine")
    elif foreign == "no hashes":
        (folder / huggingface.HASHES).unlink()
    elif foreign == "other model":
        edit_json(folder / "config.json", architectures=["GemmaForCausalLM"])
    before = contents(folder)
    with pytest.raises(UserError, match="mine"):
        huggingface.export(weights, ODD, small_tokenizer, folder)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_export_leaves_a_file_alone(weights, small_tokenizer, tmp_path):
    file = tmp_path / "mine"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        huggingface.export(weights, ODD, small_tokenizer, file)
    assert file.read_text() == "mine"


def test_export_replaces_an_earlier_export(exported, weights, small_tokenizer, tmp_path):
    copied = Path(shutil.copytree(exported, tmp_path / "copy"))
    other = jax.tree.map(lambda leaf: leaf + 1, weights)
    huggingface.export(other, ODD, small_tokenizer, copied)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(copied)[1], other)
    assert list(copied.parent.iterdir()) == [copied]


@pytest.mark.parametrize("earlier", [False, True])
def test_an_export_killed_on_its_way_leaves_no_half_folder(
    earlier, exported, weights, small_tokenizer, tmp_path, monkeypatch
):
    folder = tmp_path / "out"
    if earlier:
        shutil.copytree(exported, folder)
    before = contents(folder) if earlier else None

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", killed)
        # A killed process cleans nothing up.
        patch.setattr(huggingface.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            huggingface.export(weights, ODD, small_tokenizer, folder)
    assert (contents(folder) if folder.exists() else None) == before
    huggingface.export(weights, ODD, small_tokenizer, folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert set(contents(folder)) == {*huggingface.FILES, "model.safetensors"}


@pytest.mark.torch
def test_check_sees_equal_weights_and_unequal_ones(exported, weights):
    assert huggingface.check(exported, ODD, weights) < 2e-5
    other = changed(weights, "blocks.key_DKH", weights["blocks"]["key_DKH"] * 1.1)
    assert huggingface.check(exported, ODD, other) > 1e-3


def test_check_without_torch_says_what_to_install(exported, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'tinyllama-jax\[torch\]'"):
        huggingface.check(exported, ODD, weights)


@pytest.mark.torch
def test_rope_factor_survives_the_way_through_transformers(weights, small_tokenizer, tmp_path):
    config = dataclasses.replace(ODD, rope_factor=4.0)
    huggingface.export(weights, config, small_tokenizer, tmp_path / "model")
    loaded_config, loaded = huggingface.load(tmp_path / "model")
    assert loaded_config == config
    assert huggingface.check(tmp_path / "model", loaded_config, loaded) < 2e-5
    assert huggingface.check(tmp_path / "model", ODD, loaded) > 1e-3


@pytest.mark.torch
def test_load_reads_what_transformers_itself_saves(exported, weights, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config, loaded = huggingface.load(tmp_path)
    assert config == ODD
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)
