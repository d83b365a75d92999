"""Where documents begin and padding stands in rows of tokens. The tokens alone tell it, so rows of
all datasets can share a batch: a document begins after an eos, or with a bos where those who made
the tokens gave it one, and an eos after an eos is padding."""

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.data.format import is_padding
from tinyllama_jax.data.tokenizer import BOS, EOS


def segment_ids(tokens_BT: jax.Array) -> jax.Array:
    """Numbers the documents of each row, in int32 (B, T); padding is segment 0.

    What a row begins with is a document, though it may be the rest of one.
    """
    ends_BT = tokens_BT == EOS
    after_end_BT = jnp.pad(ends_BT[:, :-1], ((0, 0), (1, 0)))
    begins_BT = after_end_BT | (tokens_BT == BOS)
    return jnp.where(ends_BT & after_end_BT, 0, 1 + jnp.cumsum(begins_BT, 1, jnp.int32))


def loss_weights(tokens_BS: np.ndarray, first_tokens: bool = True) -> np.ndarray:
    """How much the targets tokens_BS[..., 1:] count, fp32: 1, or 0 for padding and what follows it.

    Args:
      tokens_BS: rows of S = T + 1 tokens, whatever axes stand before the last.
      first_tokens: whether the first token of a document counts, though nothing of the document
        tells it.
    """
    padding_BS = is_padding(tokens_BS)
    left_out_BT = padding_BS[..., 1:] | padding_BS[..., :-1]
    if not first_tokens:
        left_out_BT |= tokens_BS[..., :-1] == EOS
    return (~left_out_BT).astype(np.float32)
