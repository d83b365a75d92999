"""How the next token is chosen; without JAX, so that the command line can read it at once."""

import dataclasses

from tinyllama_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. The fields apply in their order, as in Hugging Face's library.

    Tokens with exactly the logit of the last one that a filter keeps are kept too.
    """

    temperature: float = 0.0
    """0: always the likeliest token; else a sample from softmax(logits / temperature)."""
    top_k: int = 0
    """Sample only from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample only from the fewest tokens of this total probability (Holtzman et al. 2019)."""

    def __post_init__(self):
        require(self.temperature >= 0, "--temperature must not be negative.")
        require(self.top_k >= 0, "--top-k must not be negative.")
        require(0 < self.top_p <= 1, "--top-p must be above 0, and 1 at most.")


GREEDY = Sampler()
