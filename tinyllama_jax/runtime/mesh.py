"""Devices, mesh axes, and the two tables that say where every array lives."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Config
from tinyllama_jax.errors import require

# Weight -> the name of each of its axes. A weight without a row is a KeyError.
WEIGHT_AXES = {
    "embedding_VD": ("vocabulary", "width"),
    "blocks.attention_norm_D": ("layer", "width"),
    "blocks.query_DNH": ("layer", "width", "query_head", "head_width"),
    "blocks.key_DKH": ("layer", "width", "kv_head", "head_width"),
    "blocks.value_DKH": ("layer", "width", "kv_head", "head_width"),
    "blocks.output_NHD": ("layer", "query_head", "head_width", "width"),
    "blocks.swiglu_norm_D": ("layer", "width"),
    "blocks.gate_DF": ("layer", "width", "swiglu"),
    "blocks.up_DF": ("layer", "width", "swiglu"),
    "blocks.down_FD": ("layer", "swiglu", "width"),
    "norm_D": ("width",),
    "head_DV": ("width", "vocabulary"),
}

# Axis name -> the mesh axis it is split over. Every weight has a width, so each is split evenly.
MESH_AXES = {
    "layer": None,
    "vocabulary": None,
    "width": "fsdp",
    "query_head": None,
    "kv_head": None,
    "head_width": None,
    "swiglu": None,
}

BATCH_AXES = ("data", "fsdp")  # rows are split over all devices


def make_mesh(data: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `data` (state replicated) and `fsdp` (state split).

    Args:
      data: size of the first axis; the second takes what it leaves.
      devices: jax devices; all at hand by default.

    Raises:
      UserError: `data` does not divide the devices.
    """
    devices = jax.devices() if devices is None else devices
    require(
        len(devices) % data == 0,
        f"A data axis of {data} does not divide the {len(devices)} devices at hand.",
    )
    shape = (data, len(devices) // data)
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def auto_dtype(mesh: Mesh) -> jnp.dtype:
    """What matrix products are fastest in, on devices that need not be here: fp32 on a CPU."""
    return jnp.dtype(jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16)


def check_fits(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError if the batch or the model cannot be split over the mesh."""
    rows = config.micro_rows
    require(
        rows % mesh.size == 0,
        f"A micro-batch of {rows} rows (batch_rows / micro_batches) is not divisible by the "
        f"{mesh.size} devices: change --batch-rows or --micro-batches.",
    )
    require(
        config.model.width % mesh.shape["fsdp"] == 0,
        f"model.width ({config.model.width}) is not divisible by the {mesh.shape['fsdp']} devices "
        "of the fsdp axis: use fewer devices.",
    )


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted path: `weights.blocks.query_DNH`."""

    def name(key) -> str:
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(map(name, path)): leaf for path, leaf in leaves}


def weight_name(path: str) -> str:
    """The weight that a leaf of the state belongs to: moments carry their weight's path at the end.

    Raises:
      KeyError: the path ends in no weight of `WEIGHT_AXES`.
    """
    keys = path.split(".")
    for start in range(len(keys)):
        if (name := ".".join(keys[start:])) in WEIGHT_AXES:
            return name
    raise KeyError(f"{path} has no row in WEIGHT_AXES")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The tree with a NamedSharding for every leaf; scalars are replicated, moments follow weights.

    Raises:
      KeyError: a leaf with axes has no row in `WEIGHT_AXES`.
    """

    def sharding(path: str, leaf) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, P())
        axes = WEIGHT_AXES[weight_name(path)]
        if len(axes) != len(leaf.shape):
            raise KeyError(f"{path} has {len(leaf.shape)} axes, WEIGHT_AXES names {axes}")
        return NamedSharding(mesh, P(*(MESH_AXES[axis] for axis in axes)))

    found = [sharding(path, leaf) for path, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def gather_axis(name: str, ndim: int) -> int:
    """The axis of a weight that is split over `fsdp`; a block calls its own by their bare names,
    with or without the layer axis.

    Raises:
      KeyError: the weight has no row in `WEIGHT_AXES`.
    """
    axes = (WEIGHT_AXES.get(name) or WEIGHT_AXES[f"blocks.{name}"])[-ndim:]
    return [MESH_AXES[axis] for axis in axes].index("fsdp")


def on_every_device(tree: Any, mesh: Mesh, dtype) -> Any:
    """The arrays of a tree, read or not, in a dtype and whole on each device of the mesh."""
    everywhere = NamedSharding(mesh, P())
    # One after the other: of what lies on disk the host holds one array.
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, dtype), everywhere), tree)


def batch_sharding(mesh: Mesh, rows_axis: int) -> NamedSharding:
    """Rows, which stand on axis `rows_axis`, split over all devices."""
    return NamedSharding(mesh, P(*(None,) * rows_axis, BATCH_AXES))


def process_rows(rows: int) -> slice:
    """This process's part of the rows of a batch, as `put_batch` expects it."""
    each = rows // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def put_batch(batch: np.ndarray, mesh: Mesh, rows_axis: int) -> jax.Array:
    """This process's rows of a batch, as an array over the whole mesh."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh, rows_axis), batch)
