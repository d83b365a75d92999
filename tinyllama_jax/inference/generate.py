"""Text from a trained model."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.config import LlamaConfig, require
from tinyllama_jax.model import llama


def generate(
    config: LlamaConfig,
    weights: llama.Weights,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    eos: int | None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """Continues a prompt.

    Args:
      config: the model.
      weights: in the dtype to compute in.
      prompt: ids, at least one.
      max_tokens: new tokens at most.
      eos: ends the text and is not returned; None: never ends early.
      temperature: 0 takes the likeliest token, else samples from softmax(logits / temperature).
      seed: of the samples.

    Returns:
      The new ids.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, or more tokens than the context.
    """
    require(len(prompt) > 0, "The prompt is empty: give at least one token.")
    require(max_tokens > 0, "--max-tokens must be above 0.")
    require(temperature >= 0, "--temperature must not be negative.")
    outside = [token for token in prompt if not 0 <= token < config.vocab_size]
    require(
        not outside,
        f"The prompt holds the token id {outside[:1]}, outside the vocabulary of "
        f"{config.vocab_size}.",
    )
    length = len(prompt)
    require(
        length + max_tokens <= config.context,
        f"A prompt of {length} tokens and {max_tokens} new ones pass the context of "
        f"{config.context}: shorten the prompt or lower --max-tokens.",
    )
    tokens_T = np.zeros(config.context, np.int32)
    tokens_T[:length] = prompt
    key = jax.random.key(seed)
    for position in range(length, length + max_tokens):
        # The whole buffer each time: one program for every length, causal, so the rest is unseen.
        token = int(_next_token(config, weights, tokens_T, position, temperature, key))
        if token == eos:
            return tokens_T[length:position].tolist()
        tokens_T[position] = token
    return tokens_T[length : length + max_tokens].tolist()


@functools.partial(jax.jit, static_argnums=0)
def _next_token(config, weights, tokens_T, position, temperature, key):
    logits_V = llama.apply(config, weights, tokens_T[None])[0, position - 1].astype(jnp.float32)
    noise_V = jax.random.gumbel(jax.random.fold_in(key, position), logits_V.shape)
    # argmax(logits + t * Gumbel noise) samples from softmax(logits / t), and is greedy at t = 0.
    return jnp.argmax(logits_V + temperature * noise_V)
