"""What a dataset is on disk: records of tokens, and a manifest of the shards that hold them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.data.tokenizer import EOS
from tinyllama_jax.errors import UserError, require

MANIFEST = "manifest.json"
RECORD = 8192
"""Targets of a record, which holds one token more; it serves every context that divides this."""


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def is_padding(tokens_BS: np.ndarray) -> np.ndarray:
    """Marks padding, an eos after an eos, in bool (..., S); the first token of a row never is."""
    ends_BS = tokens_BS == EOS
    padding_BS = np.zeros_like(ends_BS)
    padding_BS[..., 1:] = ends_BS[..., 1:] & ends_BS[..., :-1]
    return padding_BS


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a dataset.

    Raises:
      UserError: no dataset there, a damaged manifest, or a shard that is missing or truncated.
    """
    folder = Path(folder)
    require(
        (folder / MANIFEST).is_file(),
        f"There is no dataset at {folder}: write one with `tinyllama prepare`.",
    )
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        sizes = {shard["file"]: shard["bytes"] for shard in shards}
        # What those who read a dataset, and not only its shards, rely on.
        manifest["tokenizer"]["sha256"]
        for split in manifest["splits"].values():
            split["padding_tokens"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder / MANIFEST} is damaged or of an older version: remove {folder} and prepare "
            "it again."
        ) from None
    for file, size in sizes.items():
        on_disk = (folder / file).stat().st_size if (folder / file).is_file() else 0
        require(
            on_disk == size,
            f"{folder / file} holds {on_disk:,} bytes where the manifest says {size:,}: "
            f"remove {folder} and prepare it again.",
        )
    return manifest
