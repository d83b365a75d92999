"""The house: imports only go down, and no room grows too large."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "tinyllama_jax").rglob("*.py"))

# What each floor may import, itself included. training/ stands on top, config.py below all.
MAY_IMPORT = {
    "config": set(),
    "config_file": {"config"},
    "data": {"config", "data"},
    "model": {"config", "model"},
    "runtime": {"config", "config_file", "runtime", "data", "model"},
    "inference": {"config", "config_file", "runtime", "data", "model", "inference"},
    "training": {"config", "config_file", "runtime", "data", "model", "inference", "training"},
    "cli": {"config", "config_file", "runtime", "data", "model", "inference", "training"},
    "__init__": set(),
}


def floor(path: Path) -> str:
    return path.relative_to(ROOT / "tinyllama_jax").parts[0].removesuffix(".py")


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
                assert parts[1] in MAY_IMPORT[floor(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_larger_than_a_room(path):
    assert len(path.read_text().splitlines()) <= 500


def test_torch_is_for_parity_and_for_reading_its_own_files():
    users = [path.name for path in FILES if "import torch" in path.read_text()]
    assert users == ["huggingface.py", "litgpt.py"]
