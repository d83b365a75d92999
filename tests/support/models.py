"""Models small enough to train in a test."""

from tinyllama_jax.config import (
    LlamaConfig,
)

VOCAB = 400


SMALL = LlamaConfig(
    vocab_size=VOCAB,
    layers=2,
    width=48,
    query_heads=6,
    kv_heads=2,
    head_width=8,
    swiglu_width=80,
    context=64,
)


# No two sizes alike, so that no transposed tensor fits.
ODD = LlamaConfig(
    vocab_size=600,
    layers=3,
    width=24,
    query_heads=4,
    kv_heads=2,
    head_width=10,
    swiglu_width=34,
    context=32,
    rope_base=7e3,
    norm_eps=1e-4,
)
