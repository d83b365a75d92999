"""Documents to a dataset: a TFDS directory of ArrayRecord shards and a manifest."""

import contextlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from tinyllama_jax.data.format import MANIFEST, RECORD, read_manifest, token_dtype
from tinyllama_jax.data.tokenizer import file_sha256, load_tokenizer
from tinyllama_jax.errors import require
from tinyllama_jax.files import make_folder
from tinyllama_jax.preparation.documents import Document, corpus_hash, standard_library
from tinyllama_jax.preparation.packing import Packer, pack
from tinyllama_jax.preparation.shards import (
    ShardWriter,
    shard_name,
    token_features,
    write_tfds_metadata,
)

SHARD_RECORDS = 2**14  # 268 MB of uint16 tokens
ENCODE_BATCH = 64  # documents handed to sentencepiece's threads at once


def prepare_standard_library(tokenizer: str | Path, out: str | Path) -> dict[str, Path]:
    """Writes the embedded corpus as one dataset per source: `out/prose` and `out/code`.

    A dataset that is there already, made from the same text and tokenizer, is left alone.

    Returns:
      The folder of each source.

    Raises:
      UserError: a bad tokenizer, or a folder in the way that holds something else.
    """
    folders = {}
    for source, splits in standard_library().items():
        folders[source] = Path(out) / source
        write_dataset(source, splits, tokenizer, folders[source])
    return folders


def write_dataset(
    name: str, splits: Mapping[str, Sequence[Document]], tokenizer: str | Path, out: str | Path
) -> dict[str, Any]:
    """Tokenises, packs and writes one dataset aside, then renames it to `out`.

    Args:
      name: of the dataset, for TFDS.
      splits: documents of each split, in order.
      tokenizer: path of a sentencepiece model.
      out: folder to make. One that holds this very dataset is left alone.

    Returns:
      The manifest, as it stands in `out/manifest.json`.

    Raises:
      UserError: a bad tokenizer; `out` holds something else; a split is shorter than a record.
    """
    out, processor = Path(out), load_tokenizer(tokenizer)
    vocab_size = processor.get_piece_size()
    manifest: dict[str, Any] = {
        "format": 1,
        "name": name,
        "documents_sha256": {split: corpus_hash(splits[split]) for split in splits},
        "tokenizer": {"sha256": file_sha256(tokenizer), "pieces": vocab_size},
        "bos": False,
        "eos": True,
        "record_tokens": RECORD + 1,
        "dtype": token_dtype(vocab_size).__name__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "splits": {},
    }
    if out.exists():
        require(
            (out / MANIFEST).is_file(),
            f"{out} is there already and no dataset: remove it, or give another --out.",
        )
        there = read_manifest(out)
        same = all(there.get(key) == manifest[key] for key in manifest if key != "splits")
        require(
            same,
            f"{out} holds a dataset made from another text or tokenizer: "
            "remove it, or give another --out.",
        )
        return there

    features = token_features(vocab_size)
    make_folder(out.parent)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    with _removed_on_failure(aside), Progress(transient=True) as progress:
        for split, documents in splits.items():
            task = progress.add_task(f"{name}/{split}", total=len(documents))

            def token_lists(documents=documents, task=task) -> Iterator[list[int]]:
                for start in range(0, len(documents), ENCODE_BATCH):
                    batch = [document.text for document in documents[start : start + ENCODE_BATCH]]
                    yield from processor.encode(batch, num_threads=os.cpu_count() or 1)
                    progress.advance(task, len(batch))

            counted = _Counted(token_lists())
            shards = _write_shards(aside, name, split, features, pack(counted, Packer(vocab_size)))
            records = sum(shard["records"] for shard in shards)
            require(
                records > 0,
                f"{name}/{split} has {counted.tokens:,} tokens, fewer than the {RECORD + 1:,} of "
                "one record: give more text.",
            )
            manifest["splits"][split] = {
                "documents": len(documents),
                "records": records,
                "tokens": records * (RECORD + 1),
                "dropped_tokens": counted.tokens - records * (RECORD + 1),
                "shards": shards,
            }
        write_tfds_metadata(aside, name, features, manifest["splits"])
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        aside.rename(out)
    return manifest


class _Counted:
    """Passes documents on and counts their tokens, each one's eos included."""

    def __init__(self, documents: Iterator[list[int]]):
        self.documents, self.tokens = documents, 0

    def __iter__(self) -> Iterator[list[int]]:
        for document in self.documents:
            self.tokens += len(document) + 1
            yield document


def _write_shards(
    folder: Path, name: str, split: str, features, records: Iterator[np.ndarray]
) -> list[dict[str, Any]]:
    """Writes shards of `SHARD_RECORDS` under TFDS's names and describes each for the manifest."""
    folder.mkdir(exist_ok=True)
    shards = []
    while first := list(itertools.islice(records, 1)):
        writer = ShardWriter(folder / f"{split}-{len(shards)}", features)
        writer.write(itertools.chain(first, itertools.islice(records, SHARD_RECORDS - 1)))
        shards.append(writer.finish())
    for index, shard in enumerate(shards):
        # TFDS names a shard by the number of shards, known only now.
        file = shard_name(name, split, index, len(shards))
        (folder / shard["file"]).rename(folder / file)
        shard["file"] = file
    return shards


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
