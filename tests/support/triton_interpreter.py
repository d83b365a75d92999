"""The Triton kernels on a CPU: Triton's interpreter in the place of jax-triton's launch."""

import contextlib
import math
import threading
import unittest.mock

import jax
import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from tinyllama_jax.model import triton_kernels

LOCK = threading.Lock()  # XLA may run two callbacks at once; the interpreter's state is global


@contextlib.contextmanager
def interpreted():
    """Inside, `triton_kernels` run on the CPU; they still compile for a GPU outside."""
    with unittest.mock.patch.object(triton_kernels, "_run", _run):
        yield


def _run(kernel, tile, compute_capability, grid, inputs, outputs, constants):
    blocks = [block for _, block in inputs]

    def callback(*arrays):
        results = [_tensor(np.full(out.shape, math.nan, out.dtype)) for out in outputs]
        operands = [_tensor(array) for array in arrays]
        for index, block in enumerate(blocks):
            if block is not None:
                operands[index] = TensorDescriptor.from_tensor(operands[index], list(block))
        with LOCK, _python_functions():
            function = interpreter.InterpretedFunction(kernel.fn)
            function[grid](*operands, *results, **constants)
        return [_array(result) for result in results]

    return jax.pure_callback(callback, outputs, *(array for array, _ in inputs))


@contextlib.contextmanager
def _python_functions():
    """Calls of `triton.jit` functions inside a kernel run as Python.

    Triton itself sees to it where TRITON_INTERPRET is set before it is imported, and then cannot
    compile. `tl.max.fn` stands for Triton's own library, which has the language under another name.
    """
    builder = interpreter.InterpreterBuilder
    plain_dot = builder.create_dot

    def call(function, *args, **kwargs):
        return interpreter.InterpretedFunction(function.fn).rewrite()(*args, **kwargs)

    def dot(self, a, b, *args):
        """Triton 3.9 multiplies the bits of bf16 as if they were integers."""
        if a.dtype == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return plain_dot(self, a, b, *args)

    scope = interpreter._patch_lang(tl.max.fn)
    try:
        with (
            unittest.mock.patch.object(triton.JITFunction, "__call__", call),
            unittest.mock.patch.object(builder, "create_dot", dot),
        ):
            yield
    finally:
        scope.restore()


def _tensor(array):
    import torch

    array = np.array(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
