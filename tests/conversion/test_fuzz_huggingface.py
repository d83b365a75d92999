"""300 folders with something changed: each is refused in a sentence, or loaded as what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from support.models import ODD
from tinyllama_jax.conversion import huggingface
from tinyllama_jax.conversion.safetensors_files import INDEX
from tinyllama_jax.errors import UserError

JUNK = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    1.5,
    1e400,
    2**70,
    "",
    "7",
    "llama",
    [],
    [3],
    {},
    "\ud800",
]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


def flip(rng, file: Path, start: int = 0, end: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    data[int(rng.integers(start, end or len(data)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)


def header_length(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def flip_header(rng, folder):
    file = pick(rng, shards(folder))
    flip(rng, file, 0, header_length(file))


def flip_length(rng, folder):
    flip(rng, pick(rng, shards(folder)), 0, 8)


def flip_data(rng, folder):
    file = pick(rng, shards(folder))
    flip(rng, file, header_length(file))


def cut(rng, folder):
    file = pick(rng, [*shards(folder), folder / "config.json"])
    file.write_bytes(file.read_bytes()[: int(rng.integers(file.stat().st_size))])


def append(rng, folder):
    with open(pick(rng, [*shards(folder), folder / "config.json"]), "ab") as file:
        file.write(rng.bytes(int(rng.integers(1, 40))))


def remove(rng, folder):
    pick(rng, [*shards(folder), folder / "config.json"]).unlink()


def flip_config(rng, folder):
    flip(rng, folder / "config.json")


def change_config(rng, folder):
    file = folder / "config.json"
    values = json.loads(file.read_text())
    key = pick(rng, [*values, "sliding_window", "quantization_config", "partial_rotary_factor"])
    if rng.random() < 0.2:
        values.pop(key, None)
    elif isinstance(values.get(key), dict):
        values[key][pick(rng, [*values[key]])] = pick(rng, JUNK)
    else:
        values[key] = pick(rng, JUNK)
    file.write_text(json.dumps(values))


def change_index(rng, folder):
    file = folder / INDEX
    if not file.is_file():
        file.write_text(pick(rng, ["", "[]", "{}"]))
        (folder / "model.safetensors").unlink()
        return
    index = json.loads(file.read_text())
    name = pick(rng, [*index["weight_map"]])
    path = pick(rng, [*(shard.name for shard in shards(folder)), *JUNK])
    paths = [path, f"../{folder.name}/{path}", str(folder / str(path)), "a\0", "config.json"]
    change: Callable = pick(
        rng,
        [
            lambda: index["weight_map"].pop(name),
            lambda: index["weight_map"].update({name: pick(rng, paths)}),
            lambda: index["weight_map"].update({name + "x": index["weight_map"][name]}),
            lambda: index.update(weight_map=pick(rng, JUNK)),
        ],
    )
    change()
    file.write_text(json.dumps(index))


def change_tensor(rng, folder):
    file = pick(rng, shards(folder))
    stored = safetensors.numpy.load_file(file)
    name = pick(rng, [*stored])
    array = stored[name].copy()
    spoiled = array.copy()
    spoiled.flat[int(rng.integers(array.size))] = pick(rng, [np.nan, np.inf, -np.inf])
    change: Callable = pick(
        rng,
        [
            lambda: stored.pop(name),
            lambda: stored.update({name: spoiled}),
            lambda: stored.update({name: array.reshape(-1, 1)}),
            lambda: stored.update({name: np.ascontiguousarray(array[1:])}),
            lambda: stored.update({name: array.astype(np.float64)}),
            lambda: stored.update({name: array.view(np.int32)}),
            lambda: stored.update({f"{name}.bias": array}),
            lambda: stored.update({name.replace("0", "9") + "x": stored.pop(name)}),
        ],
    )
    change()
    safetensors.numpy.save_file(stored, file)


def swap_files(rng, folder):
    one, other = pick(rng, shards(folder)), folder / "config.json"
    if len(shards(folder)) > 1:
        other = pick(rng, [shard for shard in shards(folder) if shard != one])
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def flip_any(rng, folder):
    flip(rng, pick(rng, [path for path in sorted(folder.iterdir()) if path.name != "README.md"]))


SEEN_WITHOUT_HASHES = [
    flip_header,
    flip_length,
    cut,
    append,
    remove,
    flip_config,
    change_config,
    change_index,
    change_tensor,
    swap_files,
]


@pytest.fixture(scope="module")
def folders(weights, small_tokenizer, tmp_path_factory):
    """An export in one file, and one in several."""
    folder = tmp_path_factory.mktemp("fuzz")
    found = []
    for name, size in (("one", 10**9), ("several", 60_000)):
        huggingface.export(weights, ODD, small_tokenizer, folder / name, max_shard_bytes=size)
        found.append(folder / name)
    return found


def assert_is_what_the_folder_says(folder, config, loaded, wanted):
    """The weights are the true ones, and every field of the config stands in config.json."""
    jax.tree.map(np.testing.assert_array_equal, loaded, wanted)
    values = json.loads((folder / "config.json").read_text())
    for key, field in huggingface.FIELDS.items():
        # What may be left out was derived from what the true weights have been compared with.
        assert values.get(key) in (getattr(config, field), None, 0, False, [], {}, "")
    parts = [values, values.get("rope_scaling") or {}, values.get("rope_parameters") or {}]
    bases = [part["rope_theta"] for part in parts if "rope_theta" in part] or [1e4]
    assert {(type(base) in (int, float), base) for base in bases} == {(True, config.rope_base)}
    assert config.rope_factor == 1.0  # no single change makes a scaling


@pytest.mark.parametrize("seed", range(0, 200, 50))
def test_a_folder_from_elsewhere_is_refused_or_true(seed, folders, weights, tmp_path):
    wanted, refused = jax.tree.map(np.asarray, weights), 0
    for number in range(seed, seed + 50):
        rng = np.random.default_rng(number)
        folder = Path(shutil.copytree(pick(rng, folders), tmp_path / str(number)))
        (folder / huggingface.HASHES).unlink()
        mutation = pick(rng, SEEN_WITHOUT_HASHES)
        mutation(rng, folder)
        try:
            config, loaded = huggingface.load(folder)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 600, (number, mutation)
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {number}, {mutation.__name__}: {error!r}") from error
        else:
            assert_is_what_the_folder_says(folder, config, loaded, wanted)
    assert refused > 25


@pytest.mark.parametrize("seed", range(1000, 1100, 50))
def test_an_export_is_refused_once_anything_has_changed(seed, folders, tmp_path):
    for number in range(seed, seed + 50):
        rng = np.random.default_rng(number)
        folder = Path(shutil.copytree(pick(rng, folders), tmp_path / str(number)))
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        mutation = pick(rng, [*SEEN_WITHOUT_HASHES, flip_data, flip_any])
        mutation(rng, folder)
        if {path.name: path.read_bytes() for path in folder.iterdir()} == before:
            continue
        with pytest.raises(UserError):
            huggingface.load(folder)
            raise AssertionError(f"seed {number}, {mutation.__name__} was not seen")
