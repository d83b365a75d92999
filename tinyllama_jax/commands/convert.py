"""`tinyllama convert`."""

import dataclasses
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tinyllama_jax.errors import ExitCode, require


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Export a model for PyTorch or llama.cpp."""

    path: Positional[Path]
    """A run, a Hugging Face folder, or a .pth of the original TinyLlama."""
    out: Positional[Path]
    """What to make, a folder or a .gguf; an earlier export is replaced."""
    to: Literal["hf", "gguf"]
    """`hf`: a folder that transformers opens. `gguf`: a file for llama.cpp, in fp16."""
    step: int | Literal["all"] | None = None
    """Checkpoint to take, the newest by default; `all`: each into a folder of its own below `out`,
    such as step-50k-token-105B."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in `hf`; float32 by default."""
    max_shard_size: str | None = None
    """Largest file of weights in `hf`, such as 500MB; 5GB by default."""
    config: str | None = None
    """Config with the model of a .pth, such as tinyllama_1b."""
    tokenizer: Path | None = None
    """The tokenizer.model of a .pth, or of a Hugging Face folder that has none."""
    check: bool = False
    """Load it back with transformers and compare logits."""


def convert(options: ConvertOptions) -> int:
    """Writes the export, and returns whether its logits are those of the model, if compared.

    Raises:
      UserError: nothing to convert there, a path in the way, or options that do not belong
        together.
    """
    from tinyllama_jax.conversion import convert as conversion
    from tinyllama_jax.training.metrics import FILE, read_metrics

    path, out, to = options.path, options.out, options.to
    require(
        to == "hf" or not (options.check or options.dtype or options.max_shard_size),
        "--check, --dtype and --max-shard-size are for --to hf: leave them out.",
    )
    dtype = options.dtype or "float32"
    max_shard_bytes = conversion.parse_bytes(options.max_shard_size or "5GB")
    metrics = read_metrics(path) if (path / FILE).is_file() else {}
    if options.step == "all":
        require(
            not (options.config or options.tokenizer),
            f"{path}: --step all is for runs, which tell the rest.",
        )
        models = conversion.all_steps(path, out, to, metrics)
    else:
        model = conversion.open_model(
            path, options.step, options.config, options.tokenizer, metrics
        )
        models = [(model, out)]
    passed = True
    for model, where in models:
        difference = conversion.convert(model, where, to, dtype, max_shard_bytes, options.check)
        print(f"{where}: {model.config.parameters():,} parameters")
        if difference is not None:
            within = difference <= conversion.TOLERANCE
            passed &= within
            limit = f"({'within' if within else 'ABOVE'} {conversion.TOLERANCE:.0e})"
            print(f"largest logit difference to transformers: {difference:.2e} {limit}")
    return ExitCode.DONE if passed else ExitCode.FAILED
