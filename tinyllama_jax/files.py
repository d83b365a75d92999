"""How files are written: aside, and renamed when they are whole."""

import os
import socket
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


def aside_name(path: Path) -> Path:
    """Where this process writes a file before it is renamed to `path`; no other machine's does."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def write_aside(path: Path, text: str) -> None:
    """Writes a whole file under its name in one rename. Raises `OSError`, and leaves nothing."""
    aside = aside_name(path)
    try:
        aside.write_text(text)
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
