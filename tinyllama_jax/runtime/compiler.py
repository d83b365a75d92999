"""What the compiler is told about a step on GPUs, and where its programs are kept."""

import contextlib
import functools
import os
from pathlib import Path

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
# More of them for a single GPU.
SINGLE_GPU_OPTIONS = {
    # Matrix products by cuBLAS alone. On an H100 the step is 0.9 % slower with Triton's among those
    # to choose from, and compiles for longer (LOG.md, 2026-11-27). Not where a network is to be
    # hidden: on 16 A100s the compiler then hides less of it.
    "xla_gpu_enable_triton_gemm": False,
}


def compiler_options(mesh: Mesh) -> dict[str, bool | int | str]:
    """Options for `jax.jit` on this mesh: those of the tables that the installed XLA knows."""
    if mesh.devices.flat[0].platform == "cpu":
        return {}
    options = GPU_OPTIONS if mesh.size > 1 else GPU_OPTIONS | SINGLE_GPU_OPTIONS
    return {name: value for name, value in options.items() if is_known(name, value, mesh)}


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


def keep_programs(mesh: Mesh) -> None:
    """What is compiled from here on, later processes find again: on GPUs, and in one process.

    A program is kept with the kernels that were the fastest when they were measured for it. Without
    that the next process measures again, may choose others, and its losses differ in the last bits.
    The folder is the one that JAX_COMPILATION_CACHE_DIR names, which JAX reads by itself, or
    `tinyllama-jax` among the user's caches (XDG_CACHE_HOME, else ~/.cache). It may be removed at
    any time.
    """
    # A CPU's programs fail on a CPU that lacks an instruction. Of several processes JAX lets the
    # first alone write: where they see no folder in common, it would find a program that the others
    # have to compile, and XLA has them wait for kernels that it measures.
    alone, named = jax.process_count() == 1, "JAX_COMPILATION_CACHE_DIR" in os.environ
    if mesh.devices.flat[0].platform == "cpu" or not (alone or named):
        return
    # Small programs too: their kernels are measured as well.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if named:
        return
    # Where there is no place for it, or no home, all is compiled each time.
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama-jax"
        # Programs are run as they lie there, so nobody else may write them.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
