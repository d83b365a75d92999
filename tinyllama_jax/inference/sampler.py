"""How the next token is chosen; without JAX, so that the command line can read it at once."""

import dataclasses

from tinyllama_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is chosen; filters apply in this order, as in transformers."""

    temperature: float = 0.0
    """0 takes the likeliest token, else samples from softmax(logits / temperature)."""
    top_k: int = 0
    """Only the k likeliest tokens, and all as likely as the last of them; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability (Holtzman et al. 2019)."""

    def __post_init__(self):
        require(self.temperature >= 0, "--temperature must not be negative.")
        require(self.top_k >= 0, "--top-k must not be negative.")
        require(0 < self.top_p <= 1, "--top-p must be above 0, and 1 at most.")


GREEDY = Sampler()
