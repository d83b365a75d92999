"""The tensors of a Llama by Hugging Face's names, and weights that are read when asked for."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from tinyllama_jax.config import LlamaConfig, UserError, require
from tinyllama_jax.model import llama
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.runtime.mesh import named_leaves

# Our path -> (Hugging Face's name, how many leading axes the matrix contracts). A matrix is
# (in, out) here and (out, in) there; zero axes: no matrix product, stored alike.
NAMES = {
    "embedding_VD": ("model.embed_tokens.weight", 0),
    "blocks.attention_norm_D": ("model.layers.{}.input_layernorm.weight", 0),
    "blocks.query_DNH": ("model.layers.{}.self_attn.q_proj.weight", 1),
    "blocks.key_DKH": ("model.layers.{}.self_attn.k_proj.weight", 1),
    "blocks.value_DKH": ("model.layers.{}.self_attn.v_proj.weight", 1),
    "blocks.output_NHD": ("model.layers.{}.self_attn.o_proj.weight", 2),
    "blocks.swiglu_norm_D": ("model.layers.{}.post_attention_layernorm.weight", 0),
    "blocks.gate_DF": ("model.layers.{}.mlp.gate_proj.weight", 1),
    "blocks.up_DF": ("model.layers.{}.mlp.up_proj.weight", 1),
    "blocks.down_FD": ("model.layers.{}.mlp.down_proj.weight", 1),
    "norm_D": ("model.norm.weight", 0),
    "head_DV": ("lm_head.weight", 1),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint, and where it lives in our tree."""

    path: str
    index: Any
    """Of the tensor in the leaf at `path`: its layer, or `...` where there is no layer axis."""
    shape: tuple[int, ...]
    """Here, without the layer axis."""
    contracted: int

    @property
    def hf_shape(self) -> tuple[int, ...]:
        ins, outs = self.shape[: self.contracted], self.shape[self.contracted :]
        return (math.prod(outs), math.prod(ins)) if self.contracted else self.shape

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        matrix = array.reshape(self.hf_shape[::-1]).T if self.contracted else array
        return np.ascontiguousarray(matrix)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return array.T.reshape(self.shape) if self.contracted else array


@functools.cache
def leaves(config: LlamaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every weight of the model by its dotted path."""
    return named_leaves(llama.abstract_weights(config))


def tensors(config: LlamaConfig) -> dict[str, Tensor]:
    """Every tensor of the model by Hugging Face's name; a weight with no row raises KeyError."""
    table = {}
    for path, leaf in leaves(config).items():
        name, contracted = NAMES[path]
        if path.startswith("blocks."):
            for layer in range(config.layers):
                table[name.format(layer)] = Tensor(path, layer, leaf.shape[1:], contracted)
        else:
            table[name] = Tensor(path, ..., leaf.shape, contracted)
    return table


@dataclasses.dataclass(frozen=True)
class Unread:
    """A weight of all layers that lies on disk; `np.asarray` reads it, each time anew.

    Models are converted by a weight of all layers at a time, because that is how a checkpoint keeps
    them: one chunk, compressed.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def unread_weights(config: LlamaConfig, read: Callable[[str], np.ndarray]) -> Weights:
    """The tree of weights with an `Unread` for each leaf; `read` is given its dotted path."""
    flat = {
        path: Unread(leaf.shape, functools.partial(read, path))
        for path, leaf in leaves(config).items()
    }
    return traverse_util.unflatten_dict(flat, sep=".")


def unread_tensors(config: LlamaConfig, read: Callable[[str], np.ndarray]) -> Weights:
    """The same, fp32, from a `read` that is given Hugging Face's names and gives their tensors."""
    shapes = {path: leaf.shape for path, leaf in leaves(config).items()}
    table = tensors(config).items()

    def stack(path: str) -> np.ndarray:
        stacked = np.empty(shapes[path], np.float32)
        for name, tensor in table:
            if tensor.path == path:
                stacked[tensor.index] = tensor.to_ours(read(name).astype(np.float32))
        return stacked

    return unread_weights(config, stack)


def stream(
    weights: Weights, config: LlamaConfig, dtype: str, gains: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as Hugging Face has it, in the order of `tensors(config)`.

    Args:
      weights: as `llama.init_weights` gives them, in any float dtype, or `Unread`; one weight of
        all layers is in memory at a time.
      config: the model they belong to.
      dtype: of the arrays that come out: float32, bfloat16 or float16.
      gains: of those of the norms, if another.

    Raises:
      UserError: a weight holds values that are not finite, as it is or in the dtype asked for.
    """
    flat, at, whole = named_leaves(weights), None, np.empty(0)
    for name, tensor in tensors(config).items():
        if tensor.path != at:
            whole = np.empty(0)  # let go of one before the next is read
            at, whole = tensor.path, np.asarray(flat[tensor.path])
        to = gains if gains and len(tensor.hf_shape) == 1 else dtype
        with np.errstate(over="ignore"):
            array = tensor.to_hf(whole[tensor.index].astype(to))
        if not np.isfinite(array).all():
            require(
                bool(np.isfinite(whole[tensor.index]).all()),
                f"Weight {at} holds values that are not finite: convert an earlier checkpoint.",
            )
            raise UserError(f"Weight {at} holds values too large for {to}: give another dtype.")
        yield name, array
