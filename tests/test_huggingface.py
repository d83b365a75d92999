import argparse
import dataclasses
import io
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
from flax import traverse_util

from tinyllama_jax.config import LlamaConfig, UserError
from tinyllama_jax.inference import huggingface, tokenizer_json
from tinyllama_jax.model import llama

CONFIG = LlamaConfig(
    vocab_size=600,
    layers=3,
    width=24,
    query_heads=4,
    kv_heads=2,
    head_width=10,
    swiglu_width=34,
    context=32,
    rope_base=7e3,
    norm_eps=1e-4,
)

STRINGS = {
    "empty": "",
    "word": "Hello world",
    "leading space": " Hello",
    "leading spaces": "   Hello",
    "double space": "a  b",
    "trailing space": "Hello ",
    "trailing spaces": "Hello    ",
    "one space": " ",
    "two spaces": "  ",
    "only spaces": " " * 37,
    "odd runs of spaces": "".join("x" + " " * n for n in range(1, 50)),
    "tab": "\t",
    "tabs": "a\tb\t\tc",
    "newline": "\n",
    "newlines": "\n\na\n\n\nb\n",
    "carriage return": "a\r\nb\r",
    "space before newline": "a \n b",
    "indented code": "def f(x):\n    if x:\n        return {'a': [1, 2]}\n",
    "tabbed code": "for (int i=0;i<10;++i) {\n\t\ta[i] -= b->c;\n\t}",
    "emoji": "I 💜 you 🦙🦙",
    "family of joined emoji": "👨\u200d👩\u200d👧\u200d👦",
    "flag and skin tone": "🏴\U000e0067\U000e0062\U000e007f 👍🏽 🇳🇱",
    "nul": "a\0b",
    "only nuls": "\0\0\0",
    "combining": "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343",
    "composed and not": "\u00e9 e\u0301 \u212b \u00c5",
    "compatibility": "ﬁ ² Ⅷ ｆｕｌｌ ㎏",
    "chinese": "小羊驼在山上吃草。",
    "japanese": "ラマは「草」を食べる",
    "korean": "라마가 풀을 먹는다",
    "arabic": "اللاما تأكل العشب",
    "hebrew with marks": "הַלָּמָה אוֹכֶלֶת",
    "direction marks": "a\u202eb\u202c\u200fc",
    "devanagari": "लामा घास खाता है",
    "control": "\x01\x02\x1b[31m\x7f\x80\x9f",
    "eos in text": "the </s> tag",
    "only eos in text": "</s>",
    "bos in text": "<s>x<s>",
    "unk in text": "a <unk> b",
    "byte in text": "<0x0A> <0xff>",
    "word boundary": "\u2581",
    "word boundaries": "a\u2581b\u2581\u2581 c",
    "other spaces": "a\u00a0b\u2003c\u3000d\u200be\ufefff",
    "line separators": "a\u2028b\u2029c\x0bd\x0ce",
    "long run of one letter": "a" * 3001,
    "long run of signs": "=" * 517 + "-" * 331 + "#" * 97,
    "long run of a pair": "ab" * 700,
    "url": "https://example.org/a%20b?q=1&r=%E2%96%81#x_y",
    "digits": "3.14159 1000000 2,000 0x1F 007",
    "markup": '<div class="a">&nbsp;</div><!-- -->',
    "maths": "∀x∈ℝ: ⌈x⌉ ≠ −x",
    "replacement character": "a\ufffdb",
    "last code points": "\ud7ff\ue000\uffff\U0010ffff",
    "mixed": " <s> 数学 = x\u0301²\t\n</s>  ",
}


