"""How files of token ids that were made elsewhere become documents: the ids as they stand there.

Three kinds, told by their first bytes: the packed files of the original TinyLlama, NumPy's .npy,
and ids without any header, as nanoGPT and OLMo keep them (OLMo under the suffix .npy). A document
begins with a bos or after an eos, so both conventions are cut rightly and what stands in the file
stays. Only documents of nothing but bos and eos are left out, which no writer means as text: the
original filled the rest of its last files with bos.
"""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinyllama_jax.data.tokenizer import BOS, EOS
from tinyllama_jax.errors import UserError, require
from tinyllama_jax.preparation.readers import SHARE, BadFile, Corpus, Tally, list_files

# TinyLlama's lit_gpt/packed_dataset.py: magic, version, code of the dtype, ids in the file.
PACKED_MAGIC, PACKED_HEADER = b"LITPKDS", struct.Struct("<7sQBQ")
PACKED_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
NPY_MAGIC = b"\x93NUMPY"

WIDE = "seems to hold ids of 4 bytes, which --dtype uint32 would say"
HEAD = 2**16  # bytes by which a file's kind is told
BLOCK = 2**18  # ids read at once
LARGEST_DOCUMENT = 2**20
"""Ids after which a document is cut in two: memory stays flat where a file has no bos and no eos,
and no id is lost by it."""

TOKEN_FACTS = ("bos_tokens", "eos_tokens", "tokens_without_text")
"""What the manifest counts: what is in its documents, and what was left out around them."""

SPLITS = {"train": "train", "validation": "val", "test": "test"}  # and how their names begin
LAYOUTS = (
    {split: f"**/{begin}*" for split, begin in SPLITS.items()},  # nanoGPT's train.bin and val.bin
    {split: f"{begin}*/**/*" for split, begin in SPLITS.items()},  # train/0.npy, validation/0.npy
)


def open_splits(corpus: Corpus, source: Path) -> Corpus:
    """The corpus with the splits that the names below `source` tell, if they tell some.

    Files of validation take the place of the held-out share.

    Raises:
      UserError: no token files; a first one of another dtype than `raw_dtype`, before anything is
        begun with that; a share that was asked for, beside files of validation; or, beside files
        of validation or test, none of train or some of no split.
    """
    names = {name for name, _ in list_files(corpus, source)[0]["train"]}
    head = _head(source / min(names))
    headless = not head.startswith((PACKED_MAGIC, NPY_MAGIC))
    require(
        corpus.raw_dtype != "uint16" or not (headless and _looks_wide(head)),
        f"{min(names)} {WIDE}.",
    )
    for splits in LAYOUTS:
        files = {
            split: names & {path.relative_to(source).as_posix() for path in source.glob(pattern)}
            for split, pattern in splits.items()
        }
        if files["validation"] or files["test"]:
            rest = names.difference(*files.values())
            require(
                bool(files["train"]) and not rest,
                f"{source} has files of validation or test, and "
                f"{min(rest) + ' is of no split' if rest else 'none of train'}: let the names of "
                "all begin with train, val or test.",
            )
            require(
                not files["validation"] or corpus.held_out_share == SHARE,
                f"{source} has files of validation: leave --held-out out.",
            )
            there = {split: pattern for split, pattern in splits.items() if files[split]}
            share = 0.0 if files["validation"] else corpus.held_out_share
            return dataclasses.replace(corpus, splits=there, held_out_share=share)
    return corpus


