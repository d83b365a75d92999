"""Memory settings: how much of a GPU's memory JAX takes, and how the C library keeps a CPU's."""

import ctypes
import os

# Pairs (parameter of glibc's malloc.h, value). Only all three together make a step faster.
KEEP = (
    # M_ARENA_MAX: one heap for all threads. Heaps of further threads are too small for large
    # arrays, which would be allocated from the kernel each time.
    (-8, 1),
    # M_MMAP_MAX: large arrays are allocated in the heap too, not by mmap.
    (-4, 0),
    # M_TRIM_THRESHOLD: freed memory at the end of the heap is not given back to the kernel.
    (-1, 2**31 - 1),
)

# The share of a GPU's memory that JAX may take, and that `tinyllama plan` reckons with. The rest is
# left to the CUDA context, to loaded code and to fragmentation.
CARD_SHARE = 0.9


def take_card() -> None:
    """Lets JAX take the share `CARD_SHARE` of a GPU's memory, unless the user has set one.

    JAX's own default is three quarters, also without preallocation. This must be called before JAX
    looks for devices.
    """
    # The second variable is the older name of the first. JAX refuses to start if both are set.
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(CARD_SHARE)


def keep_memory() -> None:
    """Makes the C library keep the memory that a step frees, for the next step.

    XLA on CPUs allocates most arrays of a step anew. By default glibc returns large arrays to the
    kernel when they are freed, and the next step has to get new pages, which the kernel fills with
    zeros one by one: about a tenth of a small model's step (LOG.md, 2026-11-25). Nothing changes if
    there is a GPU or if the C library is not glibc.

    This must be called before any other thread is started: a thread may already have a heap of its
    own by then.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # JAX is not asked for its devices, because that would start its threads.
    if mallopt is None or os.path.exists("/dev/nvidia0"):
        return
    for parameter, value in KEEP:
        mallopt(parameter, value)
