"""Commands that measure what the project claims about itself.

Each is run from the project's folder by the name of its module, and `--help` lists its options:

    python -m benchmarks.step.training

- step/: the training step, its speed beside PyTorch's, where its time goes, what it learns;
- kernels/: the attention kernels, and what the device reaches on products and copies;
- data/: preparing corpora and reading datasets;
- generation.py: generating text beside transformers;
- card/: a smoke test for a rented GPU, and a rehearsal of gpu.sh without one;
- gpu.sh: everything that needs a GPU, in stages, by one command;
- running.py: models, worker processes and result files, which all of them share;
- results/: the tables that were measured, by date.
"""
