"""Options for XLA when it compiles a step for GPUs, and the folder that keeps compiled programs."""

import contextlib
import functools
import os
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Option -> value. They are passed along with the program (`jax.jit(compiler_options=...)`) and not
# in the environment variable XLA_FLAGS: an unknown name there aborts the process, and names come
# and go with XLA's versions.
GPU_OPTIONS = {
    # Schedules other work between the start and the end of a collective.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # Keeps XLA from merging collectives. training/gradients.py makes buckets of a useful size, one
    # for each layer; merged over several layers, all of them would wait for the last layer.
    "xla_gpu_all_gather_combine_threshold_bytes": 1,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 1,
    # Rounds to bf16 where the model says so. Otherwise XLA may keep such arrays in fp32, which
    # doubles the memory traffic.
    "xla_allow_excess_precision": False,
    # Without this pass a step that needs too much memory fails. With it XLA would compute layers a
    # second time to save memory, and the run would be slow without any message.
    "xla_disable_hlo_passes": "rematerialization",
}
# Further options for a run on a single GPU.
SINGLE_GPU_OPTIONS = {
    # Takes all matrix products from cuBLAS. On an H100 the step is 0.9 % slower if XLA may choose
    # Triton's products too, and takes longer to compile (LOG.md, 2026-11-27). Not for several GPUs:
    # on 16 A100s the compiler then hides less of the communication behind other work.
    "xla_gpu_enable_triton_gemm": False,
}


def compiler_options(mesh: Mesh) -> dict[str, bool | int | str]:
    """Returns the options for `jax.jit` on this mesh that the installed XLA knows."""
    if mesh.devices.flat[0].platform == "cpu":
        return {}
    options = GPU_OPTIONS if mesh.size > 1 else GPU_OPTIONS | SINGLE_GPU_OPTIONS
    return {name: value for name, value in options.items() if is_known(name, value, mesh)}


@functools.cache
def is_known(name: str, value: bool | int | str, mesh: Mesh) -> bool:
    """Returns whether the installed XLA knows a compiler option.

    XLA offers no list of its options, so the answer is found by compiling a constant with it.
    """
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
    """Keeps the programs that are compiled from now on, so that later processes need not compile.

    This saves time, and it keeps results the same: XLA times several kernels for a matrix product
    when it compiles, and the program remembers the fastest. If a later process measured again, it
    might choose other kernels, and its losses would differ in the last bits.

    The folder is the one that JAX_COMPILATION_CACHE_DIR names, or else `tinyllama-jax` in the
    user's cache folder (XDG_CACHE_HOME, by default ~/.cache). It may be deleted at any time.
    Nothing is kept on a CPU, nor in a run of several processes unless that variable is set.
    """
    # On a CPU a program contains the instructions of the CPU that compiled it, and fails on another
    # one that shares the home folder but lacks some of them. Of several processes JAX lets only the
    # first write programs. Unless all machines share the folder, the first process would find a
    # program that the others must compile. XLA shares the timing of kernels among processes, so the
    # others would then wait for timings that the first process never makes (openxla/xla#13108).
    alone, named = jax.process_count() == 1, "JAX_COMPILATION_CACHE_DIR" in os.environ
    if mesh.devices.flat[0].platform == "cpu" or not (alone or named):
        return
    # JAX skips programs that compile fast. They are kept here too, because their kernels were
    # chosen by timing as well.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if named:
        return  # JAX reads the variable by itself
    # If the folder cannot be made, or the user has no home, everything is compiled each time.
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyllama-jax"
        # The programs in the folder are executed, so no other user may write there.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
