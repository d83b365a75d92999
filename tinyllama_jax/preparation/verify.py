"""Is a dataset on disk what its manifest says?"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from rich.progress import track

from tinyllama_jax.data.format import MANIFEST
from tinyllama_jax.data.tokenizer import file_sha256
from tinyllama_jax.errors import require
from tinyllama_jax.preparation.shards import record_count

SAMPLES = 64  # records of each split whose ids are read


def verify_dataset(folder: Path) -> list[str]:
    """Hashes all shards and compares them, their counts and TFDS's metadata with the manifest.

    Returns:
      A line for each thing that is bad; none for a dataset that is whole.

    Raises:
      UserError: no dataset there.
    """
    require(
        (folder / MANIFEST).is_file(),
        f"{folder} is no dataset, run or export: give a folder that `tinyllama prepare`, `train` "
        "or `convert` made; of several exports, one.",
    )
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        splits, pieces = manifest["splits"], manifest["tokenizer"]["pieces"]
        shards = [shard for facts in splits.values() for shard in facts["shards"]]
        named = {shard["file"] for shard in shards}
        with ThreadPoolExecutor() as pool:
            # Hashing leaves Python's lock alone, so threads are enough.
            lines = pool.map(lambda shard: _check_shard(folder, manifest, shard), shards)
            bad = [line for line in track(lines, folder.name, len(shards), transient=True) if line]
        for split, facts in splits.items():
            for key in ("records", "tokens"):
                total = sum(shard[key] for shard in facts["shards"])
                if total != facts[key]:
                    bad.append(f"{MANIFEST}: {split} has {facts[key]} {key}, its shards {total}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} is damaged ({type(error).__name__}: {error})"]
    for path in sorted(folder.glob("*.array_record-*")):
        if path.name not in named:
            bad.append(f"{path.name} is not in {MANIFEST}")
    return bad + _check_with_tfds(folder, splits, pieces, read=not bad)


def _check_shard(folder: Path, manifest: dict[str, Any], shard: dict[str, Any]) -> str | None:
    path, file = folder / shard["file"], shard["file"]
    if not path.is_file():
        return f"{file} is missing"
    if path.stat().st_size != shard["bytes"]:
        return f"{file} has {path.stat().st_size} bytes, not {shard['bytes']}"
    if file_sha256(path) != shard["sha256"]:
        return f"{file} has another sha256 than when it was written"
    records = record_count(path)
    if records != shard["records"] or records * manifest["record_tokens"] != shard["tokens"]:
        return f"{file} has {records} records, not {shard['records']} of {shard['tokens']} tokens"
    return None


def _check_with_tfds(folder: Path, splits: dict[str, Any], pieces: int, read: bool) -> list[str]:
    bad = []
    try:
        builder: Any = tfds.builder_from_directory(folder)
        for split, facts in splits.items():
            lengths = [shard["records"] for shard in facts["shards"]]
            if list(builder.info.splits[split].shard_lengths) != lengths:
                bad.append(f"dataset_info.json has other shards of {split} than {MANIFEST}")
            elif read:
                records = builder.as_data_source(split)
                for index in np.unique(np.linspace(0, len(records) - 1, SAMPLES, dtype=int)):
                    largest = int(records[int(index)]["tokens"].max())
                    if largest >= pieces:
                        bad.append(f"{split}: record {index} has the id {largest} of {pieces}")
    except Exception as error:  # TFDS and ArrayRecord raise many kinds
        first = (str(error).splitlines() or [""])[0]
        bad.append(f"TFDS cannot read it ({type(error).__name__}: {first})")
    return bad
