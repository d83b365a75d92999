"""What the compiler is told about a step on GPUs."""

import functools

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Option -> value. They travel with the program that they are for, not in XLA_FLAGS, where a name
# that another version does not know ends the process.
GPU_OPTIONS = {
    # Puts work between the start and the end of a collective.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # gradients.py makes the buckets; merged across layers they would all wait for the last.
    "xla_gpu_all_gather_combine_threshold_bytes": 1,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 1,
    # Round where the model does: what is kept in fp32 beyond it is twice the traffic.
    "xla_allow_excess_precision": False,
    # Say that memory is short instead of computing layers twice without a word.
    "xla_disable_hlo_passes": "rematerialization",
}


def compiler_options(mesh: Mesh) -> dict[str, bool | int | str]:
    """Options for `jax.jit` on this mesh: those of the table that the installed XLA knows."""
    if mesh.devices.flat[0].platform == "cpu":
        return {}
    return {name: value for name, value in GPU_OPTIONS.items() if is_known(name, value, mesh)}


@functools.cache
def is_known(name: str, value: bool | int | str, mesh: Mesh) -> bool:
    """Whether the installed XLA has this option. It shows no list: a constant is compiled."""
    anywhere = NamedSharding(mesh, P())
    constant = jax.jit(lambda: 0, out_shardings=anywhere, compiler_options={name: value})
    try:
        constant.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
