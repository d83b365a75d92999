"""Models as transformers' own, with the same weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tinyllama_jax.config import LlamaConfig
from tinyllama_jax.conversion import tensors
from tinyllama_jax.model import llama

SHAPE = dict(vocab_size=301, layers=2, width=96, query_heads=6, swiglu_width=130, context=64)


CONFIGS = {
    "gqa": LlamaConfig(**SHAPE, kv_heads=2, head_width=10, rope_base=7e3, norm_eps=1e-4),
    "mqa": LlamaConfig(**SHAPE, kv_heads=1, head_width=14, rope_base=5e5),
    "mha": LlamaConfig(**SHAPE, kv_heads=6, head_width=16, rope_base=123.0),
    "gqa_rope_factor": LlamaConfig(**SHAPE, kv_heads=3, head_width=18, rope_factor=4.0),
}


def random_weights(config: LlamaConfig) -> llama.Weights:
    """Nothing at rest: gains away from 1, matrices large enough for uneven attention."""
    generator = np.random.default_rng(1)

    def draw(path, leaf):
        noise = jnp.asarray(generator.standard_normal(leaf.shape, np.float32))
        return 1 + 0.2 * noise if "norm" in jax.tree_util.keystr(path) else 0.1 * noise

    return jax.tree_util.tree_map_with_path(draw, llama.abstract_weights(config))


def hf_arrays(config: LlamaConfig, flat: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our leaves by path, as Hugging Face's tensors by name."""
    table = tensors.tensors(config).items()
    return {name: row.to_hf(np.asarray(flat[row.path][row.index])) for name, row in table}


def transformers_model(config: LlamaConfig, weights: llama.Weights) -> Any:
    """transformers' model with our weights."""
    import torch
    import transformers

    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_factor != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_factor}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.swiglu_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.query_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=False,
        )
    )
    arrays = hf_arrays(config, traverse_util.flatten_dict(weights, sep="."))
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    return model
