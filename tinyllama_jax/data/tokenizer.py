"""Sentencepiece: train a tokenizer, open one, and count the bytes behind tokens."""

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from tinyllama_jax.errors import UserError, require
from tinyllama_jax.files import make_folder, write_aside

UNK, BOS, EOS = 0, 1, 2  # Llama 2's ids, in every tokenizer of the project
SPACE = "\u2581"


def load_tokenizer(path: str | Path) -> sentencepiece.SentencePieceProcessor:
    """Opens a sentencepiece model.

    Raises:
      UserError: no such file, not a sentencepiece model, or other ids than Llama 2's.
    """
    require(
        Path(path).is_file(),
        f"There is no tokenizer at {path}: train one with `tinyllama tokenizer`, "
        "or give the path of Llama 2's tokenizer.model.",
    )
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{path} is not a sentencepiece model: give a tokenizer.model.") from None
    ids = tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()
    require(
        ids == (UNK, BOS, EOS),
        f"{path} has unk, bos, eos = {ids}; Llama's are {(UNK, BOS, EOS)}: "
        "train one with `tinyllama tokenizer`.",
    )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: str | Path) -> None:
    """Trains byte-fallback BPE with Llama 2's settings and writes `out` in one rename.

    Raises:
      UserError: too little text for so many pieces, a folder at `out`, or a full disk.
    """
    out, model = Path(out), io.BytesIO()
    require(not out.is_dir(), f"{out} is a folder: give a file, such as {out / 'tokenizer.model'}.")
    # Line by line: the trainer drops sentences above 4 KiB, and a newline is a byte piece anyway.
    lines = (line for text in texts for line in text.splitlines() if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            character_coverage=0.99995,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"No tokenizer of {vocab_size} pieces can be trained on this text: "
            f"give more text or a smaller --vocab-size ({error})."
        ) from None
    make_folder(out.parent)
    write_aside(out, model.getvalue())


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ByteCounter:
    """UTF-8 bytes of the text behind tokens, without decoding it."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self.bytes_V = np.zeros(tokenizer.get_piece_size(), np.int64)
        self.prefixed_V = np.zeros(len(self.bytes_V), bool)
        for index in range(len(self.bytes_V)):
            piece = tokenizer.id_to_piece(index)
            if tokenizer.is_byte(index):
                self.bytes_V[index] = 1
            elif not tokenizer.is_control(index):
                self.bytes_V[index] = len(piece.replace(SPACE, " ").encode())
                self.prefixed_V[index] = piece.startswith(SPACE)

    def __call__(self, rows_BS: np.ndarray) -> int:
        """Bytes of the text that the targets `rows_BS[:, 1:]` stand for."""
        targets_BT = rows_BS[:, 1:]
        # Sentencepiece puts a space before each document that its author did not write.
        invented_BT = (rows_BS[:, :-1] == EOS) & self.prefixed_V[targets_BT]
        return int(self.bytes_V[targets_BT].sum() - np.count_nonzero(invented_BT))
