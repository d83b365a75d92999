"""Trains on the CPU: python launch/cpu.py CONFIG [--option value ...]"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from tinyllama_jax.cli import launch  # noqa: E402 (the platform is chosen before jax is imported)

if __name__ == "__main__":
    sys.exit(launch())
