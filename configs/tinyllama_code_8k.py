"""TinyLlama 1.1B for code, 8,192 tokens of context: RoPE positions divided by 4.

Run:     python launch/a100_16.py configs/tinyllama_code_8k.py
         on both nodes with --coordinator HOST:PORT --num-processes 2 --process-id K (0 on HOST)
         after configs/tinyllama_1b.py, whose newest weights it begins with; from the released
         ones, give a Hugging Face folder: --init-from data/TinyLlama-1.1B-3T
Reads:   data/starcoder, as configs/tinyllama_1b.py does; the records of the 3T run serve
         any context, so nothing is prepared again
Expect:  5,000 steps of 2,097,152 tokens, 1.0486e10 in all. Model, context and RoPE factor are the
         original's. Its length, data and learning rate are not known here: the length and code
         alone are this project's choice, and batch, optimizer, peak and end rate are the 3T run's
         value taken over. No score was measured.
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
        batch_rows=256,  # as many tokens as 1,024 rows of 2,048
        micro_batches=8,  # of 32 rows: 2 on each of 16 GPUs, as many tokens as 8 of 2,048
        optimizer=OptimizerConfig(peak_lr=4e-4, end_lr=4e-5, warmup_steps=500),
        execution=ExecutionConfig(recompute="elementwise"),
        checkpoint=CheckpointConfig(every=500, permanent_every=1000),
        validation=ValidationConfig(every=500, rows=128),
        sample=SampleConfig(every=500, prompts=("def", "#include")),
    )
