"""The house: imports only go down, and no room grows too large."""

import ast
from pathlib import Path

import pytest

from support.paths import ROOT

FILES = sorted((ROOT / "tinyllama_jax").rglob("*.py"))

# From the top down: each floor imports what stands below it, and itself.
FLOORS = (
    "cli",
    "commands",
    "planning",
    "training",
    "evaluation",
    "performance",
    "preparation",
    "inference",
    "conversion",
    ("data", "model"),  # which do not know each other
    "runtime",
    "config_file",
    "config",
    "files",
    "errors",
    "__init__",
)


def floor(path: Path) -> str:
    return path.relative_to(ROOT / "tinyllama_jax").parts[0].removesuffix(".py")


def may_import(importer: str) -> set[str]:
    found: set[str] = set()
    for rooms in reversed(FLOORS):
        rooms = (rooms,) if isinstance(rooms, str) else rooms
        if importer in rooms:
            return found | {importer}
        found |= set(rooms)
    raise KeyError(importer)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            assert parts[0] != "launch"
            if parts[0] == "tinyllama_jax":
                assert parts[1] in may_import(floor(path)), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_larger_than_a_room(path):
    assert len(path.read_text().splitlines()) <= 500


def test_torch_is_for_parity_and_for_reading_its_own_files():
    users = [path.name for path in FILES if "import torch" in path.read_text()]
    assert users == ["huggingface.py", "litgpt.py"]