def read_token_documents(
    source: Path, file: str, corpus: Corpus, tally: Tally, *, vocab_size: int
) -> Iterator[tuple[np.ndarray, bytes]]:
    """Yields (ids, those that are neither bos nor eos in uint32) of every document of a file.

    The ids are int64, with the bos they begin with and the eos they end with, if they do. A
    document that goes on in the next file is two, which stay side by side unless one is held out.
    Memory stays flat. What is left out goes into the tally: documents with ids outside the
    vocabulary, bad files; and tokens of documents of nothing but bos and eos.

    Raises:
      UserError: bad input where the tally says stop; a file that the system cannot read, always.
    """
    assert corpus.raw_dtype
    tally.bytes_read = 0
    tally.tokens.update(dict.fromkeys(TOKEN_FACTS, 0))
    path, first, number = source / file, 0, 0
    try:
        for stream, begins in _stretches(path, corpus.raw_dtype, tally):
            is_text = (stream != BOS) & (stream != EOS)
            # Negative ids are the largest of all, read as unsigned.
            bad = np.maximum.reduceat(stream.view(np.uint64), begins) >= vocab_size
            empty = ~(np.logical_or.reduceat(is_text, begins) | bad)
            ends = np.append(begins[1:], len(stream))
            tally.tokens["tokens_without_text"] += int((ends - begins)[empty].sum())
            for index in np.flatnonzero(~empty):
                ids = stream[begins[index] : ends[index]]
                number += 1
                if bad[index]:
                    at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
                    reason = f"holds an id outside the vocabulary of {vocab_size:,}"
                    place = f"token {first + begins[index] + at + 1:,} of the file is {ids[at]}"
                    tally.add_bad(file, reason, number, place)
                    continue
                tally.tokens["bos_tokens"] += int(ids[0] == BOS)
                tally.tokens["eos_tokens"] += int(ids[-1] == EOS)
                key = ids[is_text[begins[index] : ends[index]]]
                yield ids, key.astype("<u4").tobytes()
            first += len(stream)
    except BadFile as error:
        tally.add_bad(file, str(error))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}): the same command goes on when it can."
        ) from None


def _stretches(path: Path, raw_dtype: str, tally: Tally) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids in int64, where documents begin in them) of whole documents, until the file ends."""
    dtype, offset = _layout(path, raw_dtype)
    left = np.empty(0, np.int64)
    with open(path, "rb") as file:
        file.seek(offset)
        while data := file.read(BLOCK * dtype.itemsize):
            tally.bytes_read = file.tell()
            stream = np.concatenate([left, np.frombuffer(data, dtype).astype(np.int64)])
            begins = np.flatnonzero((stream[1:] == BOS) | (stream[:-1] == EOS)) + 1
            begins = np.insert(begins, 0, 0)
            # The last document may go on.
            whole = begins[-1] if len(stream) - begins[-1] < LARGEST_DOCUMENT else len(stream)
            if whole:
                yield stream[:whole], begins[begins < whole]
            left = stream[whole:]
    if len(left):
        yield left, np.zeros(1, np.int64)


def _layout(path: Path, raw_dtype: str) -> tuple[np.dtype, int]:
    """(dtype of the ids, bytes in front of the first). Raises `BadFile`."""
    size = path.stat().st_size
    head, offset = _head(path), 0
    if head.startswith(PACKED_MAGIC):
        if size < PACKED_HEADER.size:
            raise BadFile("ends within its header")
        _, version, code, count = PACKED_HEADER.unpack_from(head)
        if version != 1:
            raise BadFile(f"is packed in version {version}, not 1")
        if code not in PACKED_DTYPES:
            raise BadFile(f"has the dtype code {code}, which stands for no kind of integer")
        dtype, offset = np.dtype(PACKED_DTYPES[code]), PACKED_HEADER.size
        if size != offset + count * dtype.itemsize:
            raise BadFile(f"has {size:,} bytes, not those of the {count:,} ids of its header")
    elif head.startswith(NPY_MAGIC):
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except ValueError:
            raise BadFile("is no whole array") from None
        dtype, offset = array.dtype, array.offset
        if dtype.kind not in "iu" or not array.flags.c_contiguous:
            raise BadFile(f"holds no row of integers, but {dtype} in {array.ndim} dimensions")
        if size != offset + array.nbytes:
            raise BadFile("is no whole array")
    else:
        dtype = np.dtype(raw_dtype).newbyteorder("<")
        if size % dtype.itemsize:
            raise BadFile(f"ends within an id of {dtype.itemsize} bytes")
        if raw_dtype == "uint16" and _looks_wide(head):
            raise BadFile(WIDE)
    if size == offset:
        raise BadFile("is empty")
    return dtype, offset


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def _looks_wide(head: bytes) -> bool:
    """Whether every other uint16 is so small that they must be halves of larger ids.

    Read as uint16, such ids would all be in the vocabulary, each second one unk or so.
    """
    halves = np.frombuffer(head[: len(head) // 2 * 2], "<u2")
    low, high = halves[::2], halves[1::2]
    return len(halves) >= 64 and high.max() < 16 <= low.max()
