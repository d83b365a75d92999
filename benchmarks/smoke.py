"""Half a minute on a CUDA machine: is there all that the benchmarks need, and does it run?

    python benchmarks/smoke.py

JAX and PyTorch are tried side by side, each in a process of its own: packages, compilers, each
backend of attention forward and backward against plain JAX, some steps of a tiny model and its
trace, and PyTorch's attention and compiler. A line for each; exit code 1 says that one failed.
"""

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import running
from tinyllama_jax.errors import first_line

TOLERANCE = 1e-2  # bf16 rounds to 1e-3 to 1e-2
# What no program can do without is looked for by gpu.sh, before any program starts.
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
    """After which what is not done has failed."""


def packages() -> str:
    """Without importing any."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    uses = ", ".join(f"{name} (for {PACKAGES[name]})" for name in missing)
    assert not missing, (
        f"There is no {uses}: on a machine with a network, "
        f"`pip download --no-deps -d .wheels {' '.join(missing)}` brings it along."
    )
    return ", ".join(PACKAGES)


def devices() -> str:
    import jax

    assert running.device_kind() != "cpu", "nvidia-smi, by which the benchmarks go, names no device"
    device = jax.devices()[0]
    assert running.REHEARSED or device.platform == "gpu", f"JAX runs on a {device.platform}"
    stats = running.if_known("memory of the device", device.memory_stats) or {}
    limit = f"{stats['bytes_limit'] / 2**30:.1f} GiB for JAX" if "bytes_limit" in stats else ""
    return ", ".join(filter(None, [f"jax {jax.__version__}", device.device_kind, limit]))


def compilers() -> str:
    """libdevice, ptxas and a matrix product."""
    import jax
    import jax.numpy as jnp

    x_MM = jax.random.normal(jax.random.key(0), (1024, 1024), jnp.bfloat16)
    found_MM = jax.jit(lambda x_MM: jnp.log1p(jnp.exp(jnp.sin(x_MM @ x_MM))))(x_MM)
    assert bool(jnp.isfinite(found_MM).all()), "a product is not finite"
    return "a product, exp, sin and log"


def attention() -> str:
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
        found = jax.jit(lambda *x: run(backend, *x))(*qkv)
        pairs = [(x.astype(jnp.float32), y) for x, y in zip(found, exact, strict=True)]
        return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs)

    told = []
    for backend in ("pallas",) if running.REHEARSED else ("cudnn", "pallas", "triton"):
        try:
            found = error(backend)
        except Exception as failure:
            if backend != "triton":  # which jax-triton brings, and no run needs
                raise
            told.append(f"{backend}: {first_line(failure)[:80]}")
            continue
        assert found < TOLERANCE, f"{backend} is wrong: it differs from plain JAX by {found:.1e}"
        told.append(f"{backend} {found:.1e}")
    return ", ".join(told)


def training() -> str:
    """A tiny model as breakdown.py trains it, so that its trace is read too."""
    import breakdown

    spec = breakdown.spec_of("tiny", True, breakdown.Options(steps=2))
    with tempfile.TemporaryDirectory() as folder:
        found = breakdown.measure(spec, Path(folder))
    shares = {row.kind: row.seconds / found.step_seconds for row in found.rows}
    assert shares["matmul"] > 0, f"the trace shows no matrix product: {shares}"
    return f"a trace of a step, {shares['unknown']:.0%} of it unattributed"


def torch_device() -> str:
    import torch

    if running.REHEARSED:
        return f"torch {torch.__version__}"
    assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device"
    x_MM = torch.randn(1024, 1024, dtype=torch.bfloat16, device="cuda")
    assert bool((x_MM @ x_MM).isfinite().all()), "a product is not finite"
    return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"


def torch_attention() -> str:
    import torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from torch_peer import BACKENDS

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
    import torch

    # On a CPU its C++ takes a minute, and the peers of the training step compile there anyway.
    device, backend = ("cpu", "eager") if running.REHEARSED else ("cuda", "inductor")
    run = torch.compile(lambda x: torch.nn.functional.silu(x) * x, backend=backend)
    assert bool(run(torch.ones(4096, device=device)).isfinite().all()), "it is not finite"
    return "silu(x) x"


# A process each, and its parts in this order.
PARTS: tuple[dict[str, Callable[[], str]], ...] = (
    {"packages": packages, "jax": devices, "compilers": compilers}
    | {"attention": attention, "training": training},
    {"torch": torch_device, "torch attention": torch_attention, "torch.compile": torch_compile},
)


def run(spec: running.Spec) -> list[list[Any]]:
    """(name, what it found or None, why not, seconds) of each part."""
    rows = []
    for name, part in PARTS[spec["process"]].items():
        start = time.perf_counter()
        try:
            told, failure = part(), None
        except AssertionError as error:  # a sentence of ours
            told, failure = None, first_line(error)
        except Exception as error:  # whatever it is, the next part is tried too
            told, failure = None, f"{type(error).__name__}: {first_line(error)}"
        rows.append([name, told, failure, time.perf_counter() - start])
    return rows


def main(options: Options) -> int:
    def tried(number: int) -> list[list[Any]]:
        found: Any = running.in_own_process(__file__, {"process": number}, options.seconds)
        if isinstance(found, dict):  # it has not come to an end
            return [[", ".join(PARTS[number]), None, found["failure"], options.seconds]]
        return found

    with ThreadPoolExecutor() as pool:
        rows = [row for found in pool.map(tried, range(len(PARTS))) for row in found]
    for name, told, failure, seconds in rows:
        print(f"{'FAILED' if failure else 'ok':6} {name} ({seconds:.1f} s): {told or failure}")
    if running.REHEARSED:
        print(running.REHEARSAL)
    return 1 if any(failure for _, _, failure, _ in rows) else 0


if __name__ == "__main__":
    running.command(Options, __doc__, main, run)
