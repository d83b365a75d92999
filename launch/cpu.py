"""Trains CONFIG on the CPU: python launch/cpu.py configs/demo.py [--option value ...]"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from tinyllama_jax.cli import main  # noqa: E402 (the platform is chosen before jax is imported)

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
