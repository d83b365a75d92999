"""How much of a GPU's memory JAX takes, and how the C library hands out that of a CPU."""

import ctypes
import os

# (parameter of glibc's malloc.h, value)
KEEP = (
    (-8, 1),  # M_ARENA_MAX: one heap, since those of further threads are too small for an array
    (-4, 0),  # M_MMAP_MAX: large arrays lie in it too
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: and it is not given back
)

# Of a GPU's memory: what JAX may take, and what `tinyllama plan` counts with. The rest is left to
# CUDA's context, to code, and to fragments.
CARD_SHARE = 0.9


def take_card() -> None:
    """JAX takes `CARD_SHARE` of a GPU's memory, where nobody has said otherwise: by itself it takes
    three quarters, with preallocation off too. To be called before JAX looks for devices."""
    # The second is the older name; JAX refuses both together.
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(CARD_SHARE)


def keep_memory() -> None:
    """What a step frees stays with this process, for the next step.

    XLA on CPUs allocates most arrays of a step anew. Large ones glibc returns to the kernel when
    they are freed, and the next step finds new pages, one by one, each to be filled with zeros.
    To be called before any thread is started. With a GPU, or another C library, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or os.path.exists("/dev/nvidia0"):
        return
    for parameter, value in KEEP:
        mallopt(parameter, value)
