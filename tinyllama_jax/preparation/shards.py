"""Shards of a dataset: ArrayRecord files of packed tokens, and the TFDS metadata around them."""

import os
import re
import socket
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
from tinyllama_jax.files import aside_name, write_aside


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
            raise self._not_written(error) from None

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
            raise self._not_written(error) from None
        if not self.aside.exists():
            raise UserError(
                f"{self.path} was also written by another worker, who joined all meanwhile: the "
                "same command ends at once."
            )
        found = record_count(self.aside)
        if found != self.records:
            raise self._not_written(f"{found} of {self.records} records arrived")
        facts = {
            "file": self.path.name,
            "records": self.records,
            "tokens": self.records * (RECORD + 1),
            "bytes": self.aside.stat().st_size,
            "sha256": file_sha256(self.aside),
        }
        with open(self.aside, "rb") as file:
            os.fsync(file.fileno())  # a sidecar must not outlive its shard when a machine fails
        self.aside.rename(self.path)
        return facts

    def discard(self) -> None:
        """Removes what was written, unless it was finished."""
        self.aside.unlink(missing_ok=True)

    def _not_written(self, reason) -> UserError:
        return UserError(
            f"{self.path} cannot be written ({str(reason).split(';')[0]}): make room on that disk, "
            "then the same command goes on."
        )


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


def write_whole(path: Path, text: str) -> None:
    """`write_aside` that raises `UserError` where the disk takes no more."""
    try:
        write_aside(path, text)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room on that disk, then the same "
            "command goes on."
        ) from None


def remove_leftovers(folder: Path) -> None:
    """Removes what processes of this machine that are gone had not finished."""
    mine = re.compile(rf"\..*\.{re.escape(socket.gethostname())}\.(\d+)")
    for path in folder.iterdir():
        match = mine.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
