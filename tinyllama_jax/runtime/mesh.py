"""The device mesh, and the two tables that say how every array is split over it.

The model knows nothing of devices: its weights have axes with names, `WEIGHT_AXES` lists those
names, and `MESH_AXES` says over which axis of the mesh each of them is split.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Config
from tinyllama_jax.errors import require

# Weight -> the names of its axes. A weight without a row raises KeyError: a row that matches all
# others would silently replicate a new weight on every device.
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

# Axis name -> the mesh axis that it is split over, or None. Every weight has one axis called width,
# so splitting that one alone spreads each weight evenly over the devices.
MESH_AXES = {
    "layer": None,
    "vocabulary": None,
    "width": "fsdp",
    "query_head": None,
    "kv_head": None,
    "head_width": None,
    "swiglu": None,
}

BATCH_AXES = ("data", "fsdp")  # the rows of a batch are split over both, hence over all devices


def make_mesh(data: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh with the axes `data`, which replicates the state, and `fsdp`, which splits it.

    Args:
      data: size of the `data` axis; the `fsdp` axis has the remaining factor.
      devices: JAX devices; by default all that JAX finds.

    Raises:
      UserError: the number of devices is not divisible by `data`.
    """
    devices = jax.devices() if devices is None else devices
    require(
        len(devices) % data == 0,
        f"A data axis of {data} does not divide the {len(devices)} devices at hand.",
    )
    shape = (data, len(devices) // data)
    # Auto axes leave it to the compiler how arrays between inputs and outputs are split. With
    # explicit axes the split is a part of every array's type, and the model would have to know it.
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def auto_dtype(mesh: Mesh) -> jnp.dtype:
    """Returns the dtype of the fastest matrix products on the mesh: fp32 on a CPU, else bf16.

    It asks the devices of the mesh and not those of this process, because `tinyllama plan` makes
    meshes of GPUs that are elsewhere.
    """
    return jnp.dtype(jnp.float32 if mesh.devices.flat[0].platform == "cpu" else jnp.bfloat16)


def check_fits(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Checks that batch and model can be split over the mesh; raises UserError if they cannot."""
    # A micro-batch is the unit that the devices divide among themselves, not the rows of a step.
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
    """Returns the leaves of a tree by their dotted path, such as `weights.blocks.query_DNH`."""

    def name(key) -> str:
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(map(name, path)): leaf for path, leaf in leaves}


def weight_name(path: str) -> str:
    """Returns the name of the weight to which a leaf of the state belongs.

    The path of an optimizer moment ends with the name of its weight, as in
    `mu.blocks.query_DNH`.

    Raises:
      KeyError: the path does not end with the name of a weight in `WEIGHT_AXES`.
    """
    keys = path.split(".")
    for start in range(len(keys)):
        if (name := ".".join(keys[start:])) in WEIGHT_AXES:
            return name
    raise KeyError(f"{path} has no row in WEIGHT_AXES")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree with a NamedSharding in the place of every leaf.

    Scalars are replicated. Optimizer moments are split like their weight, so that the optimizer
    needs no communication.

    Raises:
      KeyError: a leaf that is not a scalar has no row in `WEIGHT_AXES`.
    """

    def sharding(path: str, leaf) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, P())
        axes = WEIGHT_AXES[weight_name(path)]
        if len(axes) != len(leaf.shape):
            raise KeyError(f"{path} has {len(leaf.shape)} axes, WEIGHT_AXES names {axes}")
        return NamedSharding(mesh, P(*(MESH_AXES[axis] for axis in axes)))

    leaves = [sharding(path, leaf) for path, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def gather_axis(name: str, ndim: int) -> int:
    """Returns which axis of a weight is split over `fsdp`.

    Args:
      name: the name in `WEIGHT_AXES`; for a weight of a block `blocks.` may be left out.
      ndim: the number of axes that the array has: a weight of one block has no layer axis, which
        is the first.

    Raises:
      KeyError: the weight has no row in `WEIGHT_AXES`.
    """
    axes = (WEIGHT_AXES.get(name) or WEIGHT_AXES[f"blocks.{name}"])[-ndim:]
    return [MESH_AXES[axis] for axis in axes].index("fsdp")


def on_every_device(tree: Any, mesh: Mesh, dtype: jax.typing.DTypeLike) -> Any:
    """Puts the arrays of a tree whole on every device of the mesh, in the given dtype.

    Leaves are anything that NumPy can make an array of, also weights that are still on disk.
    """
    everywhere = NamedSharding(mesh, P())
    # Leaf by leaf, so that the host holds only one of the arrays on disk at a time.
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, dtype), everywhere), tree)


def batch_sharding(mesh: Mesh, rows_axis: int) -> NamedSharding:
    """Returns the sharding of a batch whose axis `rows_axis` is split over all devices."""
    return NamedSharding(mesh, P(*(None,) * rows_axis, BATCH_AXES))


def process_rows(rows: int) -> slice:
    """Returns which rows of a batch this process reads; `put_batch` takes exactly those."""
    each = rows // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def put_batch(batch: np.ndarray, mesh: Mesh, rows_axis: int) -> jax.Array:
    """Makes an array over the whole mesh; `batch` holds only the rows of this process."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh, rows_axis), batch)
