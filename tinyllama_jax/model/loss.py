"""The training loss: the head's product and its cross-entropy in one, a chunk of tokens at a time.
And the same token by token, for tasks that ask how likely a text is.

Shapes: B batch, T tokens, D width, V vocabulary, C tokens of a chunk, M = B C.
"""

import jax
import jax.numpy as jnp

from tinyllama_jax.model.attention import has_kernels
from tinyllama_jax.model.cross_entropy import cross_entropy

# Logits alive at once, by whether our kernels are there. The fewer chunks, the less often the
# head's gradient is read and written: half a GiB in bf16, whose gradients take its place; elsewhere
# a quarter in fp32, several times over.
CHUNK_LOGITS = {True: 2**28, False: 2**26}


def next_token_loss(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums of weighted next-token losses in nats, and of the weights, in fp32.

    Sums and not a mean, so that micro-batches and devices add up exactly: the loss is their
    quotient, taken once. Targets of weight 0 count for nothing.

    Logits are rounded to the dtype of the weights, as the model gives them; all else is fp32.

    Args:
      x_BTD: what the head multiplies, after the last norm.
      head_DV: the head.
      targets_BT: ids of the next tokens.
      weights_BT: fp32, how much each target counts.
    """
    return _loss_sum(x_BTD, head_DV, targets_BT, weights_BT), jnp.sum(weights_BT)


def target_scores(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target in nats, fp32, and whether no token is likelier.

    Args:
      x_BTD: what the head multiplies, after the last norm.
      head_DV: the head.
      targets_BT: ids of the next tokens.
    """

    head_DV = head_DV.astype(x_BTD.dtype)

    def chunk(_, inputs):
        x_BCD, targets_BC = inputs
        losses_BC, logits_BCV, _ = _losses(x_BCD @ head_DV, targets_BC)
        return None, (-losses_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC)

    _, (scores, likeliest) = jax.lax.scan(chunk, None, _chunks(head_DV, x_BTD, targets_BT))
    return _joined(scores), _joined(likeliest)


@jax.custom_vjp
def _loss_sum(x_BTD, head_DV, targets_BT, weights_BT):
    head_DV = head_DV.astype(x_BTD.dtype)

    def chunk(loss, inputs):
        x_BCD, targets_BC, weights_BC = inputs
        losses_BC, _, _ = _losses(x_BCD @ head_DV, targets_BC)
        return loss + jnp.sum(losses_BC * weights_BC), None

    chunks = _chunks(head_DV, x_BTD, targets_BT, weights_BT)
    return jax.lax.scan(chunk, jnp.zeros(()), chunks)[0]


def next_token_gradients(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    dhead_DV: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The loss of `next_token_loss` together with its gradients, while logits are there anyway.

    Logits are computed once and never kept; a backward pass would have to compute them again.

    Args:
      x_BTD: as `next_token_loss` takes it, and what follows.
      head_DV: the head.
      targets_BT: ids of the next tokens.
      weights_BT: fp32, how much each target counts.
      dhead_DV: fp32, onto which the gradient of the head is added.

    Returns:
      The sum of weighted losses, the gradients of x and of the head, and each token's loss.
    """
    head_DV = head_DV.astype(x_BTD.dtype)

    def chunk(sums, inputs):
        loss, dhead_DV = sums
        x_BCD, targets_BC, weights_BC = inputs
        losses_BC, dlogits_BCV = _losses_and_dlogits(x_BCD @ head_DV, targets_BC, weights_BC)
        dx_BCD = dlogits_BCV @ head_DV.T
        # Tokens as one axis: for a sum over two, XLA on CPUs would copy the logits transposed.
        x_MD, dlogits_MV = (x.reshape(-1, x.shape[-1]) for x in (x_BCD, dlogits_BCV))
        dhead_DV += jnp.matmul(x_MD.T, dlogits_MV, preferred_element_type=jnp.float32)
        return (loss + jnp.sum(losses_BC * weights_BC), dhead_DV), (dx_BCD, losses_BC)

    chunks = _chunks(head_DV, x_BTD, targets_BT, weights_BT)
    (loss, dhead_DV), (dx, losses) = jax.lax.scan(chunk, (jnp.zeros(()), dhead_DV), chunks)
    return loss, _joined(dx), dhead_DV, _joined(losses)


def _forward(x_BTD, head_DV, targets_BT, weights_BT):
    zeros_DV = jnp.zeros(head_DV.shape, jnp.float32)
    loss, *gradients = next_token_gradients(x_BTD, head_DV, targets_BT, weights_BT, zeros_DV)
    dx_BTD, dhead_DV, losses_BT = gradients
    return loss, (dx_BTD, dhead_DV.astype(head_DV.dtype), losses_BT)


def _backward(residuals, dloss):
    dx_BTD, dhead_DV, losses_BT = residuals

    def scaled(x):
        return (x * dloss).astype(x.dtype)

    return scaled(dx_BTD), scaled(dhead_DV), None, scaled(losses_BT)


_loss_sum.defvjp(_forward, _backward)


def _losses_and_dlogits(logits_BCV, targets_BC, weights_BC):
    """The losses, and the gradient of their weighted sum in the dtype of the logits."""
    if has_kernels():
        V = logits_BCV.shape[-1]
        rows = logits_BCV.reshape(-1, V), targets_BC.ravel(), weights_BC.ravel()
        losses_M, dlogits_MV = cross_entropy(*rows)
        return losses_M.reshape(targets_BC.shape), dlogits_MV.reshape(logits_BCV.shape)
    dtype = logits_BCV.dtype
    losses_BC, logits_BCV, lse_BC = _losses(logits_BCV, targets_BC)
    probabilities_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
    is_target_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
    dlogits_BCV = (probabilities_BCV - is_target_BCV) * weights_BC[..., None]
    return losses_BC, dlogits_BCV.astype(dtype)


def _losses(logits_BCV, targets_BC):
    logits_BCV = logits_BCV.astype(jnp.float32)
    target_logits_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    return lse_BC - target_logits_BC, logits_BCV, lse_BC


def _chunks(head_DV, *arrays_BT):
    """The arrays cut along T into as few chunks as `CHUNK_LOGITS` asks for, (chunks, B, C, ...).

    Along T, because B may be split over devices.
    """
    B, T = arrays_BT[0].shape[:2]
    most = max(1, CHUNK_LOGITS[has_kernels()] // (B * head_DV.shape[1]))
    tokens = next(size for size in range(min(most, T), 0, -1) if T % size == 0)

    def cut(x_BT):
        return jnp.moveaxis(x_BT.reshape(B, T // tokens, tokens, *x_BT.shape[2:]), 1, 0)

    return tuple(map(cut, arrays_BT))


def _joined(x):
    """Chunks (chunks, B, C, ...) as (B, T, ...)."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
