"""Shards of a dataset: ArrayRecord files of packed tokens, and the TFDS metadata around them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from tinyllama_jax.data.format import RECORD, token_dtype
from tinyllama_jax.data.tokenizer import file_sha256
from tinyllama_jax.errors import UserError
from tinyllama_jax.files import aside_name, put_in_place, unwritten


def token_features(vocab_size: int) -> tfds.features.FeaturesDict:
    """What a record is to TFDS: `tokens` of shape (`RECORD` + 1,) in the vocabulary's dtype."""
    return tfds.features.FeaturesDict(
        {
            # TFDS's default encoding is a varint per token, half as fast to read.
            "tokens": tfds.features.Tensor(
                shape=(RECORD + 1,), dtype=token_dtype(vocab_size), encoding="bytes"
            )
        }
    )


class ShardWriter:
    """One ArrayRecord file, written under a name of its own and renamed when it is whole."""

    def __init__(self, path: Path, features: tfds.features.FeaturesDict):
        self.path, self.features, self.records = path, features, 0
        self.aside = aside_name(path)
        # One record a group: rows are read in random order.
        self.writer = ArrayRecordWriter(str(self.aside), "group_size:1")

    def write(self, records_RS: Iterable[np.ndarray]) -> None:
        """Appends records. Raises `UserError` where the disk takes no more."""
        try:
            for record in records_RS:
                self.writer.write(self.features.serialize_example({"tokens": record}))
                self.records += 1
        except RuntimeError as error:
            raise unwritten(self.path, _first_words(error)) from None

    def finish(self) -> dict[str, Any]:
        """Closes, checks and renames the file.

        Returns:
          Its row of the manifest: file, records, tokens, bytes and sha256.

        Raises:
          UserError: the disk takes no more.
        """
        try:
            self.writer.close()
        except RuntimeError as error:
            raise unwritten(self.path, _first_words(error)) from None
        if not self.aside.exists():
            raise UserError(
                f"{self.path} was also written by another worker, who joined all meanwhile: the "
                "same command ends at once."
            )
        arrived = record_count(self.aside)
        if arrived != self.records:
            raise unwritten(self.path, f"{arrived} of {self.records} records arrived")
        facts = {
            "file": self.path.name,
            "records": self.records,
            "tokens": self.records * (RECORD + 1),
            "bytes": self.aside.stat().st_size,
            "sha256": file_sha256(self.aside),
        }
        # A sidecar must not outlive its shard when a machine fails.
        put_in_place(self.aside, self.path, sync=True)
        return facts

    def discard(self) -> None:
        """Removes what was written, unless it was finished."""
        self.aside.unlink(missing_ok=True)


def _first_words(error: RuntimeError) -> str:
    """What ArrayRecord says, without the places in its source code that follow."""
    return str(error).split(";")[0]


def record_count(path: Path) -> int:
    """Records of an ArrayRecord file. Raises `RuntimeError` or `OSError` where it is damaged."""
    reader = ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def shard_name(name: str, split: str, index: int, shards: int) -> str:
    """TFDS's name of a shard."""
    return f"{name}-{split}.array_record-{index:05d}-of-{shards:05d}"


def write_tfds_metadata(folder: Path, name: str, features, splits: dict[str, Any]) -> None:
    """Writes dataset_info.json and features.json, which make the folder a TFDS dataset."""
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard["records"] for shard in facts["shards"]],
            num_bytes=sum(shard["bytes"] for shard in facts["shards"]),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=epath.Path(folder),
                dataset_name=name,
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split, facts in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, check_data=False
    )
