"""A name holds the whole of what was written under it, this time or the time before."""

import os
import socket
import subprocess
import sys

import pytest

from tinyllama_jax.errors import UserError
from tinyllama_jax.files import (
    folder_aside_name,
    folder_written_aside,
    remove_leftovers,
    write_aside,
    written_aside,
)

FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("sync", [False, True])
def test_text_and_bytes_replace_what_was_there(tmp_path, sync):
    path = tmp_path / "file"
    write_aside(path, "a longer text", sync)
    write_aside(path, "\u00e9", sync)
    assert path.read_bytes() == b"\xc3\xa9"
    write_aside(path, b"\x00\xff", sync)
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error, raised", [(FULL, UserError), (KeyboardInterrupt(), None)])
def test_a_file_that_fails_halfway_leaves_the_one_before(tmp_path, error, raised):
    path = tmp_path / "file"
    path.write_text("before")
    said = "file cannot be written .No space left on device.: make room" if raised else ""
    with pytest.raises(raised or type(error), match=said), written_aside(path) as aside:
        aside.write_text("hal")
        assert path.read_text() == "before"
        raise error
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error, raised", [(FULL, UserError), (KeyboardInterrupt(), None)])
def test_a_folder_that_fails_halfway_leaves_the_one_before(tmp_path, error, raised):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "before").touch()
    with pytest.raises(raised or type(error)), folder_written_aside(path) as aside:
        (aside / "half").touch()
        raise error
    assert os.listdir(path) == ["before"] and os.listdir(tmp_path) == ["folder"]


def test_a_folder_replaces_all_of_the_one_before_and_what_a_killed_process_left(tmp_path):
    path = tmp_path / "folder"
    for folder in (path, folder_aside_name(path)):
        folder.mkdir()
        (folder / "before").touch()
    with folder_written_aside(path) as aside:
        (aside / "after").touch()
        assert os.listdir(path) == ["before"]
    assert os.listdir(path) == ["after"] and os.listdir(tmp_path) == ["folder"]


def test_leftovers_are_those_of_processes_of_this_machine_that_are_gone(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    kept = [f".file.{host}.{os.getpid()}", f".file.not-{host}.{gone.pid}", "file"]
    for name in (*kept, f".file.{host}.{gone.pid}"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
