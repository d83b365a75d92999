"""Attention by this project and by other libraries, ready to run behind one interface.

Shapes: B batch, T tokens, N query heads, K kv heads, H head width.
"""

import dataclasses
import functools
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinyllama_jax.model.attention import attention


class Inputs(NamedTuple):
    """Queries, keys, values, the cotangent of the output, and the documents, or None."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    do_BTNH: jax.Array
    segments_BT: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape of causal attention, with or without packed documents."""

    B: int
    T: int
    N: int
    K: int
    H: int
    documents: bool = False
    mean_document: int = 512

    def __str__(self):
        return f"B{self.B} T{self.T} N{self.N} K{self.K} H{self.H}"

    def segments(self, seed: int) -> np.ndarray:
        """Ids (B, T) of documents of random lengths, end to end, cut at the ends of rows."""
        rng = np.random.default_rng(seed)
        tokens = self.B * self.T
        lengths = rng.integers(1, 2 * self.mean_document, 2 + 4 * tokens // self.mean_document)
        ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[:tokens]
        return ids.reshape(self.B, self.T)

    def inputs(self, seed: int, dtype=jnp.bfloat16) -> Inputs:
        """Random inputs of variance 1; the documents differ between seeds too."""
        keys = jax.random.split(jax.random.key(seed), 4)
        heads = (self.N, self.K, self.K, self.N)
        arrays = (
            jax.random.normal(key, (self.B, self.T, n, self.H), dtype)
            for key, n in zip(keys, heads, strict=True)
        )
        return Inputs(*arrays, jnp.asarray(self.segments(seed)) if self.documents else None)

    def flops(self, seeds: int) -> float:
        """FLOP of a forward pass: 4 H for each pair of a query and a key that it sees.

        Without documents these are half of all T^2 pairs, as papers count them. With documents they
        are the pairs that are really seen, on average over the inputs of so many seeds.
        """
        pairs = self.B * self.T**2 / 2
        if self.documents:
            # A document that is cut at the end of a row is two, which do not see each other.
            rows = [row for seed in range(seeds) for row in self.segments(seed)]
            lengths = np.concatenate([np.unique(row, return_counts=True)[1] for row in rows])
            pairs = float(np.sum(lengths * (lengths + 1) / 2)) / seeds
        return 4 * self.N * self.H * pairs


class Run(NamedTuple):
    """A system on some sets of inputs; both passes return without waiting for the device."""

    forward: Callable[[int], Any]
    """Computes o for the set of inputs with this number."""
    backward: Callable[[int], Any]
    """Computes only dq, dk and dv for that set; the forward pass ran before."""
    wait: Callable[[Any], None]
    """Waits until the device has computed what a pass returned."""
    to_jax: Callable[[Any], jax.Array]
    """Turns an array that a pass returned into one of JAX, in the layout of `Inputs`."""


class JaxSystem:
    """Attention by a function of q, k, v and segments that JAX differentiates."""

    def __init__(self, attend: Callable, sets: int | None = None):
        self.attend, self.sets = attend, sets

    def compile(self, inputs: Inputs) -> None:
        """Compiles all programs; may run in a thread."""
        forward = jax.jit(self.attend)

        def save(q, k, v, segments):
            return jax.vjp(lambda q, k, v: self.attend(q, k, v, segments), q, k, v)

        # The pullback is a pytree of what the forward pass saved. It is handed from one program to
        # the next, so that the backward pass can be timed alone.
        traced = jax.jit(save).trace(*self._operands(inputs))
        saved, tree = jax.tree.flatten(traced.out_info[1])

        def backward(saved, do):
            return jax.tree.unflatten(tree, saved)(do)

        self.forward = forward.lower(*self._operands(inputs)).compile()
        self.save = traced.lower().compile()
        self.backward = jax.jit(backward).lower(saved, inputs.do_BTNH).compile()

    def prepare(self, sets: list[Inputs]) -> Run:
        """Runs the forward passes, so that their backward passes can be timed."""
        sets = sets[: self.sets]
        operands = [self._operands(inputs) for inputs in sets]
        saved = [jax.tree.leaves(self.save(*x)[1]) for x in operands]
        return Run(
            lambda i: self.forward(*operands[i % len(sets)]),
            lambda i: self.backward(saved[i % len(sets)], sets[i % len(sets)].do_BTNH),
            jax.block_until_ready,
            lambda x: x,
        )

    @staticmethod
    def _operands(inputs):
        return inputs.q_BTNH, inputs.k_BTKH, inputs.v_BTKH, inputs.segments_BT


class TorchSystem:
    """PyTorch's scaled_dot_product_attention by one of its backends, on the memory of JAX."""

    def __init__(self, backend: str):
        import torch
        from torch.nn.attention import SDPBackend

        if jax.default_backend() == "gpu" and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch has no CUDA")
        self.backend = getattr(SDPBackend, backend)

    def compile(self, inputs: Inputs) -> None:
        if inputs.segments_BT is not None:
            raise NotImplementedError("takes no documents")

    def prepare(self, sets: list[Inputs]) -> Run:
        import torch
        from torch.nn.attention import sdpa_kernel

        def to_torch(x_BTNH):
            # A view of the shape (B, N, T, H), over memory whose order stays (B, T, N, H).
            return torch.from_dlpack(x_BTNH).transpose(1, 2)

        def attend(q, k, v):
            with sdpa_kernel(self.backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
                )

        qkvs = [[to_torch(x).requires_grad_() for x in inputs[:3]] for inputs in sets]
        outputs = [attend(*qkv) for qkv in qkvs]
        dos = [to_torch(inputs.do_BTNH) for inputs in sets]

        @torch.no_grad()
        def forward(i):
            return attend(*qkvs[i % len(sets)])

        def backward(i):
            i %= len(sets)
            return torch.autograd.grad(outputs[i], qkvs[i], dos[i], retain_graph=True)

        def wait(_):
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        def to_jax(x_BNTH):
            x_BTNH = x_BNTH.transpose(1, 2).contiguous()
            wait(x_BTNH)  # JAX works on another stream
            return jnp.from_dlpack(x_BTNH)

        return Run(forward, backward, wait, to_jax)


def _ours(backend, q, k, v, segments):
    return attention(q, k, v, segment_ids=segments, backend=backend)


def _tokamax(implementation: str) -> Callable:
    if implementation == "mosaic_gpu" and (
        jax.default_backend() != "gpu" or float(jax.devices()[0].compute_capability) < 9
    ):
        raise RuntimeError("aborts the process before Hopper")
    try:
        import xprof  # noqa: F401
    except ImportError:
        # Tokamax imports it for timers that are not used here.
        tools = types.ModuleType("xprof.cli.tools")
        tools.get_kernel_stats_tool = None
        for name in ("xprof", "xprof.cli"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["xprof.cli.tools"] = tools
    from tokamax._src.ops.attention.api import IMPLEMENTATIONS
    from tokamax._src.ops.attention.base import Mask

    def attend(q, k, v, segments):
        first_B1T = None
        if segments is not None:
            # Given the first key that each query sees, it skips blocks of keys. Its public function
            # takes only a (T, T) mask, with which it cannot skip.
            changes_BT = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
            starts_BT = jnp.where(changes_BT, jnp.arange(segments.shape[1]), 0)
            first_B1T = jax.lax.cummax(starts_BT, axis=1)[:, None]
        mask = Mask(k_start=first_B1T, is_causal=True)
        return IMPLEMENTATIONS[implementation](q, k, v, mask=mask)

    return attend


OURS = ("pallas", "triton")
# Name in the table -> function that makes the system. It is called only if the system is asked for;
# what it raises is shown in the row of the system.
SYSTEMS: dict[str, Callable[[], JaxSystem | TorchSystem]] = {
    "pallas": lambda: JaxSystem(functools.partial(_ours, "pallas")),
    "triton": lambda: JaxSystem(functools.partial(_ours, "triton")),
    "cudnn": lambda: JaxSystem(functools.partial(_ours, "cudnn")),
    # One set of inputs is enough: its scores are many times the cache, and three would not fit.
    "reference": lambda: JaxSystem(functools.partial(_ours, "reference"), sets=1),
    "tokamax mosaic_gpu": lambda: JaxSystem(_tokamax("mosaic_gpu")),
    "tokamax triton": lambda: JaxSystem(_tokamax("triton")),
    "torch flash": lambda: TorchSystem("FLASH_ATTENTION"),
    "torch cudnn": lambda: TorchSystem("CUDNN_ATTENTION"),
}
