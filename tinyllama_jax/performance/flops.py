"""The FLOPs that a token takes in training, and the share of a chip's peak that a run reaches."""

from tinyllama_jax.config import LlamaConfig

# Dense bf16 peaks in FLOP/s from NVIDIA's data sheets, by the device kind that JAX reports. A chip
# that is not listed gets no MFU: a guessed peak would make the number meaningless.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def flops_per_token(model: LlamaConfig, *, causal: bool) -> int:
    """The FLOPs of one token's forward and backward pass (Chowdhery et al. 2022, appendix B).

    The count is 6 N' + 12 L N H T, where N' is the number of weights without the input embedding,
    which is looked up and not multiplied. Work that recomputation repeats does not count.

    Args:
      model: the model.
      causal: True counts only the pairs of positions that the causal mask leaves visible, which
        halves the second term. False counts all pairs, as the paper does.
    """
    multiplied = model.parameters() - model.vocab_size * model.width
    pairs = model.layers * model.query_heads * model.head_width * model.context
    return 6 * multiplied + (6 if causal else 12) * pairs


def mfu(
    model: LlamaConfig, tokens_per_sec_per_device: float, device_kind: str, *, causal: bool
) -> float | None:
    """Model FLOPs utilization: the share of the chip's bf16 peak that the model's FLOPs use.

    Returns:
      The share, from 0 to 1, or None for a chip that is not in `PEAK_FLOPS`.
    """
    if device_kind not in PEAK_FLOPS:
        return None
    flops = tokens_per_sec_per_device * flops_per_token(model, causal=causal)
    return flops / PEAK_FLOPS[device_kind]
