"""FLOPs of a token, and how much of a chip they use."""

from tinyllama_jax.config import LlamaConfig

# Dense bf16 peaks of NVIDIA's data sheets, by the device kind that JAX reports.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def flops_per_token(model: LlamaConfig, *, causal: bool) -> int:
    """FLOPs of forward and backward per token (Chowdhery et al. 2022, appendix B).

    6 N' + 12 L N H T with every pair of positions counted, 6 N' + 6 L N H T with the visible ones
    alone; N' counts all weights but the input embedding.
    """
    multiplied = model.parameters() - model.vocab_size * model.width
    pairs = model.layers * model.query_heads * model.head_width * model.context
    return 6 * multiplied + (6 if causal else 12) * pairs


def mfu(
    model: LlamaConfig, tokens_per_sec_per_device: float, device_kind: str, *, causal: bool
) -> float | None:
    """Share of the chip's bf16 peak; None for a chip that is not in the table."""
    if device_kind not in PEAK_FLOPS:
        return None
    flops = tokens_per_sec_per_device * flops_per_token(model, causal=causal)
    return flops / PEAK_FLOPS[device_kind]
