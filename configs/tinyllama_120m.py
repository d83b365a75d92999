"""Trains TinyLlama 120M, the small sibling, on a hundredth of the 3T run's tokens.

How to run it, on a node of eight A100:
    python launch/a100_8.py configs/tinyllama_120m.py

It reads data/slimpajama and data/starcoder, prepared as configs/tinyllama_1b.py describes.

What to expect: 14,305 steps of 2,097,152 tokens, 3.0000e10 tokens in all. No score was measured.

The model is the original's, with 121,129,728 weights. The original published no run of it, so the
length is this project's choice, and the rest of the recipe is taken from the 3T run.
"""

from tinyllama_jax.config import (
    TINYLLAMA_120M,
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
        run_folder="runs/tinyllama_120m",
        model=TINYLLAMA_120M,
        data=DataConfig(
            sources=(
                SourceConfig("slimpajama", "data/slimpajama", 0.693584),
                SourceConfig("starcoder", "data/starcoder", 0.306416),
            ),
            tokenizer="data/llama2/tokenizer.model",
        ),
        steps=14_305,
        batch_rows=1024,
        micro_batches=32,  # each of 32 rows, which are 4 on each of 8 GPUs, or all on a single one
        optimizer=OptimizerConfig(peak_lr=4e-4, end_lr=4e-5, warmup_steps=2000),
        execution=ExecutionConfig(recompute="elementwise"),
        checkpoint=CheckpointConfig(every=500, permanent_every=5000),
        validation=ValidationConfig(every=1000),
        sample=SampleConfig(every=1000),
    )
