"""`tinyllama tokenizer`."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from tinyllama_jax.errors import ExitCode, UserError


@dataclasses.dataclass(frozen=True)
class TokenizerOptions:
    """Train a sentencepiece tokenizer (BPE, byte fallback, Llama's ids)."""

    files: Positional[tuple[str, ...]]
    """Text files; the name `stdlib` stands for the embedded corpus (its training split)."""
    vocab_size: int
    """Number of pieces."""
    out: Path = Path("tokenizer.model")
    """Where the model goes."""


def tokenizer(options: TokenizerOptions) -> int:
    """Trains and writes the tokenizer.

    Raises:
      UserError: a file that is not UTF-8 text, or too little text for so many pieces.
    """
    from tinyllama_jax.data.tokenizer import train_tokenizer
    from tinyllama_jax.preparation.library import standard_library

    texts = []
    for file in options.files:
        if file == "stdlib":
            sources = standard_library().values()
            texts += [document.text for splits in sources for document in splits["train"]]
            continue
        try:
            texts.append(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as UTF-8 text ({error}).") from None
    train_tokenizer(texts, options.vocab_size, options.out)
    print(f"{options.out}: {options.vocab_size:,} pieces")
    return ExitCode.DONE
