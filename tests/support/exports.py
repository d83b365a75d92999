"""Exports, changed."""

import json
from pathlib import Path
from typing import Any

from flax import traverse_util

from tinyllama_jax.model.llama import Weights


def edit_json(file: Path, **changes: Any) -> None:
    """Changes values of a JSON file; "drop" removes one."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}))


def changed(weights: Weights, path: str, value: Any) -> Weights:
    """The weights with another one at a dotted path."""
    flat = traverse_util.flatten_dict(weights, sep=".")
    return traverse_util.unflatten_dict({**flat, path: value}, sep=".")
