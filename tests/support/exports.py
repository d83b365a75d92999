"""Exports, changed."""

import json

from flax import traverse_util


def edit_json(file, **changes):
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "drop"}))


def changed(weights, path, value):
    flat = traverse_util.flatten_dict(weights, sep=".")
    return traverse_util.unflatten_dict({**flat, path: value}, sep=".")
