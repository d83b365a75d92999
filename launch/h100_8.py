"""Trains on the eight H100 of one node: python launch/h100_8.py CONFIG [--option value ...]"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cuda")

from tinyllama_jax.cli import launch

if __name__ == "__main__":
    sys.exit(launch(devices=8))
