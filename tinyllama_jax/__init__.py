"""Pretrain small Llamas in JAX, from raw text to a folder that PyTorch opens."""
