"""Predicts how long a step takes: its work over measured speeds of the card, and its network time.

Speeds are measurements and not data-sheet peaks, which no program reaches. Each names its source.
"""

import dataclasses

from tinyllama_jax.config import TINYLLAMA_1B, Config, DataConfig, ExecutionConfig, LlamaConfig
from tinyllama_jax.model.attention import CHIPS
from tinyllama_jax.performance.program import Collective, Program
from tinyllama_jax.performance.targets import A100_40G, H100, NODE_DEVICES, Target


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Measured speeds of one chip.

    The fast end of a prediction uses `matmul` and `attention`, the slow end uses `published`.
    """

    matmul: float
    """FLOP/s of large bf16 matrix products: the fastest shape that mamf-finder found (S. Bekman,
    Machine Learning Engineering, compute/accelerator)."""
    attention: float
    """FLOP/s of causal attention, forward and backward together, with head width 64 and 2,048
    tokens. The count takes a backward pass as 2.5 forward passes, and leaves out pairs of positions
    that the mask hides."""
    attention_source: str
    """Who measured `attention`."""
    published_on: Target
    """The card that `published` was measured on."""
    published: float
    """Tokens/s that a whole training system reached on one GPU with the 1.1B model."""
    published_source: str
    """Who measured `published`."""


SPEEDS = {
    "A100": Speeds(
        matmul=271.2e12,
        attention=140e12,
        attention_source="FlashAttention-2, its README",
        published_on=A100_40G,
        published=24_000,
        published_source="TinyLlama 1.1B, arXiv 2401.02385",
    ),
    "H100": Speeds(
        matmul=794.5e12,
        # One forward pass and a backward pass of 2.5 times its FLOPs, each at its own speed.
        attention=3.5 / (1 / 402e12 + 2.5 / 254e12),
        attention_source="cuDNN forward 402, tokamax backward 254",
        published_on=H100,
        published=80_974,
        published_source="this project on one H100, benchmarks/results/, 2026-11-27",
    ),
}

# The share of a card's bandwidth that elementwise work reaches. On an H100 a large copy and most
# memory-bound kernels of a step reached it (LOG.md, 2026-11-27); for the A100 it is assumed.
BANDWIDTH_SHARE = 0.9
# Bytes of memory traffic beside matrix products and attention, for each byte that recompute
# `elementwise` keeps. It was counted in the compiled step of the 1.1B model: 4.8 MB a token for
# 0.88 MB that are kept.
TRAFFIC_OF_KEPT_BYTE = 5.45
# Bytes that AdamW moves for each parameter. It reads the weight, the gradient and two moments and
# writes all but the gradient (28), reads the gradient once more for the global norm (4), and the
# next step's bf16 copy of the weight is written (2).
OPTIMIZER_TRAFFIC = 34


@dataclasses.dataclass(frozen=True)
class Work:
    """The work that one device does in one step."""

    matmul_flops: float
    """FLOPs of the matrix products outside attention."""
    attention_flops: float
    """FLOPs of attention, counted as the function `attention_flops` counts them."""
    other_bytes: float
    """Memory traffic of everything but matrix products and attention."""
    optimizer_bytes: float
    """The part of `other_bytes` that the optimizer causes."""


def kept_by_elementwise(model: LlamaConfig) -> int:
    """Bytes for each token and layer that recompute `elementwise` keeps for the backward pass.

    These are, in bf16, the results of the layer's matrix products and of attention, and, in fp32,
    attention's sum for each head.
    """
    queries, keys = (heads * model.head_width for heads in (model.query_heads, model.kv_heads))
    values = 2 * model.width + 2 * queries + 2 * keys + 2 * model.swiglu_width
    return 2 * values + 4 * model.query_heads


def work_by_formula(config: Config, devices: int, fsdp: int) -> Work:
    """Estimates the work of a step without compiling it.

    Args:
      config: the run.
      devices: the number of devices of the mesh.
      fsdp: the number of devices that share one copy of weights and optimizer state.
    """
    model, execution = config.model, config.execution
    tokens = config.batch_rows * model.context / devices
    head = model.vocab_size * model.width
    in_layers = model.parameters() - 2 * head - model.norm_gains()
    # Recompute `layers` runs every layer's forward products once more, all but the last one, down:
    # the backward pass needs its arguments and not its result.
    again = in_layers - model.layers * model.width * model.swiglu_width
    twice = execution.recompute == "layers"
    traffic = TRAFFIC_OF_KEPT_BYTE * kept_by_elementwise(model)
    traffic *= model.layers
    optimizer_bytes = OPTIMIZER_TRAFFIC * model.parameters() / fsdp
    return Work(
        # Every weight takes 2 FLOPs for each token forward and 4 backward.
        matmul_flops=tokens * (6 * (in_layers + head) + (2 * again if twice else 0)),
        attention_flops=tokens * attention_flops(config),
        other_bytes=tokens * traffic + optimizer_bytes,
        optimizer_bytes=optimizer_bytes,
    )


def attention_flops(config: Config) -> int:
    """The FLOPs of attention for one token of a step.

    A causal forward pass takes 2 L N H T, a backward pass counts as 2.5 of them, and recompute
    `layers` adds another forward pass. The kernels' speeds are published for this count, whatever a
    kernel computes again inside.
    """
    model = config.model
    pairs = model.layers * model.query_heads * model.head_width * model.context
    return pairs * (9 if config.execution.recompute == "layers" else 7)


def work_of_program(program: Program, config: Config, tokens: float) -> Work:
    """The work of a compiled step.

    Args:
      program: the figures of the compiled step.
      config: the run.
      tokens: the number of tokens that a device reads in the step.
    """
    # `program.attention_flops` counts what kernels compute again; published speeds do not.
    return Work(
        matmul_flops=program.matmul_flops,
        attention_flops=tokens * attention_flops(config),
        other_bytes=program.other_bytes,
        optimizer_bytes=program.optimizer_bytes,
    )


def chip_of(target: Target) -> str:
    """The name of a card's chip, which is a key of `SPEEDS`."""
    return next(chip for name, chip in CHIPS.items() if name in target.device_kind)


