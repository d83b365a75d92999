"""Converts a sentencepiece model into the tokenizer.json of transformers, with the same ids."""

import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from tinyllama_jax.errors import UserError, require

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # the kinds of pieces in sentencepiece_model.proto


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Reads the wire format of protobuf.

    It is read by hand, because the protobuf module that sentencepiece ships imports only with a
    protobuf newer than other packages allow, and sentencepiece's processor does not tell the kind
    of a model.

    Args:
      message: the bytes of a protobuf message.

    Yields:
      The number and the raw value of each field: an integer, or bytes for all other kinds.
    """

    def varint() -> int:
        """The integer at `at`, which has seven bits in each byte, the lowest first."""
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    at = 0
    while at < len(message):
        # The last three bits say how the value is stored: 0 as a varint, 1 in 8 bytes, 2 as bytes
        # with their length before them, 5 in 4 bytes.
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            at += size
            yield number, message[at - size : at]


def special_tokens(tokenizer: Path) -> dict[str, int]:
    """The ids of a sentencepiece model's special tokens.

    Returns:
      The ids under the names `unk_token`, `bos_token` and `eos_token`.

    Raises:
      UserError: the file is missing or no sentencepiece model, or the model lacks one of them.
    """
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
    """Reads a sentencepiece BPE model, if other runtimes can reproduce its ids exactly.

    Returns:
      The pieces, their scores and their kinds, each in the order of the ids; and whether a space is
      put before every text.

    Raises:
      UserError: the file is missing or no sentencepiece model, or other runtimes would give other
        ids for some text.
    """
    special_tokens(tokenizer)  # raises if the file is no sentencepiece model
    # The numbers and defaults of the fields are those of sentencepiece_model.proto. Protobuf leaves
    # out a field that has its default.
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
    # Pieces with one score in common. Which of them merges first is sentencepiece's choice, and
    # other runtimes may choose otherwise.
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
        # Runs of one character may share a score: `tokenizer_json` sorts them as sentencepiece
        # merges them. Llama 2 has such pieces, all runs of spaces.
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
    """The scores of the pieces that come about by merging others."""
    table = zip(names, scores, kinds, strict=True)
    return {name: score for name, score, kind in table if kind == NORMAL}


def tokenizer_json(tokenizer: Path) -> dict[str, Any]:
    """Makes the content of a tokenizer.json, in which transformers' own BPE does the merging.

    Args:
      tokenizer: the sentencepiece model.

    Raises:
      UserError: the file is missing or no sentencepiece model, or transformers would give other ids
        for some text.
    """
    tokenizer = Path(tokenizer)
    names, all_scores, kinds, prefix = read_pieces(tokenizer)
    scores = _normal(names, all_scores, kinds)
    # sentencepiece has scores of pieces, where transformers' BPE has a ranked list of merges. Every
    # way to cut a piece into two others is a merge.
    merges = [
        (name[:cut], name[cut:])
        for name in scores
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    # sentencepiece merges the pair with the best score first, and among equal scores the leftmost.
    # Llama 2 gives all runs of spaces the same score. Among those the leftmost pair is the one
    # whose left part has grown longest.
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
