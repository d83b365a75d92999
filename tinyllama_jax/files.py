"""How files and folders are written: aside, and renamed when they are whole.

Whoever reads a name finds the whole of what was written, this time or the time before, also where
the writer was killed or its disk was full.
"""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from tinyllama_jax.errors import UserError


def make_folder(path: Path) -> None:
    """Makes a folder and its parents. Raises `UserError` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {path} cannot be made ({error.strerror}): give another path."
        ) from None


def write_aside(path: Path, data: str | bytes, sync: bool = False) -> None:
    """Writes a whole file, text in UTF-8, under its name in one rename; see `written_aside`."""
    with written_aside(path, sync) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def written_aside(path: Path, sync: bool = False) -> Iterator[Path]:
    """Gives the name under which to write a file; it becomes `path` if the block ends well.

    Args:
      path: of the file, which replaces one that is there.
      sync: whether the bytes must be on the disk before the name is, so that a machine that fails
        leaves no empty file under it: for what another file relies on.

    Raises:
      UserError: the disk takes no more, or another `OSError` in the block; nothing is left aside.
    """
    aside = aside_name(path)
    try:
        yield aside
        put_in_place(aside, path, sync)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def aside_name(path: Path) -> Path:
    """Where this process writes a file before it is renamed to `path`; no other machine's does."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def put_in_place(aside: Path, path: Path, sync: bool) -> None:
    """Renames a file that is whole; `sync` as in `written_aside`. Raises `OSError`."""
    if sync:
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
    aside.rename(path)


@contextlib.contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; it becomes `path` if the block ends well.

    Raises:
      UserError: as `written_aside`.
    """
    aside = folder_aside_name(path)
    shutil.rmtree(aside, ignore_errors=True)
    make_folder(aside)
    try:
        yield aside
        replace_folder(aside, path)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def folder_aside_name(path: Path) -> Path:
    """Where a folder is filled before it is renamed to `path`.

    The name is the same for all processes, unlike a file's: a folder can be large, and so the next
    one that writes it removes what a killed one left, even on another machine.
    """
    return path.with_name(f".{path.name}.partial")


def replace_folder(new: Path, path: Path) -> None:
    """Renames `new` to `path`; what stood there is deleted once the new one is in place."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def unwritten(path: Path, reason: OSError | str) -> UserError:
    """The sentence for a file or folder that the disk did not take."""
    if isinstance(reason, OSError):
        reason = reason.strerror or str(reason)
    return UserError(
        f"{path} cannot be written ({reason}): make room on that disk and run the same command "
        "again, or give another path."
    )


def remove_leftovers(folder: Path) -> None:
    """Removes the files that processes of this machine which are gone had not finished."""
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
