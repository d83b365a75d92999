"""Trains TinyLlama 1.1B on 3 trillion tokens: the original run.

How to run it, on two nodes of eight A100, each with the options --coordinator HOST:PORT
--num-processes 2 --process-id K, where K is 0 on HOST and 1 on the other node:
    python launch/a100_16.py configs/tinyllama_1b.py
or under Slurm:
    sbatch launch/slurm/a100_16.sbatch configs/tinyllama_1b.py

It reads data/slimpajama, without its GitHub rows, and data/starcoder. `tinyllama prepare` writes
both, under these names, with the Llama 2 tokenizer at data/llama2/tokenizer.model.

What to expect: 1,430,512 steps of 2,097,152 tokens, 3.0000e12 tokens in all. The learning rate is
3.990e-4 at step 50,000, 3.094e-4 at 480,000, 1.298e-4 at 955,000 and 4e-5 at the end. The original
took 90 days on 16 A100-40GB at 24,000 tokens/s on each, with 8 rows on a GPU at a time.
`tinyllama plan configs/tinyllama_1b.py --mesh a100_16` predicts this code's memory and time there.
On one H100 it was measured at 80,974 tokens/s, with 64 rows in a step and 16 rows at a time
(benchmarks/results/2026-11-27-training-1b-NVIDIA-H100-80GB-HBM3.md).

The original published these scores (zero-shot, lm-evaluation-harness; the mean is of HellaSwag,
OBQA, WinoGrande, ARC-c, ARC-e, BoolQ and PIQA; arXiv 2401.02385 and its repository). This code has
not trained the model to the end.

    step       50k    240k   480k   715k   955k   1195k  1431k
    tokens     103B   503B   1.0T   1.5T   2.0T   2.5T   3.0T
    HellaSwag  43.50  49.56  52.54  53.68  54.63  58.96  59.20
    mean       46.11  48.28  50.22  51.29  51.64  53.86  52.99
"""

from tinyllama_jax.config import (
    TINYLLAMA_1B,
    CheckpointConfig,
    Config,
    DataConfig,
    ExecutionConfig,
    OptimizerConfig,
    SampleConfig,
    SourceConfig,
    ValidationConfig,
)


def get_config() -> Config:
    return Config(
        run_folder="runs/tinyllama_1b",
        model=TINYLLAMA_1B,
        data=DataConfig(
            sources=(
                SourceConfig("slimpajama", "data/slimpajama", 0.693584),
                SourceConfig("starcoder", "data/starcoder", 0.306416),
            ),
            tokenizer="data/llama2/tokenizer.model",
        ),
        steps=1_430_512,
        batch_rows=1024,
        micro_batches=8,  # each of 128 rows, which are 8 on each of 16 GPUs
        optimizer=OptimizerConfig(peak_lr=4e-4, end_lr=4e-5, warmup_steps=2000),
        execution=ExecutionConfig(recompute="elementwise"),
        # The original saved only every 5,000 steps, about eight hours of 16 GPUs, and a crash lost
        # all that came after. Its released checkpoints are among the permanent ones here.
        checkpoint=CheckpointConfig(every=500, permanent_every=5000),
        validation=ValidationConfig(every=5000),
        sample=SampleConfig(every=5000),
    )
