"""The tensors of a Llama by Hugging Face's names, and weights that are read when asked for."""

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


GAINS = {"norm_D", *llama.SCALED_BY}


@dataclasses.dataclass(frozen=True)
class Unread:
    """A weight that lies on disk: `weight[layer]` reads a layer, `np.asarray` all, each time anew.

    What has no layer axis has the index `...`.
    """

    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]

    __array_ufunc__ = None  # NumPy leaves products to __rmul__, instead of reading

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __rmul__(self, factor: np.ndarray) -> "Unread":
        return Unread(self.shape, lambda index: factor * self.read(index))

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.read(index)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(...), dtype)


def unread_weights(config: LlamaConfig, read: Callable[[str, Any], np.ndarray]) -> Weights:
    """The tree of weights with an `Unread` for each leaf.

    Args:
      config: the model they belong to.
      read: is given a leaf's dotted path, and a layer or `...`.
    """
    flat = {
        path: Unread(leaf.shape, functools.partial(read, path))
        for path, leaf in leaves(config).items()
    }
    return traverse_util.unflatten_dict(flat, sep=".")


def unread_layers(weights: Weights) -> Weights:
    """`Unread` weights as `for_decoding` gives them; all but the norms' gains stay unread."""

    def layers_of(weight: Unread) -> list[Unread]:
        count, *shape = weight.shape
        return [Unread(tuple(shape), lambda _, i=i: weight[i]) for i in range(count)]

    def read_gains(weights: Weights) -> Weights:
        return {n: np.asarray(w) if n in GAINS else w for n, w in weights.items()}

    blocks = map(read_gains, llama.unstack(weights["blocks"], layers_of))
    return llama.fold_gains(read_gains(weights) | {"blocks": list(blocks)})


def unread_tensors(config: LlamaConfig, read: Callable[[str], np.ndarray]) -> Weights:
    """The same, fp32, from a `read` that is given Hugging Face's names and gives their tensors."""
    shapes = {path: leaf.shape for path, leaf in leaves(config).items()}
    table = tensors(config)
    names = {(tensor.path, tensor.index): name for name, tensor in table.items()}

    def part(path: str, index: Any) -> np.ndarray:
        if name := names.get((path, index)):
            return table[name].to_ours(read(name).astype(np.float32))
        stacked = np.empty(shapes[path], np.float32)
        for layer in range(config.layers):
            stacked[layer] = part(path, layer)
        return stacked

    return unread_weights(config, part)


def stream(
    weights: Weights, config: LlamaConfig, dtype: str, gains: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as Hugging Face has it, in the order of `tensors(config)`.

    Args:
      weights: as `llama.init_weights` gives them, in any float dtype, or `Unread`; of those one
        layer of a weight is in memory at a time.
      config: the model they belong to.
      dtype: of the arrays that come out: float32, bfloat16 or float16.
      gains: of those of the norms, if another.

    Raises:
      UserError: a weight holds values that are not finite, as it is or in the dtype asked for.
    """
    flat = named_leaves(weights)
    for name, tensor in tensors(config).items():
        to = gains if gains and len(tensor.hf_shape) == 1 else dtype
        # Held here by no name: it would still be there while the next one is read.
        yield name, _part(flat[tensor.path], tensor, to)


def _part(weight: Any, tensor: Tensor, dtype: str) -> np.ndarray:
    """One tensor of a weight, as Hugging Face has it."""
    part = (weight if isinstance(weight, Unread) else np.asarray(weight))[tensor.index]
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
