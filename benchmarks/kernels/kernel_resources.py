"""Compiles kernels for a GPU that need not be here, and reads which resources they take."""

import contextlib
import os
import re
import subprocess
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import triton
from jax.sharding import PartitionSpec as P

from tinyllama_jax.model import triton_kernels
from tinyllama_jax.performance.targets import A100_40G, H100, absent_devices
from tinyllama_jax.runtime.mesh import make_mesh

KERNELS = ("flash_forward", "flash_dq", "flash_dkdv")  # the attention kernels
OTHERS = ("embedding_gradient", "add_norm", "norm_gradient", "cross_entropy")

# XLA puts stack traces into its dumps, and naming their frames takes 20 s for each program.
os.environ["LLVM_DISABLE_SYMBOLIZATION"] = "1"

# The tests compile without optimisation, except for the programs that are examined here.
OPTIMISED = {"xla_backend_optimization_level": 3}


class Resources(NamedTuple):
    """Registers and spilled bytes of each thread, and bytes of shared memory of each block."""

    registers: int
    spills: int
    shared_memory: int
    ptx: str
    machine_code: bytes


@contextlib.contextmanager
def _recorded() -> Iterator[dict[str, Resources]]:
    """Gives a dictionary that is filled with the kernels lowered inside, by name.

    jax-triton compiles to PTX while JAX lowers a program.
    """
    from jax_triton import triton_lib  # before 0.4, importing it needs JAX's CUDA plugin

    kernels: dict[str, Resources] = {}
    compile_to_ptx = triton_lib.compile_ttir_to_ptx_inplace

    def record(*args):
        result = compile_to_ptx(*args)
        kernels[result.name] = _assemble(result.binary, result.shared_mem_bytes)
        return result

    # A kernel that was lowered before would come from a cache, which is one dictionary for all
    # kernels in jax-triton 0.3, and one for each kernel since.
    getattr(triton_lib, "_COMPILED_KERNEL_CACHE", {}).clear()
    for name in KERNELS:
        getattr(getattr(triton_kernels, name), "_jT_kernel_cache", {}).clear()
    with unittest.mock.patch.object(triton_lib, "compile_ttir_to_ptx_inplace", record):
        yield kernels


def _assemble(ptx: str, shared_memory: int) -> Resources:
    """Assembles PTX with the assembler that comes with Triton."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source, assembled = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={target}", str(source)]
        log = subprocess.run(
            [*command, "-o", str(assembled)], check=True, capture_output=True, text=True
        ).stderr
        machine_code = assembled.read_bytes()
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spills = int(re.search(r"(\d+) bytes spill stores", log)[1])
    return Resources(registers, spills, shared_memory, ptx, machine_code)


def disassemble(machine_code: bytes) -> str:
    """Disassembles machine code with the disassembler that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def abstract_on(chip: str) -> Iterator[Callable[..., jax.ShapeDtypeStruct]]:
    """Sets the mesh of a chip that is not here; gives `abstract(shape, dtype)` for arrays on it."""
    mesh = make_mesh(devices=absent_devices({"A100": A100_40G, "H100": H100}[chip]))
    with jax.set_mesh(mesh):
        yield lambda shape, dtype: jax.ShapeDtypeStruct(
            shape, dtype, sharding=jax.NamedSharding(mesh, P())
        )


def resources_of_program(
    lower: Callable[[], jax.stages.Lowered], folder: Path
) -> dict[str, Resources]:
    """Compiles a program and returns its kernels by name; XLA's dump of it goes into `folder`."""
    with _recorded() as kernels:
        lowered = lower()
    # From JAX 0.12 on, PTX is dumped only if the emitters are asked for.
    dump = {"xla_dump_to": str(folder), "xla_dump_emitter_re": ".*"}
    lowered.compile(compiler_options=dump | OPTIMISED)
    launches = "".join(path.read_text() for path in folder.glob("*.thunk_sequence.txt"))
    for path in folder.glob("*.ptx"):
        ptx = path.read_text()
        if entry := re.search(rf"\.entry ({'|'.join(KERNELS + OTHERS)})\(", ptx):
            shared = re.search(rf" {entry[1]} grid.*shared_memory: (\d+)", launches)
            kernels[entry[1]] = _assemble(ptx, int(shared[1]))
    return kernels


def kernel_calls(program: str, name: str) -> int:
    """How often the compiled program starts a kernel."""
    targets = r"__gpu\$xla\.gpu\.triton|triton_kernel_call(?:_ffi)?"
    return len(re.findall(rf'custom_call_target="({targets})".*op_name="[^"]*{name}', program))
