"""`tinyllama verify`."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from tinyllama_jax.errors import ExitCode


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """Check a dataset, a run or an export: hashes, counts, shapes, values."""

    path: Positional[Path]
    """A folder that `prepare`, `train` or `convert` made; or any Hugging Face Llama."""


def verify(options: VerifyOptions) -> int:
    """Prints a line for each damage, and returns whether there is none.

    Raises:
      UserError: a folder that is none of the three.
    """
    from tinyllama_jax.conversion import huggingface
    from tinyllama_jax.preparation.verify import verify_dataset
    from tinyllama_jax.runtime.checkpoint import is_run, verify_run

    path = options.path
    if huggingface.is_hf_folder(path):
        bad = huggingface.verify_export(path)
    else:
        bad = verify_run(path) if is_run(path) else verify_dataset(path)
    for line in bad:
        print(f"{path}: {line}")
    if not bad:
        print(f"{path}: whole")
    return ExitCode.FAILED if bad else ExitCode.DONE
