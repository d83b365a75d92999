"""Memory that is freed stays with the process."""

import subprocess
import sys

WORK = """
import ctypes, resource, sys
from tinyllama_jax.runtime.allocator import keep_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "keep":
    keep_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = libc.malloc(2**26)
    libc.memset(array, 1, 2**26)
    libc.free(array)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(mode):
    """Of the third array of 64 MB, which is 16,384 pages."""
    command = [sys.executable, "-c", WORK, mode]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(shown.stdout)


def test_an_array_finds_the_pages_of_the_one_before():
    assert new_pages("free") > 16_000
    assert new_pages("keep") < 100
