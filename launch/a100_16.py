"""Trains on two nodes of eight A100: python launch/a100_16.py CONFIG [--option value ...]

On each of the two nodes, with --process-id 0 on the first: python launch/a100_16.py CONFIG
--coordinator FIRST_NODE:PORT --num-processes 2 --process-id K. Under Slurm: slurm/a100_16.sbatch.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cuda")

from tinyllama_jax.cli import launch

if __name__ == "__main__":
    sys.exit(launch(devices=16))
