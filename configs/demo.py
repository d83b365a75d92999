"""A Llama of 5 million parameters on the standard library of the running Python.

Run:     make train      (or: tinyllama train configs/demo.py)
Needs:   data/demo, written by `tinyllama prepare stdlib` (the Makefile does)
"""

from tinyllama_jax.config import (
    DEMO,
    CheckpointConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    SampleConfig,
    SourceConfig,
    ValidationConfig,
)


def get_config() -> Config:
    return Config(
        run_folder="runs/demo",
        model=DEMO,
        data=DataConfig(
            sources=(
                SourceConfig("prose", "data/demo/prose", 0.7),
                SourceConfig("code", "data/demo/code", 0.3),
            ),
            tokenizer="data/demo/tokenizer.model",
        ),
        steps=300,
        batch_rows=16,
        optimizer=OptimizerConfig(peak_lr=3e-3, end_lr=3e-4, warmup_steps=30),
        checkpoint=CheckpointConfig(every=100, keep=2),
        validation=ValidationConfig(every=100, rows=32),
        sample=SampleConfig(every=100, prompts=("The", "def "), max_tokens=48),
    )
