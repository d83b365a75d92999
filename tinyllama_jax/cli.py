"""The command `tinyllama`, and what the launch scripts call."""

import importlib.metadata
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tinyllama_jax.commands.convert import ConvertOptions, convert
from tinyllama_jax.commands.evaluate import EvaluateOptions, evaluate
from tinyllama_jax.commands.generate import GenerateOptions, generate
from tinyllama_jax.commands.options import list_verbs, read_options
from tinyllama_jax.commands.plan import PlanOptions, plan
from tinyllama_jax.commands.prepare import PrepareOptions, prepare
from tinyllama_jax.commands.tokenizer import TokenizerOptions, tokenizer
from tinyllama_jax.commands.train import TrainOptions, train
from tinyllama_jax.commands.verify import VerifyOptions, verify
from tinyllama_jax.errors import ExitCode, UserError, require
from tinyllama_jax.runtime.allocator import take_card

VERBS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "train": (TrainOptions, train),
    "plan": (PlanOptions, plan),
    "prepare": (PrepareOptions, prepare),
    "tokenizer": (TokenizerOptions, tokenizer),
    "verify": (VerifyOptions, verify),
    "convert": (ConvertOptions, convert),
    "generate": (GenerateOptions, generate),
    "eval": (EvaluateOptions, evaluate),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Carries out one verb and returns an `ExitCode`; a user error becomes one line on stderr.

    Args:
      argv: the command line, the process's own by default.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"tinyllama VERB ...\n\n{list_verbs({verb: VERBS[verb][0] for verb in VERBS})}\n")
        print("tinyllama VERB --help tells a verb's options; tinyllama --version, the version.")
        return ExitCode.DONE if argv else ExitCode.USER_ERROR
    if argv[0] == "--version":
        print("tinyllama-jax", importlib.metadata.version("tinyllama-jax"))
        return ExitCode.DONE
    _set_up_libraries()
    try:
        require(argv[0] in VERBS, f"There is no verb {argv[0]!r}: {', '.join(VERBS)}.")
        options, command = VERBS[argv[0]]
        return command(read_options(options, argv[0], argv[1:]))
    except UserError as error:
        return _refuse(error)


def launch(devices: int | None = None) -> int:
    """Does what `tinyllama train` does with this command line, on so many devices in all."""
    _set_up_libraries()
    try:
        return train(read_options(TrainOptions, "train", sys.argv[1:]), devices)
    except UserError as error:
        return _refuse(error)


def _set_up_libraries() -> None:
    # They warn of what is meant: a folder opened for reading, a dataset without homepage, a
    # metric's defaults.
    for library in ("absl", "lm_eval"):
        logging.getLogger(library).setLevel(logging.ERROR)
    take_card()  # whatever the verb: each may be what uses the GPU


def _refuse(error: UserError) -> int:
    print(f"tinyllama: {error}", file=sys.stderr)
    return ExitCode.USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
