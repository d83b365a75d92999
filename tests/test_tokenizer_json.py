"""The ids of transformers, opened on an exported folder, are the ids of sentencepiece."""

import argparse
import dataclasses
import io
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece

from tinyllama_jax.config import DEMO, UserError
from tinyllama_jax.inference import huggingface, tokenizer_json
from tinyllama_jax.model import llama

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
    "unassigned": "\u0378 \ufdd0 \U00030000 \U000e0fff",
    "private use": "\ue000\U000f0000",
    "variation selectors": "❤\ufe0f ❤\ufe0e 葛\U000e0100",
    "right to left numbers": "\u0661\u0662 (12) \u05d0",
    "long run of newlines": "\n" * 999 + "x" + "\r\n" * 99,
    "long run of joined emoji": "👩\u200d🚀" * 500,
    "mixed": " <s> 数学 = x\u0301²\t\n</s>  ",
}


def document_of_10_mb() -> str:
    """All of the above, over and over in a row, with long runs between."""
    strings = [text for text in STRINGS.values() if len(text) < 100]
    part = "".join(strings) + "草" * 800_000 + " " * 500_000 + "🦙" * 50_000
    return part * (10_000_000 // len(part.encode()) + 1)


def train(file, **options):
    """A BPE model of text that every Python brings, trained in a moment."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 600,
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
        tokenizer_json.tokenizer_json(file)


def test_tokenizer_json_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no sentencepiece model"):
        tokenizer_json.tokenizer_json(Path(__file__))
    with pytest.raises(UserError, match="There is no tokenizer"):
        tokenizer_json.tokenizer_json(tmp_path / "nowhere.model")


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

    before = tokenizer_json.tokenizer_json(small_tokenizer)["model"]
    after = tokenizer_json.tokenizer_json(rewrite(small_tokenizer, tmp_path / "new", swap))["model"]
    assert before["vocab"] != after["vocab"]
    assert before["merges"] == after["merges"]


def test_tokenizer_json_refuses_pieces_whose_merges_would_differ(small_tokenizer, tmp_path):
    names = list(tokenizer_json.tokenizer_json(small_tokenizer)["model"]["vocab"])

    def tie(pieces):
        pieces[names.index("he")][1] = pieces[names.index("in")][1]

    def drop(pieces):
        pieces[names.index("q")][0] = "\u00b6".encode()

    for edit, named in ((tie, "score of its own"), (drop, "piece for every character")):
        with pytest.raises(UserError, match=named):
            tokenizer_json.tokenizer_json(rewrite(small_tokenizer, tmp_path / "new", edit))


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
        file = request.getfixturevalue("llama2")
    return open_both(file, tmp_path_factory.mktemp(request.param) / "model", AutoTokenizer)


def open_both(file, folder, auto):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    config = dataclasses.replace(DEMO, vocab_size=processor.get_piece_size(), context=8192)
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
@pytest.mark.parametrize("both_tokenizers", ["small"], indirect=True)
def test_transformers_encodes_a_document_of_10_mb_as_sentencepiece_does(both_tokenizers):
    processor, transformed = both_tokenizers
    text = document_of_10_mb()
    assert transformed(text, verbose=False)["input_ids"] == processor.encode(text)


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