def seconds_by_kind(work: Work, target: Target) -> dict[str, float]:
    """The least time in seconds that a device needs for each kind of its work.

    Communication is left out, because most of it happens beside other work.
    """
    speeds = SPEEDS[chip_of(target)]
    bandwidth = BANDWIDTH_SHARE * target.bandwidth
    return {
        "matmul": work.matmul_flops / speeds.matmul,
        "attention": work.attention_flops / speeds.attention,
        "memory": (work.other_bytes - work.optimizer_bytes) / bandwidth,
        "optimizer": work.optimizer_bytes / bandwidth,
    }


def seconds(work: Work, target: Target) -> float:
    """The least time in seconds that a device needs for its work, one kind after the other."""
    return sum(seconds_by_kind(work, target).values())


def shortfall(target: Target) -> float:
    """The factor by which a published run on this kind of chip was slower than its roofline."""
    speeds = SPEEDS[chip_of(target)]
    config = Config(
        run_folder="",
        model=TINYLLAMA_1B,
        data=DataConfig(),
        steps=10_000,
        batch_rows=1024,
        execution=ExecutionConfig(recompute="elementwise"),
    )
    tokens = config.batch_rows * TINYLLAMA_1B.context / 16
    fastest = seconds(work_by_formula(config, 16, 16), speeds.published_on)
    return tokens / speeds.published / fastest


def published_seconds(config: Config, devices: int, fsdp: int, target: Target) -> float:
    """The time in seconds of a step that is as much slower than its roofline as a published run.

    Args:
      config: the run.
      devices: the number of devices of the mesh.
      fsdp: the number of devices that share one copy of weights and optimizer state.
      target: the card.
    """
    return shortfall(target) * seconds(work_by_formula(config, devices, fsdp), target)


def wire_seconds(
    collective: Collective, target: Target, devices: int, fsdp: int, network: float
) -> float:
    """The time in seconds of one run of a collective that the devices do as a ring.

    All-reduces run over the data axis or over all devices, the other collectives over the fsdp
    axis. Neighbours on the fsdp axis stand side by side, 8 in a node.

    Args:
      collective: the collective.
      target: the card, which gives NVLink's bandwidth.
      devices: the number of devices of the mesh.
      fsdp: the number of devices that share one copy of weights and optimizer state.
      network: bytes a second into a node, and as many out of it.
    """
    # In a ring of n devices, (n - 1) / n of the array pass each link.
    n = collective.devices
    # An all-reduce is a reduce-scatter and an all-gather, so its bytes pass twice.
    passes = 2 if collective.kind == "all-reduce" else 1
    moved = passes * collective.bytes * (n - 1) / n
    along_data = collective.kind == "all-reduce" and n < devices
    span = devices if collective.kind == "all-reduce" else fsdp
    if span <= NODE_DEVICES:
        return moved / target.nvlink
    # Each part of the state has a ring of its own over the data axis. Those of the parts in one
    # node share its network.
    rings = min(fsdp, NODE_DEVICES) if along_data else 1
    return max(moved * rings / network, moved / target.nvlink)


def exposed_seconds(collective: Collective, wire: float, target: Target) -> float:
    """The time in seconds of a collective that no work scheduled beside it covers.

    Args:
      collective: the collective.
      wire: the time that it takes by itself, from `wire_seconds`.
      target: the card.
    """
    speeds = SPEEDS[chip_of(target)]
    # Attention is counted at the speed of matrix products. It is slower in fact and covers more, so
    # that the estimate errs towards exposed time.
    beside = collective.overlapped_flops / speeds.matmul
    beside += collective.overlapped_bytes / (BANDWIDTH_SHARE * target.bandwidth)
    return max(0.0, wire - beside) if collective.asynchronous else wire


def assumptions(target: Target, network: float) -> list[str]:
    """Lines for the reader of a plan: the formulas and constants behind it, with their sources.

    Args:
      target: the card.
      network: bytes a second into a node, and as many out of it.
    """
    speeds = SPEEDS[chip_of(target)]
    return [
        "FLOPs a token: 6 N' + 12 L N H T in full, 6 N' + 6 L N H T causally; N' is all weights "
        "but the input embedding (Chowdhery et al. 2022, appendix B)",
        f"fast end: matrix products {speeds.matmul / 1e12:.0f} TFLOP/s (mamf-finder), attention "
        f"{speeds.attention / 1e12:.0f} TFLOP/s ({speeds.attention_source}), memory "
        f"{BANDWIDTH_SHARE * target.bandwidth / 1e12:.2f} TB/s ({BANDWIDTH_SHARE:.0%} of the "
        "card's, assumed)",
        f"slow end: {shortfall(target):.2f} times the roofline, as was measured with "
        f"the 1.1B: {speeds.published:,.0f} tokens/s a GPU "
        f"({speeds.published_source})",
        f"network: {network * 8 / 1e9:.0f} Gb/s a node each way (--network), NVLink "
        f"{target.nvlink / 1e9:.0f} GB/s a GPU each way (data sheet)",
    ]
