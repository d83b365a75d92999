"""Translates between our weights and Hugging Face's tensors, reading weights only when needed.

Every format goes through Hugging Face's names: a reader of a format gives tensors under them, and a
writer receives tensors under them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from tinyllama_jax.config import LlamaConfig
from tinyllama_jax.errors import UserError, require
from tinyllama_jax.model import llama
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.runtime.mesh import named_leaves

# Our path -> (Hugging Face's name, the number of leading axes that the matrix product contracts).
# Our matrices have their input axes first; Hugging Face's have the outputs first, each flattened to
# one axis. Zero axes means that the weight is not multiplied with, and has the same shape in both.
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
    """One tensor of a Hugging Face checkpoint, and its place in our tree of weights."""

    path: str
    """The dotted path of our weight."""
    index: Any
    """The part of our weight that the tensor is: its layer, or `...` if there is no layer axis."""
    shape: tuple[int, ...]
    """The shape of that part in our tree, without the layer axis."""
    contracted: int
    """The number of leading axes of `shape` that the matrix product contracts."""

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape in a Hugging Face checkpoint."""
        ins, outs = self.shape[: self.contracted], self.shape[self.contracted :]
        return (math.prod(outs), math.prod(ins)) if self.contracted else self.shape

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Converts an array of `shape` into one of `hf_shape`."""
        matrix = array.reshape(self.hf_shape[::-1]).T if self.contracted else array
        return np.ascontiguousarray(matrix)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Converts an array of `hf_shape` into one of `shape`."""
        return array.T.reshape(self.shape) if self.contracted else array


@functools.cache
def leaves(config: LlamaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of every weight of the model, by its dotted path."""
    return named_leaves(llama.abstract_weights(config))


def tensors(config: LlamaConfig) -> dict[str, Tensor]:
    """Every tensor of the model by Hugging Face's name.

    Raises:
      KeyError: the model has a weight that `NAMES` does not list.
    """
    table = {}
    for path, leaf in leaves(config).items():
        name, contracted = NAMES[path]
        if path.startswith("blocks."):
            for layer in range(config.layers):
                table[name.format(layer)] = Tensor(path, layer, leaf.shape[1:], contracted)
        else:
            table[name] = Tensor(path, ..., leaf.shape, contracted)
    return table


# Our names of the norms' gains, outside the blocks and within a block.
GAINS = {"norm_D", *llama.SCALED_BY}


@dataclasses.dataclass(frozen=True)
class Unread:
    """A weight that lies on disk and is read again each time that it is used.

    `weight[layer]` reads one layer, and `np.asarray(weight)` reads all. A weight without a layer
    axis is read with the index `...`. This lets functions written for arrays handle models that are
    larger than memory.
    """

    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]
    """Reads the part of the weight at an index, a layer or `...`."""

    # NumPy would convert an unknown right operand of a product to an array, which reads it. This
    # makes NumPy call __rmul__ instead.
    __array_ufunc__ = None

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __rmul__(self, factor: np.ndarray) -> "Unread":
        """The product with an array, which is computed when the result is read."""
        return Unread(self.shape, lambda index: factor * self.read(index))

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.read(index)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(...), dtype)


def unread_weights(config: LlamaConfig, read: Callable[[str, Any], np.ndarray]) -> Weights:
    """Makes a tree of weights whose leaves are all `Unread`.

    Args:
      config: the model that the weights belong to.
      read: returns the part of a weight, given its dotted path and an index, a layer or `...`.
    """
    flat = {
        path: Unread(leaf.shape, functools.partial(read, path))
        for path, leaf in leaves(config).items()
    }
    return traverse_util.unflatten_dict(flat, sep=".")


def unread_layers(weights: Weights) -> Weights:
    """Brings `Unread` weights into the form of `for_decoding`, mostly without reading them.

    Only the gains of norms are read, which are small. Their products with the matrices after them
    are computed when those are read.
    """

    def layers_of(weight: Unread) -> list[Unread]:
        count, *shape = weight.shape
        return [Unread(tuple(shape), lambda _, i=i: weight[i]) for i in range(count)]

    def read_gains(weights: Weights) -> Weights:
        return {n: np.asarray(w) if n in GAINS else w for n, w in weights.items()}

    blocks = map(read_gains, llama.unstack(weights["blocks"], layers_of))
    return llama.fold_gains(read_gains(weights) | {"blocks": list(blocks)})


def unread_tensors(config: LlamaConfig, read: Callable[[str], np.ndarray]) -> Weights:
    """Makes a tree of `Unread` fp32 weights from a reader of Hugging Face's tensors.

    Args:
      config: the model that the weights belong to.
      read: returns a tensor in Hugging Face's shape, given Hugging Face's name.
    """
    shapes = {path: leaf.shape for path, leaf in leaves(config).items()}
    table = tensors(config)
    names = {(tensor.path, tensor.index): name for name, tensor in table.items()}

    def part(path: str, index: Any) -> np.ndarray:
        if name := names.get((path, index)):
            return table[name].to_ours(read(name).astype(np.float32))
        # All layers are asked for, which Hugging Face stores one by one. They are copied into one
        # array as they come; np.stack would hold all of them twice.
        stacked = np.empty(shapes[path], np.float32)
        for layer in range(config.layers):
            stacked[layer] = part(path, layer)
        return stacked

    return unread_weights(config, part)


def stream(
    weights: Weights, config: LlamaConfig, dtype: str, gains: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor in Hugging Face's shape, in the order of `tensors(config)`.

    Args:
      weights: the tree that `llama.init_weights` returns, in any float dtype, or one of `Unread`
        leaves, of which one layer of one weight is in memory at a time.
      config: the model that the weights belong to.
      dtype: the dtype of the arrays: float32, bfloat16 or float16.
      gains: the dtype of the norms' gains; None means `dtype`.

    Yields:
      Hugging Face's name and the array of each tensor.

    Raises:
      UserError: a weight holds values that are not finite, or that overflow in `dtype`.
    """
    flat = named_leaves(weights)
    for name, tensor in tensors(config).items():
        to = gains if gains and len(tensor.hf_shape) == 1 else dtype
        # The array gets no name here. A name would keep it in memory while the next one is read.
        yield name, _part(flat[tensor.path], tensor, to)


def _part(weight: Any, tensor: Tensor, dtype: str) -> np.ndarray:
    """Reads one tensor of a weight, in Hugging Face's shape and in a dtype."""
    part = (weight if isinstance(weight, Unread) else np.asarray(weight))[tensor.index]
    # NumPy warns of an overflow here, which the next lines turn into an error with a cure.
    with np.errstate(over="ignore"):
        array = part.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        require(
            bool(np.isfinite(part).all()),
            f"Weight {tensor.path} holds values that are not finite: convert an earlier "
            "checkpoint.",
        )
        raise UserError(
            f"Weight {tensor.path} holds values too large for {dtype}: give another dtype."
        )
    return tensor.to_hf(array)
