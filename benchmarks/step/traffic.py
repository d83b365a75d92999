"""Counts what the training step moves through a GPU's memory besides products and attention.

    pip install -e '.[plan]'
    python -m benchmarks.step.traffic                 # the 1.1B on an H100, which need not be here
    python -m benchmarks.step.traffic --mesh a100_8

The step of training.py is compiled for GPUs that need not be here, and its program is read. The
table has the bytes that a device moves for each token, and the time that they take at nine tenths
of the card's bandwidth, part by part. A part is a pass (forward, backward, or the forward pass
again), a scope of the model, and the last operation of a fusion.
"""

import dataclasses
import re
from collections import Counter

import jax

from benchmarks import running
from tinyllama_jax.config import OptimizerConfig
from tinyllama_jax.errors import require
from tinyllama_jax.performance.program import read_traffic
from tinyllama_jax.performance.roofline import BANDWIDTH_SHARE
from tinyllama_jax.performance.targets import NODE_DEVICES, absent_devices, parse_mesh_name
from tinyllama_jax.planning.plan import compile_step
from tinyllama_jax.runtime.mesh import make_mesh

SCOPES = ("optimizer", "attention", "swiglu", "head")


@dataclasses.dataclass(frozen=True)
class Options:
    model: str = "1b"
    """1b, 120m or tiny."""
    mesh: str = "h100_1"
    """GPUs as CARD_COUNT, which is how `tinyllama plan` takes them."""
    micro_rows: int = 16
    """Rows of a micro-batch on each GPU."""
    micro_batches: int = 4
    parts: int = 24
    """How many parts are shown; the largest come first."""


def part_of(name: str) -> tuple[str, str, str]:
    """(pass, scope, operation) from the name of an operation."""
    which = "backward" if "transpose(" in name else "forward"
    if "rematted" in name:
        which = "again"
    # The innermost scope counts: the backward pass of a block runs inside others.
    words = re.split(r"[/()]", name)
    scope = next((word for word in reversed(words) if word in SCOPES), "elsewhere")
    return ("" if scope == "optimizer" else which), scope, name.split("/")[-1]


def main(options: Options) -> int:
    target, devices = parse_mesh_name(options.mesh)
    require(
        options.model in running.MODELS, f"--model is {options.model!r}: give 1b, 120m or tiny."
    )
    jax.config.update("jax_platforms", "cpu")  # a CUDA plugin that finds no GPU would end here
    from benchmarks.step import ours

    rows = options.micro_rows * options.micro_batches * devices
    spec = running.spec_of(options.model, rows, "bfloat16", 1, options.micro_rows * devices)
    execution = {"attention": "pallas", "recompute": "elementwise"}
    config = ours.config_of(spec | {"options": execution}, OptimizerConfig(), 10_000)
    hosts = max(1, devices // NODE_DEVICES)
    compiled = compile_step(
        config, make_mesh(devices=absent_devices(target, hosts, devices // hosts))
    )

    tokens = rows * config.model.context // devices
    parts = Counter()
    for name, size in read_traffic(compiled):
        parts[part_of(name)] += size
    table = [["pass", "scope", "last operation", "KB, a token", "us, a token"]]
    shown = parts.most_common(options.parts)
    rest = parts.total() - sum(size for _, size in shown)
    for part, size in [*shown, (("", "", "the rest"), rest), (("", "", "all"), parts.total())]:
        seconds = size / tokens / (BANDWIDTH_SHARE * target.bandwidth)
        table.append([*part, f"{size / tokens / 1e3:,.1f}", f"{1e6 * seconds:.3f}"])
    model = config.model
    legend = [
        f"{options.model} on {options.mesh}, {options.micro_batches} micro-batches of "
        f"{options.micro_rows} rows a GPU. A value of the residual stream, in bf16, is "
        f"{2 * model.width * model.layers / 1e3:,.1f} KB a token in all layers, one inside SwiGLU "
        f"{2 * model.swiglu_width * model.layers / 1e3:,.1f}.",
    ]
    running.show(f"Memory traffic of a step, {target.device_kind}", table, legend)
    return 0


if __name__ == "__main__":
    running.command(Options, __doc__, main)
