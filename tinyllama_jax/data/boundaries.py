"""Where documents begin, and where padding is, in rows of tokens.

The tokens alone tell it, so that rows of all datasets can share a batch: a document begins after an
eos, or with a bos where those who made the tokens gave it one; an eos after an eos is padding.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.data.format import is_padding
from tinyllama_jax.data.tokenizer import BOS, EOS


def segment_ids(tokens_BT: jax.Array) -> jax.Array:
    """Numbers the documents of each row from 1, in int32 (B, T); padding has the number 0.

    The first document of a row may be the rest of one that the row before holds in part.
    """
    ends_BT = tokens_BT == EOS
    after_end_BT = jnp.pad(ends_BT[:, :-1], ((0, 0), (1, 0)))
    begins_BT = after_end_BT | (tokens_BT == BOS)
    return jnp.where(ends_BT & after_end_BT, 0, 1 + jnp.cumsum(begins_BT, 1, jnp.int32))


def loss_weights(tokens_BS: np.ndarray, first_tokens: bool = True) -> np.ndarray:
    """The weight of each target, tokens_BS[..., 1:], in the loss: float32 (..., T).

    It is 0 where the target, or the token that it is predicted from, is padding; else 1.

    Args:
      tokens_BS: rows of S = T + 1 tokens, with any axes before the last.
      first_tokens: whether the first token of a document has the weight 1; it is predicted from
        the eos of another document.
    """
    padding_BS = is_padding(tokens_BS)
    left_out_BT = padding_BS[..., 1:] | padding_BS[..., :-1]
    if not first_tokens:
        left_out_BT |= tokens_BS[..., :-1] == EOS
    return (~left_out_BT).astype(np.float32)
