"""Checks in half a minute whether a CUDA machine has what the benchmarks need, and whether it runs.

    python -m benchmarks.card.smoke

JAX and PyTorch are tried in parallel, each in a new process: packages, compilers, each backend of
attention against plain JAX, forward and backward, some steps of a tiny model with their trace, and
PyTorch's attention and compiler. A line is printed for each; the exit code is 1 if one failed.
"""

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import running
from tinyllama_jax.errors import first_line

TOLERANCE = 1e-2  # bf16 rounds to 1e-3 to 1e-2
# Package -> what needs it. gpu.sh looks for those that every program needs.
PACKAGES = {
    "torch": "the peers",
    "transformers": "the peers",
    "safetensors": "learning and decoding",
    "sentencepiece": "learning",
    "matplotlib": "the pictures",
    "pytest": "the tests",
}


@dataclasses.dataclass(frozen=True)
class Options:
    seconds: float = 90
    """Time after which a part that is not done has failed."""


def packages() -> str:
    """Looks for all packages without importing them."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    uses = ", ".join(f"{name} (for {PACKAGES[name]})" for name in missing)
    assert not missing, (
        f"There is no {uses}: on a machine with a network, "
        f"`pip download --no-deps -d .wheels {' '.join(missing)}` brings it along."
    )
    return ", ".join(PACKAGES)


def devices() -> str:
    """Checks that JAX runs on the GPU that nvidia-smi names."""
    import jax

    assert running.device_kind() != "cpu", "nvidia-smi, by which the benchmarks go, names no device"
    device = jax.devices()[0]
    assert running.REHEARSED or device.platform == "gpu", f"JAX runs on a {device.platform}"
    stats = running.if_known("memory of the device", device.memory_stats) or {}
    limit = f"{stats['bytes_limit'] / 2**30:.1f} GiB for JAX" if "bytes_limit" in stats else ""
    return ", ".join(filter(None, [f"jax {jax.__version__}", device.device_kind, limit]))


def compilers() -> str:
    """Runs functions that need libdevice, ptxas and a library for matrix products."""
    import jax
    import jax.numpy as jnp

    x_MM = jax.random.normal(jax.random.key(0), (1024, 1024), jnp.bfloat16)
    result_MM = jax.jit(lambda x_MM: jnp.log1p(jnp.exp(jnp.sin(x_MM @ x_MM))))(x_MM)
    assert bool(jnp.isfinite(result_MM).all()), "a product is not finite"
    return "a product, exp, sin and log"


def attention() -> str:
    """Compares o, dq, dk and dv of each backend with those of plain JAX."""
    import jax
    import jax.numpy as jnp

    from tinyllama_jax.model.attention import attention as attend

    T = 64 if running.REHEARSED else 512
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = [(2, T, heads, 64) for heads in (8, 2, 2, 8)]
    *qkv, do_BTNH = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )

    def run(backend, *qkv):
        o_BTNH, back = jax.vjp(lambda *x: attend(*x, backend=backend), *qkv)
        return o_BTNH, *back(do_BTNH.astype(o_BTNH.dtype))

    exact = jax.jit(lambda *x: run("reference", *x))(*(x.astype(jnp.float32) for x in qkv))

    def error(backend: str) -> float:
        results = jax.jit(lambda *x: run(backend, *x))(*qkv)
        pairs = [(x.astype(jnp.float32), y) for x, y in zip(results, exact, strict=True)]
        return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs)

    lines = []
    for backend in ("pallas",) if running.REHEARSED else ("cudnn", "pallas", "triton"):
        try:
            distance = error(backend)
        except Exception as failure:
            if backend != "triton":  # it comes with jax-triton, and no run needs it
                raise
            lines.append(f"{backend}: {first_line(failure)[:80]}")
            continue
        assert distance < TOLERANCE, (
            f"{backend} is wrong: it differs from plain JAX by {distance:.1e}"
        )
        lines.append(f"{backend} {distance:.1e}")
    return ", ".join(lines)


def training() -> str:
    """Trains a tiny model as step/breakdown.py does, so that its trace is read too."""
    from benchmarks.step import breakdown

    spec = breakdown.spec_of("tiny", True, breakdown.Options(steps=2))
    with tempfile.TemporaryDirectory() as folder:
        result = breakdown.measure(spec, Path(folder))
    shares = {row.kind: row.seconds / result.step_seconds for row in result.rows}
    assert shares["matmul"] > 0, f"the trace shows no matrix product: {shares}"
    return f"a trace of a step, {shares['unknown']:.0%} of it unattributed"


def torch_device() -> str:
    """Runs a matrix product in PyTorch on the GPU."""
    import torch

    if running.REHEARSED:
        return f"torch {torch.__version__}"
    assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device"
    x_MM = torch.randn(1024, 1024, dtype=torch.bfloat16, device="cuda")
    assert bool((x_MM @ x_MM).isfinite().all()), "a product is not finite"
    return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"


def torch_attention() -> str:
    """Runs the attention backends of the peers, forward and backward."""
    import torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from benchmarks.step.torch_peer import BACKENDS

    if running.REHEARSED:
        return ", ".join(BACKENDS)
    q_BNTH, k_BKTH, v_BKTH = (
        torch.randn(2, heads, 512, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for heads in (8, 2, 2)
    )
    for name in ("cudnn", "flash"):
        with sdpa_kernel(BACKENDS[name]):
            o_BNTH = scaled_dot_product_attention(
                q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=True
            )
        o_BNTH.sum().backward()
    return "cudnn, flash"


def torch_compile() -> str:
    """Compiles a function with torch.compile and runs it."""
    import torch

    # In a rehearsal nothing is compiled here: C++ takes a minute, and the peers compile anyway.
    device, backend = ("cpu", "eager") if running.REHEARSED else ("cuda", "inductor")
    run = torch.compile(lambda x: torch.nn.functional.silu(x) * x, backend=backend)
    assert bool(run(torch.ones(4096, device=device)).isfinite().all()), "it is not finite"
    return "silu(x) x"


# Each dictionary is tried in a process of its own, part by part.
PARTS: tuple[dict[str, Callable[[], str]], ...] = (
    {"packages": packages, "jax": devices, "compilers": compilers}
    | {"attention": attention, "training": training},
    {"torch": torch_device, "torch attention": torch_attention, "torch.compile": torch_compile},
)


def run(spec: running.Spec) -> list[list[Any]]:
    """Tries the parts of a process; returns (name, what works, what fails, seconds) for each.

    What works is None if the part fails, and what fails is None otherwise.
    """
    rows = []
    for name, part in PARTS[spec["process"]].items():
        start = time.perf_counter()
        try:
            works, failure = part(), None
        except AssertionError as error:  # its message is a sentence
            works, failure = None, first_line(error)
        except Exception as error:  # whatever it is, the next part is tried too
            works, failure = None, f"{type(error).__name__}: {first_line(error)}"
        rows.append([name, works, failure, time.perf_counter() - start])
    return rows


def main(options: Options) -> int:
    def tried(number: int) -> list[list[Any]]:
        result: Any = running.in_own_process(
            "benchmarks.card.smoke", {"process": number}, options.seconds
        )
        if isinstance(result, dict):  # the process has failed as a whole
            return [[", ".join(PARTS[number]), None, result["failure"], options.seconds]]
        return result

    with ThreadPoolExecutor() as pool:
        rows = [row for part in pool.map(tried, range(len(PARTS))) for row in part]
    for name, works, failure, seconds in rows:
        print(f"{'FAILED' if failure else 'ok':6} {name} ({seconds:.1f} s): {works or failure}")
    if running.REHEARSED:
        print(running.REHEARSAL)
    return 1 if any(failure for _, _, failure, _ in rows) else 0


if __name__ == "__main__":
    running.command(Options, __doc__, main, run)
