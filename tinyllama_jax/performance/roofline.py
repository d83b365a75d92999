"""How fast a step can be: its work over what a card has been seen to reach, and its network.

Predictions, made of what was measured; each constant names who did.
"""

import dataclasses

from tinyllama_jax.config import TINYLLAMA_1B, Config, DataConfig, ExecutionConfig, LlamaConfig
from tinyllama_jax.model.attention import CHIPS
from tinyllama_jax.performance.program import Collective, Program
from tinyllama_jax.performance.targets import A100_40G, H100, NODE_DEVICES, Target


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Of one chip. The fast end of a prediction takes the first three, the slow end the last."""

    matmul: float
    """FLOP/s of large bf16 matrix products: the fastest shape of mamf-finder (S. Bekman, Machine
    Learning Engineering, compute/accelerator)."""
    attention: float
    """FLOP/s forward and backward, head width 64, causal, 2,048 tokens; a backward pass counts as
    2.5 forward passes, and pairs that the mask hides do not count."""
    attention_source: str
    published_on: Target
    published: float
    """Tokens/s of one GPU that a training system reached with the 1.1B."""
    published_source: str


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
        attention=3.5 / (1 / 402e12 + 2.5 / 254e12),
        attention_source="cuDNN forward 402, tokamax backward 254",
        published_on=H100,
        published=80_950,
        published_source="this project on one H100, benchmarks/results/, 2026-11-27",
    ),
}

# What elementwise work reaches of a card's bandwidth: assumed, as STREAM-like copies come close.
BANDWIDTH_SHARE = 0.9
# Bytes through memory beside matrix products and attention, for each byte that recompute
# `elementwise` keeps: counted in the compiled step of the 1.1B, 4.8 MB a token over 0.88 MB.
TRAFFIC_OF_KEPT_BYTE = 5.45
# AdamW a parameter: weight, gradient and two moments read, three of them written (28 bytes), the
# gradient read once more for its norm (4), and the weight written in bf16 (2).
OPTIMIZER_TRAFFIC = 34


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in one step; attention by the count of `attention_flops`."""

    matmul_flops: float
    attention_flops: float
    other_bytes: float
    """Memory traffic that is neither a matrix product's nor attention's."""
    optimizer_bytes: float
    """Of this, the optimizer's."""


def kept_by_elementwise(model: LlamaConfig) -> int:
    """Bytes a token and layer that recompute `elementwise` keeps, in bf16 but for fp32 sums."""
    queries, keys = (heads * model.head_width for heads in (model.query_heads, model.kv_heads))
    values = 2 * model.width + 2 * queries + 2 * keys + 2 * model.swiglu_width
    return 2 * values + 4 * model.query_heads


def work_by_formula(config: Config, devices: int, fsdp: int) -> Work:
    """The work of a step without compiling it.

    Matrix products: 2 FLOPs a weight forward and 4 backward; attention: as `attention_flops`.
    Recompute `layers` runs the forward products twice, but for those whose result is kept or not
    needed again: the last of each layer.
    """
    model, execution = config.model, config.execution
    tokens = config.batch_rows * model.context / devices
    norms = (2 * model.layers + 1) * model.width
    head = model.vocab_size * model.width
    in_layers = model.parameters() - 2 * head - norms
    again = in_layers - model.layers * model.width * model.swiglu_width
    twice = execution.recompute == "layers"
    traffic = TRAFFIC_OF_KEPT_BYTE * kept_by_elementwise(model)
    traffic *= model.layers
    optimizer_bytes = OPTIMIZER_TRAFFIC * model.parameters() / fsdp
    return Work(
        matmul_flops=tokens * (6 * (in_layers + head) + (2 * again if twice else 0)),
        attention_flops=tokens * attention_flops(config),
        other_bytes=tokens * traffic + optimizer_bytes,
        optimizer_bytes=optimizer_bytes,
    )


def attention_flops(config: Config) -> int:
    """Of a token: 2 L N H T forward, causal, 2.5 times that backward; `layers` adds a forward pass.

    The kernels' speeds are published for this count, whatever a kernel computes again inside.
    """
    model = config.model
    pairs = model.layers * model.query_heads * model.head_width * model.context
    return pairs * (9 if config.execution.recompute == "layers" else 7)


def work_of_program(program: Program, config: Config, tokens: float) -> Work:
    """The work of a step as it was compiled; attention in the count of `attention_flops`.

    Args:
      program: the step.
      config: the run.
      tokens: that a device reads in the step.
    """
    return Work(
        matmul_flops=program.matmul_flops,
        attention_flops=tokens * attention_flops(config),
        other_bytes=program.other_bytes,
        optimizer_bytes=program.optimizer_bytes,
    )


def chip_of(target: Target) -> str:
    """The key of `SPEEDS` for a card."""
    return next(chip for name, chip in CHIPS.items() if name in target.device_kind)


def seconds_by_kind(work: Work, target: Target) -> dict[str, float]:
    """The least time a device needs for each `Kind` of its work, but for communication."""
    speeds = SPEEDS[chip_of(target)]
    bandwidth = BANDWIDTH_SHARE * target.bandwidth
    return {
        "matmul": work.matmul_flops / speeds.matmul,
        "attention": work.attention_flops / speeds.attention,
        "memory": (work.other_bytes - work.optimizer_bytes) / bandwidth,
        "optimizer": work.optimizer_bytes / bandwidth,
    }


def seconds(work: Work, target: Target) -> float:
    """The least time a device needs for its work, one kind after the other."""
    return sum(seconds_by_kind(work, target).values())


def shortfall(target: Target) -> float:
    """How many times longer than the roofline a published run took."""
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
    """The time of a step that falls as short of its roofline as a published run did."""
    return shortfall(target) * seconds(work_by_formula(config, devices, fsdp), target)


def wire_seconds(
    collective: Collective, target: Target, devices: int, fsdp: int, network: float
) -> float:
    """Time of one run of a collective by rings: (n - 1) / n of its bytes pass each link.

    Args:
      collective: all-reduces run over the data axis or over all devices, the others over fsdp.
      target: the card, and with it NVLink.
      devices: of the mesh, fsdp neighbours side by side and 8 in a node.
      fsdp: of them, those that share one state.
      network: bytes a second into, and out of, a node.
    """
    n = collective.devices
    # An all-reduce is a reduce-scatter and an all-gather.
    passes = 2 if collective.kind == "all-reduce" else 1
    moved = passes * collective.bytes * (n - 1) / n
    along_data = collective.kind == "all-reduce" and n < devices
    span = devices if collective.kind == "all-reduce" else fsdp
    if span <= NODE_DEVICES:
        return moved / target.nvlink
    # Rings over the data axis leave a node side by side, one for each part of the state in it.
    rings = min(fsdp, NODE_DEVICES) if along_data else 1
    return max(moved * rings / network, moved / target.nvlink)


def exposed_seconds(collective: Collective, wire: float, target: Target) -> float:
    """What is left of a collective's time when the work beside it is done."""
    speeds = SPEEDS[chip_of(target)]
    # As if all of it ran as fast as matrix products: attention is slower and hides more.
    beside = collective.overlapped_flops / speeds.matmul
    beside += collective.overlapped_bytes / (BANDWIDTH_SHARE * target.bandwidth)
    return max(0.0, wire - beside) if collective.asynchronous else wire


def assumptions(target: Target, network: float) -> list[str]:
    """The formulas and constants behind a prediction, each with its source.

    Args:
      target: the card.
      network: bytes a second into, and out of, a node.
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
