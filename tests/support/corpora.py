"""SlimPajama and StarCoder in their published layouts, small, with documents of the golden text."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from support.paths import GOLDEN
from tinyllama_jax.preparation.documents import Document
from tinyllama_jax.preparation.readers import CORPORA

GROUP_BYTES = 5_000
# So few documents need a larger share for a record of validation in each group.
CASES = {
    "slimpajama": CORPORA["slimpajama"],
    "starcoder": dataclasses.replace(CORPORA["starcoder"], held_out_share=0.4),
    "tokens": dataclasses.replace(CORPORA["tokens"], held_out_share=0.4),
}


def texts(seed: int, count: int = 24) -> list[str]:
    lines = (GOLDEN / "text.txt").read_text().splitlines()
    rng = np.random.default_rng(seed)
    return ["\n".join(rng.permutation(lines)[: rng.integers(5, len(lines))]) for _ in range(count)]


def write_slimpajama(folder: Path) -> None:
    sets = ["RedPajamaC4", "RedPajamaGithub", "RedPajamaArXiv"]
    for seed, name in enumerate(
        [f"train/chunk{c}/example_train_{f}" for c in (1, 10, 2) for f in (0, 1)]
        + ["validation/chunk1/example_holdout_0", "test/chunk1/example_test_0"]
    ):
        rows = [
            {"text": text, "meta": {"redpajama_set_name": sets[n % 3]}}
            for n, text in enumerate(texts(seed))
        ]
        path = folder / f"{name}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(pa.compress(data, codec="zstd", asbytes=True))


def write_starcoder(folder: Path) -> None:
    for seed, name in enumerate(["ada/train-00000-of-00001", "c/train-00000-of-00002",
                                 "c/train-00001-of-00002"]):  # fmt: skip
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"max_stars_count": range(99), "content": texts(seed, 99)}
        pq.write_table(pa.table(table), path)


def packed_tokens(ids, code: int = 8, version: int = 1) -> bytes:
    """A packed file of the original TinyLlama: uint16, or int32 by code 4."""
    header = b"LITPKDS" + version.to_bytes(8, "little") + bytes([code])
    return (
        header
        + len(ids).to_bytes(8, "little")
        + np.asarray(ids, "<i4" if code == 4 else "<u2").tobytes()
    )


def write_token_files(folder: Path) -> list[int]:
    """Packed files of equal size, the last filled with bos; returns the ids without those."""
    rng, ids = np.random.default_rng(0), []
    for _ in range(300):
        ids += [*rng.integers(3, 400, rng.integers(1, 2000)).tolist(), 2]
    size = -(-len(ids) // 7)
    padded = ids + [1] * (7 * size - len(ids))
    folder.mkdir(parents=True)
    for part in range(7):
        name = f"train_slim_0_{part:010d}.bin"
        (folder / name).write_bytes(packed_tokens(padded[part * size : (part + 1) * size]))
    return ids


def golden_documents(source: str, split: str) -> list[Document]:
    """Lines of the committed text, shuffled into documents; both sources read other orders."""
    lines = (GOLDEN / "text.txt").read_text().splitlines()
    rng = np.random.default_rng([len(source), len(split)])
    count = 60 if split == "train" else 24
    texts = ["\n".join(rng.permutation(lines)) for _ in range(count)]
    return [Document(f"{source}-{split}-{index}", text) for index, text in enumerate(texts)]
