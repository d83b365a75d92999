"""AdamW, clipping and the learning rate."""

import jax
import optax

from tinyllama_jax.config import OptimizerConfig
from tinyllama_jax.model.llama import SCALED_BY
from tinyllama_jax.runtime.mesh import named_leaves, weight_name

# Weights that are vectors in every layer; the rest are matrices.
NORM_GAINS = (*(f"blocks.{gain}" for gain in SCALED_BY), "norm_D")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by number of updates made: linear warm-up from 0, then down to `end_lr`.

    Every schedule ends at `steps`, warm-up included: the cosine (Loshchilov and Hutter 2017,
    equation 5), the line, and warm-up, stable, decay (Hu et al. 2024, section 4).
    """
    peak, end, warmup = config.peak_lr, config.end_lr, config.warmup_steps
    if config.schedule == "cosine":
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
    """Clip by global norm, then AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

    def decayed(weights):
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
            mask=decayed if config.decay_matrices_only else None,
        ),
    )
