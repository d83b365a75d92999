"""TinyLlama 1.1B on 3 trillion tokens: the original run.

Run:     python launch/a100_16.py configs/tinyllama_1b.py
         on both nodes with --coordinator HOST:PORT --num-processes 2 --process-id K (0 on HOST)
         or, under Slurm, sbatch launch/slurm/a100_16.sbatch configs/tinyllama_1b.py
Reads:   data/slimpajama (without its GitHub rows) and data/starcoder, written by `tinyllama
         prepare` of the same names with the Llama 2 tokenizer, data/llama2/tokenizer.model
Expect:  1,430,512 steps of 2,097,152 tokens, 3.0000e12 in all. The learning rate is 3.990e-4 at
         step 50,000, 3.094e-4 at 480,000, 1.298e-4 at 955,000 and 4e-5 at the end. The original
         took 90 days on 16 A100-40GB at 24,000 tokens/s each, 8 rows a GPU and micro-batch.

What the original published (zero-shot, lm-evaluation-harness, mean of HellaSwag, OBQA, WinoGrande,
ARC-c, ARC-e, BoolQ and PIQA; arXiv 2401.02385 and its repository). This code has not trained it.

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
        micro_batches=8,  # of 128 rows: 8 on each of 16 GPUs
        optimizer=OptimizerConfig(peak_lr=4e-4, end_lr=4e-5, warmup_steps=2000),
        execution=ExecutionConfig(recompute="elementwise"),
        # The original saved every 5,000 steps alone, and lost what came after.
        checkpoint=CheckpointConfig(every=500, permanent_every=5000),
        validation=ValidationConfig(every=5000),
        sample=SampleConfig(every=5000),
    )
