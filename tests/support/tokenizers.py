"""Tokenizers, and texts that are hard on them."""

import argparse
import io
from pathlib import Path
from typing import Any

import sentencepiece

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


def document_of_1_mb() -> str:
    """All of the above, over and over in a row, with long runs between."""
    strings = [text for text in STRINGS.values() if len(text) < 100]
    part = "".join(strings) + "草" * 80_000 + " " * 50_000 + "🦙" * 5_000
    return part * (1_000_000 // len(part.encode()) + 1)


def train(file: Path, **options: Any) -> Path:
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
