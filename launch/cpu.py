"""Trains on the CPU: python launch/cpu.py CONFIG [--option value ...]"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from tinyllama_jax.cli import launch

if __name__ == "__main__":
    sys.exit(launch())
