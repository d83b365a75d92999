"""The training loss."""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums of weighted next-token losses in nats, and of the weights, in fp32.

    Sums and not a mean, so that micro-batches and devices add up exactly: the loss is their
    quotient, taken once. Targets of weight 0 count for nothing.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits_BT
    return jnp.sum(losses_BT * weights_BT), jnp.sum(weights_BT)