def train(file, **options):
    """A BPE model of text that every Python brings, trained in a moment."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": CONFIG.vocab_size,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    file.write_bytes(model.getvalue())
    return file


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tokenizer") / "small.model")


@pytest.fixture(scope="session")
def weights():
    """Random everywhere, gains included, so that no two tensors can be taken for each other."""
    generator = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.3 * generator.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(draw, llama.abstract_weights(CONFIG))


@pytest.fixture(scope="session")
def exported(weights, small_tokenizer, tmp_path_factory):
    """One export for all tests that only read it."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    huggingface.export(weights, CONFIG, small_tokenizer, folder)
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    """An export to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def changed(weights, path, value):
    flat = traverse_util.flatten_dict(weights, sep=".")
    return traverse_util.unflatten_dict({**flat, path: value}, sep=".")


def edit_json(file, **changes):
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}))


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    edit(tensors)
    safetensors.numpy.save_file(tensors, file)


def test_table_of_names_covers_the_tree_both_ways():
    ours = set(traverse_util.flatten_dict(llama.abstract_weights(CONFIG), sep="."))
    assert ours == set(huggingface.NAMES)
    table = huggingface.tensors(CONFIG)
    per_layer = sum("{}" in name for name, _ in huggingface.NAMES.values())
    assert len(table) == CONFIG.layers * per_layer + len(huggingface.NAMES) - per_layer
    stored = sum(int(np.prod(tensor.hf_shape)) for tensor in table.values())
    assert stored == CONFIG.parameters()


def test_a_weight_without_a_row_raises(monkeypatch):
    monkeypatch.delitem(huggingface.NAMES, "blocks.up_DF")
    with pytest.raises(KeyError, match="blocks.up_DF"):
        huggingface.tensors(CONFIG)


def test_load_returns_what_export_was_given_bit_for_bit(exported, weights):
    config, loaded = huggingface.load(exported)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


def test_matrices_are_stored_out_by_in_with_heads_outermost(exported, weights):
    stored = safetensors.numpy.load_file(exported / "model.safetensors")
    D, F, H, V = CONFIG.width, CONFIG.swiglu_width, CONFIG.head_width, CONFIG.vocab_size
    shapes = {name: array.shape for name, array in stored.items()}
    assert (
        shapes.items()
        >= {
            "model.embed_tokens.weight": (V, D),
            "model.layers.1.self_attn.k_proj.weight": (CONFIG.kv_heads * H, D),
            "model.layers.1.self_attn.v_proj.weight": (CONFIG.kv_heads * H, D),
            "model.layers.1.mlp.gate_proj.weight": (F, D),
            "model.layers.1.mlp.up_proj.weight": (F, D),
            "model.layers.1.mlp.down_proj.weight": (D, F),
            "model.norm.weight": (D,),
            "lm_head.weight": (V, D),
        }.items()
    )
    query = stored["model.layers.1.self_attn.q_proj.weight"]
    assert query.shape == (CONFIG.query_heads * H, D)
    assert query[2 * H + 3, 5] == weights["blocks"]["query_DNH"][1, 5, 2, 3]
    output = stored["model.layers.2.self_attn.o_proj.weight"]
    assert output.shape == (D, CONFIG.query_heads * H)
    assert output[5, 2 * H + 3] == weights["blocks"]["output_NHD"][2, 2, 3, 5]


def test_export_writes_exactly_the_files_it_may_replace(exported):
    assert {path.name for path in exported.iterdir()} == huggingface.FILES
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_configs_hold_what_each_transformers_reads(weights, small_tokenizer, tmp_path):
    config = dataclasses.replace(CONFIG, rope_factor=4.0)
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
    assert config == dataclasses.replace(CONFIG, rope_factor=4.0)


def test_load_derives_what_old_configs_leave_out(copied):
    edit_json(
        copied / "config.json",
        **dict.fromkeys(("rope_parameters", "rope_theta", "attention_bias", "mlp_bias"), "drop"),
    )
    assert huggingface.load(copied)[0] == dataclasses.replace(CONFIG, rope_base=10_000.0)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model_type", "mistral", "model_type 'mistral'"),
        ("model_type", "drop", "model_type None"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("attention_bias", True, "attention_bias True"),
        ("mlp_bias", True, "mlp_bias True"),
        ("tie_word_embeddings", True, "tie_word_embeddings True"),
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


def test_load_refuses_tensors_that_do_not_fit(exported, tmp_path):
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
        folder = Path(shutil.copytree(exported, tmp_path / str(number)))
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
    (copied / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="sharded"):
        huggingface.load(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        huggingface.load(copied)
    with pytest.raises(UserError, match="config.json"):
        huggingface.load(copied / "nowhere")


def bad_exports():
    """Arguments of `export` that differ from good ones, and what the message must name."""
    nan = jnp.zeros((CONFIG.layers, CONFIG.width)).at[1, 2].set(jnp.nan)
    replace = dataclasses.replace
    return {
        "not finite": (lambda w: changed(w, "blocks.swiglu_norm_D", nan), CONFIG, "not finite"),
        "unknown weight": (lambda w: {**w, "bias_D": jnp.zeros(3)}, CONFIG, "bias_D"),
        "missing weight": (lambda w: {k: w[k] for k in w if k != "norm_D"}, CONFIG, "norm_D"),
        "another config": (lambda w: w, replace(CONFIG, swiglu_width=36), "down_FD"),
        "other pieces": (lambda w: w, replace(CONFIG, vocab_size=601), "600 pieces"),
        "indivisible width": (lambda w: w, replace(CONFIG, width=26), "query_heads"),
    }


@pytest.mark.parametrize("case", bad_exports())
def test_export_refuses_and_leaves_nothing(case, weights, small_tokenizer, tmp_path):
    edit, config, named = bad_exports()[case]
    with pytest.raises(UserError, match=named):
        huggingface.export(edit(weights), config, small_tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("foreign", ["notes.txt", "missing weights", "other model", "empty"])
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
    elif foreign == "missing weights":
        (folder / "model.safetensors").unlink()
    elif foreign == "other model":
        edit_json(folder / "config.json", architectures=["GemmaForCausalLM"])
    before = contents(folder)
    with pytest.raises(UserError, match="mine"):
        huggingface.export(weights, CONFIG, small_tokenizer, folder)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_export_leaves_a_file_alone(weights, small_tokenizer, tmp_path):
    file = tmp_path / "mine"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        huggingface.export(weights, CONFIG, small_tokenizer, file)
    assert file.read_text() == "mine"


def test_export_replaces_an_earlier_export(copied, weights, small_tokenizer):
    other = jax.tree.map(lambda leaf: leaf + 1, weights)
    huggingface.export(other, CONFIG, small_tokenizer, copied)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(copied)[1], other)
    assert list(copied.parent.iterdir()) == [copied]


def test_a_failing_export_cleans_up(weights, small_tokenizer, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        huggingface.export(weights, CONFIG, small_tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


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
            huggingface.export(weights, CONFIG, small_tokenizer, folder)
    assert (contents(folder) if folder.exists() else None) == before
    huggingface.export(weights, CONFIG, small_tokenizer, folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert set(contents(folder)) == huggingface.FILES


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 500},
        {"byte_fallback": False, "vocab_size": 300},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["<user>"]},
        {"eos_id": -1},
    ],
    ids=str,
)
def test_tokenizer_json_refuses_what_it_cannot_express(options, tmp_path):
    file = train(tmp_path / "odd.model", **options)
    with pytest.raises(UserError, match=next(iter(options)).removesuffix("_id")):
        huggingface.tokenizer_json(file)


def test_tokenizer_json_refuses_what_is_no_tokenizer(exported, tmp_path):
    with pytest.raises(UserError, match="no sentencepiece model"):
        huggingface.tokenizer_json(exported / "config.json")
    with pytest.raises(UserError, match="There is no tokenizer"):
        huggingface.tokenizer_json(tmp_path / "nowhere.model")


def rewrite(source, target, edit):
    """The sentencepiece model `source` with its list of [name, score, kind] changed by `edit`."""

    def varint(number):
        more = number > 0x7F
        return bytes([number & 0x7F | more << 7]) + (varint(number >> 7) if more else b"")

    def message(number, content):
        return varint(number << 3 | 2) + varint(len(content)) + content

    fields = list(tokenizer_json.protobuf_fields(source.read_bytes()))
    raw = [{3: 1, **dict(tokenizer_json.protobuf_fields(value))} for n, value in fields if n == 1]
    pieces = [[piece[1], struct.unpack("<f", piece[2])[0], piece[3]] for piece in raw]
    edit(pieces)
    written = [
        message(1, message(1, name) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))
        for name, score, kind in pieces
    ]
    others = [message(n, value) for n, value in fields if n != 1]
    target.write_bytes(b"".join(written + others))
    return target


def test_merges_are_ordered_by_score_and_not_by_id(small_tokenizer, tmp_path):
    def swap(pieces):
        pieces[270], pieces[400] = pieces[400], pieces[270]

    before = huggingface.tokenizer_json(small_tokenizer)["model"]
    after = huggingface.tokenizer_json(rewrite(small_tokenizer, tmp_path / "new", swap))["model"]
    assert before["vocab"] != after["vocab"]
    assert before["merges"] == after["merges"]


def test_tokenizer_json_refuses_pieces_whose_merges_would_differ(small_tokenizer, tmp_path):
    names = list(huggingface.tokenizer_json(small_tokenizer)["model"]["vocab"])

    def tie(pieces):
        pieces[names.index("he")][1] = pieces[names.index("in")][1]

    def drop(pieces):
        pieces[names.index("q")][0] = "\u00b6".encode()

    for edit, named in ((tie, "score of its own"), (drop, "piece for every character")):
        with pytest.raises(UserError, match=named):
            huggingface.tokenizer_json(rewrite(small_tokenizer, tmp_path / "new", edit))


@pytest.mark.torch
def test_runs_of_spaces_of_one_score_merge_alike(small_tokenizer, tmp_path):
    """Llama 2 gives every run of spaces the same score, far below all others."""
    from transformers import AutoTokenizer

    def level(pieces):
        for piece in pieces:
            if set(piece[0].decode()) == {"\u2581"}:
                piece[1] = -1e9

    file = rewrite(small_tokenizer, tmp_path / "level.model", level)
    processor, transformed = open_both(file, tmp_path / "model", AutoTokenizer)
    runs = [text + " " * n + "return" for text in ("", "x", "\n") for n in range(80)]
    assert transformed(runs)["input_ids"] == processor.encode(runs)


@pytest.fixture(scope="module", params=["small", "llama2"])
def both_tokenizers(request, small_tokenizer, tmp_path_factory):
    """sentencepiece's tokenizer, and the folder as a user of transformers opens it."""
    from transformers import AutoTokenizer

    file = small_tokenizer
    if request.param == "llama2":
        if "TINYLLAMA_TOKENIZER" not in os.environ:
            pytest.skip("TINYLLAMA_TOKENIZER is not set")
        file = Path(os.environ["TINYLLAMA_TOKENIZER"])
    return open_both(file, tmp_path_factory.mktemp(request.param) / "model", AutoTokenizer)


