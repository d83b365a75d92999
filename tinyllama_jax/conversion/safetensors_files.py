"""Writes and reads the safetensors files of a folder, one tensor at a time.

A model is one file, or several with an index. The safetensors library needs all tensors of a file
in memory to write it. Here a model may be larger than memory, so the files are written by hand, in
a format of few rules. Reading goes through the library.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from tinyllama_jax.errors import UserError, require

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# NumPy's names of dtypes -> those of safetensors.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def is_file_name(name: str) -> bool:
    """Whether a file of this name may have been written by `write`."""
    return name in (ONE_FILE, INDEX) or (
        name.startswith("model-") and name.endswith(".safetensors") and "-of-" in name
    )


def split(shapes: Mapping[str, tuple[int, ...]], dtype: str, max_bytes: int) -> list[list[str]]:
    """Divides tensors among files, in their order.

    Args:
      shapes: the shapes of the tensors by name.
      dtype: their dtype.
      max_bytes: the size that the tensors of one file may have. A larger tensor gets a file of its
        own.

    Returns:
      The names of the tensors of each file.
    """
    files, size = [[]], 0
    for name, shape in shapes.items():
        needed = math.prod(shape) * np.dtype(dtype).itemsize
        if files[-1] and size + needed > max_bytes:
            files, size = [*files, []], 0
        files[-1].append(name)
        size += needed
    return files


def write(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    max_bytes: int,
    stream: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes tensors to one file, or to several with an index, as they are produced.

    Args:
      folder: an existing folder to write to.
      shapes: the shapes of all tensors by name, in the order in which `stream` yields them.
      dtype: the dtype of all tensors, a key of `DTYPES`.
      max_bytes: the size that the tensors of one file may have.
      stream: yields the name and the array of each tensor.
    """
    # The header of a file states the place of every tensor, so sizes must be known beforehand.
    files, tensors = split(shapes, dtype, max_bytes), iter(stream)
    names = [ONE_FILE]
    if len(files) > 1:
        names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    for file, held in zip(names, files, strict=True):
        # A file is the length of the header in 8 bytes, the header in JSON, padded with spaces to a
        # multiple of 8 bytes so that tensors are aligned, and then the bytes of the tensors.
        # transformers expects the metadata to say that the format is "pt", for PyTorch.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in held:
            start, end = end, end + math.prod(shapes[name]) * np.dtype(dtype).itemsize
            header[name] = {
                "dtype": DTYPES[dtype],
                "shape": shapes[name],
                "data_offsets": (start, end),
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for expected in held:
                name, array = next(tensors)
                assert (name, array.shape, array.dtype.name) == (expected, shapes[name], dtype)
                out.write(array.reshape(-1).view(np.uint8).data)
                # Otherwise two tensors would be in memory while the next one is produced.
                del array
    if len(files) > 1:
        total = sum(map(math.prod, shapes.values())) * np.dtype(dtype).itemsize
        where = {name: file for file, held in zip(names, files, strict=True) for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class Stored:
    """The tensors of a folder by name, as a mapping that reads a tensor when it is asked for.

    Opening reads the headers of the files alone.

    Raises:
      UserError: the folder has no safetensors, a file is damaged, or the index does not match the
        files.
    """

    def __init__(self, folder: Path):
        self.files = weights_files(folder)
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            try:
                with safetensors.safe_open(file, framework="numpy") as opened:
                    for name in opened.keys():
                        require(
                            name not in self.where,
                            f"Tensor {name} is in {self.where.get(name)} and in {file.name}: "
                            "download the folder again.",
                        )
                        part = opened.get_slice(name)
                        shape, dtype = tuple(part.get_shape()), part.get_dtype()
                        require(
                            dtype in DTYPES.values(),
                            f"Tensor {name} of {file} is {dtype}, not fp32, bf16 or fp16: "
                            "a quantized model cannot be read.",
                        )
                        self.where[name], self.shapes[name] = file, shape
            except (safetensors.SafetensorError, OSError) as error:
                raise _damaged(file, error) from error
        for name, file in index_of(folder).items():
            require(
                name in self.where and self.where[name].name == file,
                f"{folder / INDEX} has tensor {name} in {file}, which does not hold it: "
                "download the folder again.",
            )

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads a tensor in its own dtype.

        Raises:
          UserError: the file is damaged, or the tensor holds values that are not finite.
        """
        file = self.where[name]
        try:
            # The file is opened anew for each tensor. An open file stays mapped into memory, and
            # with it everything that was read of it.
            with safetensors.safe_open(file, framework="numpy") as opened:
                array = opened.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
        require(
            bool(np.isfinite(array).all()),
            f"Tensor {name} of {file} holds values that are not finite: take another checkpoint.",
        )
        return array


def _damaged(file: Path, error: Exception) -> UserError:
    """The error for a file that the library cannot read."""
    return UserError(f"{file} is damaged ({error}): download or export it again.")


def is_weights_folder(folder: Path) -> bool:
    """Whether a folder holds safetensors as transformers saves them, in one file or in several."""
    return any((folder / name).is_file() for name in (ONE_FILE, INDEX))


def index_of(folder: Path) -> dict[str, str]:
    """Reads the index of a folder, which says in which file each tensor is.

    Returns:
      Names of tensors -> names of files; nothing for a folder with a single file.

    Raises:
      UserError: the index is damaged, or names something other than a file of the folder.
    """
    file = folder / INDEX
    # Where there are both, transformers reads the single file and ignores the index.
    if (folder / ONE_FILE).is_file() or not file.is_file():
        return {}
    try:
        where = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): download it again.") from error
    require(bool(where), f"{file} names no tensors: download it again.")
    for name in where.values():
        require(
            isinstance(name, str)
            and name == Path(name).name
            and name.endswith(".safetensors")
            and "\0" not in name,
            f"{file} names {name!r}, which is no safetensors file of the folder: download the "
            "folder again from somewhere that you trust.",
        )
    return where


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
      UserError: there are none, or one that the index names is missing.
    """
    names = sorted(set(index_of(folder).values())) or [ONE_FILE]
    for name in names:
        # A folder with PyTorch's .bin files instead is refused: they are pickles, which can run any
        # code when they are opened.
        require(
            (folder / name).is_file(),
            f"There is no {folder / name}, be it in another format: open the folder with "
            "transformers and save_pretrained() it as safetensors.",
        )
    return [folder / name for name in names]
