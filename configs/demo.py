"""Trains a Llama of 3.2 million weights on the standard library of the Python that runs it.

How to run it: `make train` prepares the data, trains, exports and samples. Training alone is
    tinyllama train configs/demo.py

It reads data/demo, which `tinyllama prepare stdlib` writes.

What to expect: 400 steps, 819,200 tokens in all, in about 2 minutes on two CPU cores. With Python
3.11.7 the held-out loss ends at 4.592 on prose and 4.160 on code, in nats per token. Another Python
is another corpus and gives other losses. The README compares them with simpler models.
"""

import dataclasses

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
        steps=400,
        batch_rows=8,
        # The arrays of half the rows fit into a laptop's caches, which makes two halves faster than
        # the whole. The gradients are the same.
        micro_batches=2,
        optimizer=OptimizerConfig(peak_lr=3e-3, end_lr=3e-4, warmup_steps=40),
        checkpoint=CheckpointConfig(every=100, keep=2, permanent_every=200),
        validation=ValidationConfig(every=150, rows=32),
        sample=SampleConfig(every=150, prompts=("The", "def"), max_tokens=48),
    )


def own_text() -> Config:
    """The demo's model and recipe on text of your own: `tinyllama train configs/demo.py:own_text`.

    It reads data/own and data/own.model, which docs/data.md says how to make.
    """
    demo = get_config()
    return dataclasses.replace(
        demo,
        run_folder="runs/own",
        data=DataConfig(sources=(SourceConfig("own", "data/own"),), tokenizer="data/own.model"),
        sample=dataclasses.replace(demo.sample, prompts=("The",)),
    )
