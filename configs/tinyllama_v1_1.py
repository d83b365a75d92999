"""Trains TinyLlama v1.1 on 2 trillion tokens, in three variants: general, math and code, Chinese.

How to run it, on two nodes of eight A100, each with the options --coordinator HOST:PORT
--num-processes 2 --process-id K, where K is 0 on HOST and 1 on the other node:
    python launch/a100_16.py configs/tinyllama_v1_1.py
    python launch/a100_16.py configs/tinyllama_v1_1.py:math_and_code
    python launch/a100_16.py configs/tinyllama_v1_1.py:chinese

It reads data/slimpajama. Math and code also reads data/starcoder and data/proof_pile, and Chinese
also reads data/skypile. All are prepared as configs/tinyllama_1b.py describes.

What to expect: 1,047,307 steps, 2.0000e12 tokens in all, in three stages. Up to 1.5e12 tokens,
every variant reads the same rows of SlimPajama alone. Up to 1.85e12 tokens it reads the variant's
own mixture, whose weights are reached by a ramp over the first 6e9 tokens. The last stage, the
cooldown, keeps the mixture and makes batches four times as large.

Stages, weights and batches of about 1.8M and 7.2M tokens are from the v1.1 model cards; 880 rows
are this project's reading of "about 1.8M". No source gives the rest of v1.1's recipe, so warm-up,
learning rates, the cosine to the last step and the optimizer are taken from the 3T run.

The original published these scores for v1.1 at 2.0T tokens: HellaSwag 61.47, OBQA 36.80, WinoGrande
59.43, ARC-c 32.68, ARC-e 55.47, BoolQ 55.99, PIQA 73.56, mean 53.63. This code has not trained it.
"""

from tinyllama_jax.config import (
    TINYLLAMA_1B,
    BatchStageConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ExecutionConfig,
    OptimizerConfig,
    SampleConfig,
    SourceConfig,
    StageConfig,
    ValidationConfig,
)

COOLDOWN_AFTER = 1_026_500  # the last step before 1.85e12 tokens


def get_config() -> Config:
    """The general variant, which reads SlimPajama throughout."""
    return _variant("general", {"slimpajama": 100})


def math_and_code() -> Config:
    """The variant for math and code."""
    return _variant("math_and_code", {"slimpajama": 75, "starcoder": 15, "proof_pile": 10})


def chinese() -> Config:
    """The variant for Chinese."""
    return _variant("chinese", {"slimpajama": 50, "skypile": 50})


def _variant(name: str, weights: dict[str, float]) -> Config:
    """A run that reads SlimPajama first and ends with these weights of the sources."""
    # A source of the last mixture has weight 0 before, so that all stages name the same sources.
    basic = {source: 100.0 if source == "slimpajama" else 0.0 for source in weights}
    ramp = StageConfig(
        start_tokens=1_500_000_000_000, weights=tuple(weights.values()), ramp_tokens=6_000_000_000
    )
    return Config(
        run_folder=f"runs/tinyllama_v1_1_{name}",
        model=TINYLLAMA_1B,
        data=DataConfig(
            sources=tuple(SourceConfig(s, f"data/{s}", weight) for s, weight in basic.items()),
            stages=() if weights == basic else (ramp,),
            tokenizer="data/llama2/tokenizer.model",
        ),
        steps=1_047_307,
        batch_rows=880,
        micro_batches=11,  # each of 80 rows, which are 5 on each of 16 GPUs
        batch_stages=(BatchStageConfig(after_step=COOLDOWN_AFTER, micro_batches=44),),
        optimizer=OptimizerConfig(peak_lr=4e-4, end_lr=4e-5, warmup_steps=2000),
        execution=ExecutionConfig(recompute="elementwise"),
        checkpoint=CheckpointConfig(every=500, permanent_every=5000),
        validation=ValidationConfig(every=5000),
        sample=SampleConfig(every=5000),
    )
