"""Makes the optimizer: gradient clipping, AdamW and the schedule of the learning rate."""

from typing import Any

import jax
import optax

from tinyllama_jax.config import OptimizerConfig
from tinyllama_jax.model.llama import SCALED_BY
from tinyllama_jax.runtime.mesh import named_leaves, weight_name

# The weights that are vectors within a layer. All others are matrices.
NORM_GAINS = (*(f"blocks.{gain}" for gain in SCALED_BY), "norm_D")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Makes the schedule of the learning rate: a linear warm-up from 0, then a decay to `end_lr`.

    The decay is a cosine (Loshchilov and Hutter 2017, equation 5), a straight line, or a straight
    line at the end of a constant phase (warm-up, stable, decay: Hu et al. 2024, section 4).

    Args:
      config: the optimizer's configuration.
      steps: the number of steps of the run, at which every schedule ends, warm-up included.

    Returns:
      A function from the number of updates made so far to the learning rate. A step that is skipped
      because its gradients are not finite makes no update.
    """
    peak, end, warmup = config.peak_lr, config.end_lr, config.warmup_steps
    if config.schedule == "cosine":
        # Optax's `decay_steps` includes the warm-up, so the run's length is passed as it is.
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)
    decay_from = steps - config.decay_steps if config.schedule == "wsd" else warmup
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, end, steps - decay_from),
        ],
        boundaries=[warmup, decay_from],
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Makes AdamW (Loshchilov and Hutter 2019, algorithm 2) with clipping by the global norm.

    Args:
      config: the optimizer's configuration.
      steps: the number of steps of the run.
    """

    def decayed(weights: dict[str, Any]) -> dict[str, Any]:
        # The mask goes by name. By shape, a gain would count as a matrix, because all layers of a
        # weight are one array with a layer axis in front.
        flags = [weight_name(name) not in NORM_GAINS for name in named_leaves(weights)]
        return jax.tree.unflatten(jax.tree.structure(weights), flags)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            # Without a mask every weight decays, gains included, as in the original run.
            mask=decayed if config.decay_matrices_only else None,
        ),
    )
