"""Trains TinyLlama 1.1B for code further, with 8,192 tokens of context.

How to run it, on two nodes of eight A100, each with the options --coordinator HOST:PORT
--num-processes 2 --process-id K, where K is 0 on HOST and 1 on the other node:
    python launch/a100_16.py configs/tinyllama_code_8k.py

It starts with the newest weights of configs/tinyllama_1b.py's run. To start with the released ones,
give a Hugging Face folder: --init-from data/TinyLlama-1.1B-3T. It reads data/starcoder as prepared
for the 3T run. The same records serve every context, so nothing is prepared again.

What to expect: 5,000 steps of 2,097,152 tokens, 1.0486e10 tokens in all. No score was measured.

The model is the original's: the context is four times as long, and RoPE's positions are divided by
4. The original's length, data and learning rate are not known. The length and the choice of code
alone are this project's; batch, optimizer and learning rate are taken from the 3T run.
"""

from tinyllama_jax.config import (
    TINYLLAMA_CODE_8K,
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
        run_folder="runs/tinyllama_code_8k",
        model=TINYLLAMA_CODE_8K,
        data=DataConfig(
            sources=(SourceConfig("starcoder", "data/starcoder"),),
            tokenizer="data/llama2/tokenizer.model",
        ),
        init_from="runs/tinyllama_1b",
        steps=5000,
        batch_rows=256,  # as many tokens as the 3T run's 1,024 rows of 2,048
        # Each is of 32 rows, which are 2 on each of 16 GPUs: as many tokens as 8 rows of 2,048.
        micro_batches=8,
        optimizer=OptimizerConfig(peak_lr=4e-4, end_lr=4e-5, warmup_steps=500),
        execution=ExecutionConfig(recompute="elementwise"),
        checkpoint=CheckpointConfig(every=500, permanent_every=1000),
        validation=ValidationConfig(every=500, rows=128),
        sample=SampleConfig(every=500, prompts=("def", "#include")),
    )