def open_both(file, folder, auto):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    config = dataclasses.replace(CONFIG, vocab_size=processor.get_piece_size(), context=10_000)
    weights = jax.tree.map(lambda leaf: np.zeros(leaf.shape), llama.abstract_weights(config))
    huggingface.export(weights, config, file, folder)
    return processor, auto.from_pretrained(folder)


@pytest.mark.torch
def test_transformers_encodes_as_sentencepiece_does(both_tokenizers):
    processor, transformed = both_tokenizers
    wrong = {
        name: (processor.encode(text), ids)
        for name, text in STRINGS.items()
        if (ids := transformed(text)["input_ids"]) != processor.encode(text)
    }
    assert not wrong
    assert transformed(list(STRINGS.values()))["input_ids"] == processor.encode([*STRINGS.values()])


@pytest.mark.torch
def test_transformers_decodes_as_sentencepiece_does(both_tokenizers):
    processor, transformed = both_tokenizers
    ids = {name: processor.encode(text) for name, text in STRINGS.items()}
    wrong = {
        name: (processor.decode(ids[name]), text)
        for name in STRINGS
        if (text := transformed.decode(ids[name])) != processor.decode(ids[name])
    }
    assert not wrong
    # The word boundary itself comes back as a space, in both.
    same = [name for name in STRINGS if transformed.decode(ids[name]) == STRINGS[name]]
    assert len(STRINGS) - len(same) == sum("\u2581" in text for text in STRINGS.values())


