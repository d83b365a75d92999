"""A sentencepiece model as the tokenizer.json that transformers opens, with the same ids."""

import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from tinyllama_jax.errors import UserError, require

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # kinds of pieces in sentencepiece_model.proto


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and raw values of a protobuf message: integers, or bytes for all other kinds.

    By hand, because sentencepiece's own classes import with one version of protobuf alone.
    """

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    at = 0
    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            at += size
            yield number, message[at - size : at]


def special_tokens(tokenizer: Path) -> dict[str, int]:
    """Ids of `unk_token`, `bos_token` and `eos_token`."""
    require(tokenizer.is_file(), f"There is no tokenizer {tokenizer}: give a sentencepiece model.")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{tokenizer} is no sentencepiece model: give one.") from error
    ids = {name: getattr(processor, f"{name}_id")() for name in ("unk", "bos", "eos")}
    for name, index in ids.items():
        require(index >= 0, f"{tokenizer} has no {name} piece: train it with {name}_id set.")
    return {f"{name}_token": index for name, index in ids.items()}


def read_pieces(tokenizer: Path) -> tuple[list[str], list[float], list[int], bool]:
    """A sentencepiece BPE model that other runtimes can take over with the same ids.

    Returns:
      By id the pieces, their scores and their kinds; and whether a space goes before a text.

    Raises:
      UserError: no such file, no sentencepiece model, or one that they cannot express exactly.
    """
    special_tokens(tokenizer)
    # Numbers and defaults of the fields are those of sentencepiece_model.proto.
    pieces, trainer, normalizer = [], {3: 1, 24: 0, 35: 0}, {2: b"", 3: 1, 4: 1, 5: 1}
    for number, value in protobuf_fields(tokenizer.read_bytes()):
        if number == 1:
            pieces.append({2: struct.pack("<f", 0), 3: NORMAL, **dict(protobuf_fields(value))})
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(protobuf_fields(value))
    names = [piece[1].decode() for piece in pieces]
    all_scores = [struct.unpack("<f", piece[2])[0] for piece in pieces]
    kinds = [piece[3] for piece in pieces]
    scores = _normal(names, all_scores, kinds)
    equals = defaultdict(list)
    for name, score in scores.items():
        if len(name) > 1:
            equals[score].append(name)
    for option, holds in {
        "model_type='bpe'": trainer[3] == 2,
        "byte_fallback=True": trainer[35],
        "normalization_rule_name='identity'": not normalizer[2],
        "remove_extra_whitespaces=False": not normalizer[4],
        "escape_whitespaces=True": normalizer[5],
        "treat_whitespace_as_suffix=False": not trainer[24],
        "user_defined_symbols=[]": set(kinds) <= {NORMAL, UNKNOWN, CONTROL, BYTE},
        "a piece for every character": all(c in scores for name in scores for c in name),
        # Runs of one character are no trouble, see below.
        "a score of its own for every piece": all(
            len(group) == 1 or len(set("".join(group))) == 1 for group in equals.values()
        ),
    }.items():
        require(
            bool(holds),
            f"{tokenizer} was not trained with {option}, without which no other runtime can "
            "express it exactly: train one that is.",
        )
    return names, all_scores, kinds, bool(normalizer[3])


def _normal(names: list[str], scores: list[float], kinds: list[int]) -> dict[str, float]:
    """Scores of the pieces that merges make."""
    table = zip(names, scores, kinds, strict=True)
    return {name: score for name, score, kind in table if kind == NORMAL}


def tokenizer_json(tokenizer: Path) -> dict[str, Any]:
    """The content of tokenizer.json: a sentencepiece BPE model as transformers' own BPE.

    Args:
      tokenizer: the sentencepiece model.

    Raises:
      UserError: no such file, no sentencepiece model, or one that this cannot express exactly.
    """
    tokenizer = Path(tokenizer)
    names, all_scores, kinds, prefix = read_pieces(tokenizer)
    scores = _normal(names, all_scores, kinds)
    merges = [
        (name[:cut], name[cut:])
        for name in scores
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    # sentencepiece merges the best score first and the leftmost of equals. Llama 2 gives all runs
    # of spaces one score: among them the leftmost is the run that has already grown longest.
    merges.sort(key=lambda merge: (-scores["".join(merge)], -len(merge[0])))
    space = {"String": "\u2581"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    prepend = [{"type": "Prepend", "prepend": "\u2581"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    escape = [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    unescape = [{"type": "Replace", "pattern": space, "content": " "}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": names[index], **flags, "special": True}
            for index, kind in enumerate(kinds)
            if kind in (UNKNOWN, CONTROL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": prepend * prefix + escape},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip * prefix],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[kinds.index(UNKNOWN)],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [list(merge) for merge in merges],
        },
    }
