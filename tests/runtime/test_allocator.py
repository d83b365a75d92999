"""The share of a GPU that JAX takes; and memory that is freed stays with the process."""

import os
import subprocess
import sys

import pytest

from support.paths import ROOT
from tinyllama_jax.config_file import load_config
from tinyllama_jax.planning.plan import plan
from tinyllama_jax.runtime.allocator import CARD_SHARE

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
    """Page faults of the third array of 64 MB, which is 16,384 pages."""
    command = [sys.executable, "-c", WORK, mode]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(shown.stdout)


def test_an_array_finds_the_pages_of_the_one_before():
    assert new_pages("free") > 16_000
    assert new_pages("keep") < 100


SHARE = """
import sys
from tinyllama_jax import cli
from tinyllama_jax.commands.verify import VerifyOptions

# What JAX tells CUDA's allocator, asked for when its devices are.
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

def verb(options):
    print(generate_pjrt_gpu_plugin_options()["memory_fraction"])
    return 0

cli.VERBS["verify"] = VerifyOptions, verb
sys.exit(cli.main(["verify", "."]))
"""


@pytest.mark.parametrize(
    ("named", "share"),
    [
        ({}, CARD_SHARE),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, 0.5),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}, 0.4),  # the older name
    ],
)
def test_jax_takes_the_share_of_a_card_that_a_plan_counts_with(named, share):
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    env = {name: value for name, value in os.environ.items() if name not in names} | named
    command = [sys.executable, "-c", SHARE]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert float(shown.stdout) == share


def test_a_plan_counts_with_it():
    config = load_config(str(ROOT / "configs" / "tinyllama_120m.py"))
    found = plan(config, "a100_1", compiler=False)
    assert found.usable_bytes_per_device == int(CARD_SHARE * found.card_bytes)
