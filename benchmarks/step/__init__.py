"""The training step: its speed beside PyTorch's, where its time goes, and what it learns."""