@pytest.mark.torch
def test_runs_of_every_character_merge_alike(both_tokenizers):
    """Equal pieces side by side: the order of merges of one score decides."""
    processor, transformed = both_tokenizers
    runs = [character * n for character in " =-*#_.ao0e\n" for n in range(1, 120)]
    assert transformed(runs)["input_ids"] == processor.encode(runs)


@pytest.mark.torch
def test_special_tokens_keep_their_ids(both_tokenizers):
    processor, transformed = both_tokenizers
    assert transformed.unk_token_id == processor.unk_id()
    assert transformed.bos_token_id == processor.bos_id()
    assert transformed.eos_token_id == processor.eos_id()
    assert len(transformed) == processor.get_piece_size()
    ids = [processor.bos_id(), *processor.encode("Hello"), processor.eos_id()]
    assert transformed.decode(ids, skip_special_tokens=True) == "Hello"


@pytest.mark.torch
def test_a_tokenizer_without_dummy_prefix_stays_without(tmp_path):
    from transformers import AutoTokenizer

    file = train(tmp_path / "bare.model", add_dummy_prefix=False)
    processor, transformed = open_both(file, tmp_path / "model", AutoTokenizer)
    assert processor.decode(processor.encode(" a")) == " a"
    for text in STRINGS.values():
        assert transformed(text)["input_ids"] == processor.encode(text)
        assert transformed.decode(processor.encode(text)) == processor.decode(
            processor.encode(text)
        )


@pytest.mark.torch
def test_check_sees_equal_weights_and_unequal_ones(exported, weights):
    assert huggingface.check(exported, CONFIG, weights) < 2e-5
    other = changed(weights, "blocks.key_DKH", weights["blocks"]["key_DKH"] * 1.1)
    assert huggingface.check(exported, CONFIG, other) > 1e-3


def test_check_without_torch_says_what_to_install(exported, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'tinyllama-jax\[torch\]'"):
        huggingface.check(exported, CONFIG, weights)


@pytest.mark.torch
def test_rope_factor_survives_the_way_through_transformers(weights, small_tokenizer, tmp_path):
    config = dataclasses.replace(CONFIG, rope_factor=4.0)
    huggingface.export(weights, config, small_tokenizer, tmp_path / "model")
    loaded_config, loaded = huggingface.load(tmp_path / "model")
    assert loaded_config == config
    assert huggingface.check(tmp_path / "model", loaded_config, loaded) < 2e-5
    assert huggingface.check(tmp_path / "model", CONFIG, loaded) > 1e-3


@pytest.mark.torch
def test_load_reads_what_transformers_itself_saves(exported, weights, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config, loaded = huggingface.load(tmp_path)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)
