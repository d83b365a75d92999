"""`tinyllama prepare`."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tinyllama_jax.errors import ExitCode, require

Corpus = Literal["slimpajama", "starcoder", "fineweb-edu", "tinystories", "files", "tokens"]


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Turn raw text, or files of token ids, into datasets that `train` reads."""

    dataset: Positional[Literal["stdlib", Corpus]]
    """`stdlib`: the standard library of this Python, as two sources, prose and code.
    `files`: a folder of .jsonl, .jsonl.zst, .jsonl.gz, .parquet, .txt and source code.
    `tokens`: a folder of .bin and .npy files of ids of this tokenizer: TinyLlama's packed files,
    NumPy arrays, or ids without a header.
    The others: a folder in the layout in which that corpus is published."""
    tokenizer: Path
    """A sentencepiece model."""
    out: Path
    """Folder to make: the dataset, or for `stdlib` one subfolder each."""
    source: Path | None = None
    """Folder that holds the corpus."""
    field: str | None = None
    """For `files`: the field with a row's text, `text` by default; dots lead further in."""
    drop: tuple[str, ...] = ()
    """For `files`: FIELD=VALUE of rows to leave out."""
    dtype: Literal["uint16", "uint32"] | None = None
    """For `tokens`: the type of ids in files without a header, uint16 by default."""
    held_out: float | None = None
    """Share of documents for validation where a corpus has none; 0.005 by default."""
    worker: str | None = None
    """i/n: do the groups of files whose number mod n is i, on a cluster. All see --out; a call
    that finds no group missing joins them."""
    processes: int | None = None
    """Processes on this machine; by default one a core, and one for `stdlib`."""
    on_error: Literal["stop", "skip"] = "stop"
    """Bad input stops, or is left out and counted in the manifest."""
    best_fit: int | None = None
    """Tokens of a row, the model's context: documents that fit one are never cut, and what is left
    of a row is padded. By default documents are concatenated."""
    runner: str | None = None
    """Apache Beam does the groups, on this runner of its own; DirectRunner is this machine. Its
    workers see all paths as this process does."""
    beam_options: tuple[str, ...] = ()
    """NAME=VALUE of Beam's pipeline options, such as direct_num_workers=8
    direct_running_mode=multi_processing."""


def prepare(options: PrepareOptions) -> int:
    """Writes the dataset, goes on with one that was begun, or leaves a complete one alone.

    Raises:
      UserError: options that do not belong together, or a corpus, tokenizer or folder that does not
        serve.
    """
    from tinyllama_jax.data.format import read_manifest
    from tinyllama_jax.preparation.corpus import open_corpus, parse_worker, prepare_corpus, summary
    from tinyllama_jax.preparation.library import prepare_standard_library
    from tinyllama_jax.preparation.workers import sigterm_as_interrupt

    tokenizer, out = options.tokenizer, options.out
    if options.dataset == "stdlib":
        taken = PrepareOptions(
            "stdlib", tokenizer, out, processes=options.processes, best_fit=options.best_fit
        )
        require(
            options == taken,
            "`prepare stdlib` takes --tokenizer, --out, --processes and --best-fit: leave the rest "
            "out.",
        )
        try:
            with sigterm_as_interrupt():
                folders = prepare_standard_library(
                    tokenizer, out, processes=options.processes or 1, best_fit=options.best_fit
                )
        except KeyboardInterrupt:
            print("Stopped; the same command goes on.", file=sys.stderr)
            return ExitCode.SAVED
        for name, folder in folders.items():
            print(f"{folder}: {name}, {summary(read_manifest(folder))}")
        return ExitCode.DONE
    require(
        options.source is not None, f"Give the folder that holds {options.dataset} as --source."
    )
    assert options.source
    corpus = open_corpus(
        options.dataset, options.field, options.drop, options.dtype, options.held_out
    )
    try:
        with sigterm_as_interrupt():
            manifest = prepare_corpus(
                options.dataset.replace("-", "_"),  # TFDS's names have no hyphens
                corpus,
                options.source,
                tokenizer,
                out,
                worker=parse_worker(options.worker) if options.worker else (0, 1),
                processes=options.processes,
                on_error=options.on_error,
                best_fit=options.best_fit,
                runner=options.runner,
                beam_options=options.beam_options,
            )
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return ExitCode.SAVED
    print(f"{out}: {summary(manifest) if manifest else 'groups of other workers are missing'}")
    return ExitCode.DONE
