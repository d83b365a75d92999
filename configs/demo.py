"""A Llama of 3.2 million parameters on the standard library of the running Python.

Run:     make train
         (which ends in: tinyllama train configs/demo.py)
Reads:   data/demo, written by `tinyllama prepare stdlib`
Expect:  the README's table "What the demo reaches"
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
        micro_batches=2,  # half the rows at a time stay in a laptop's caches
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
