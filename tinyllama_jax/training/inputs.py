"""What a run reads: its tokenizer, its datasets, and the order in which their rows come."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from sentencepiece import SentencePieceProcessor

from tinyllama_jax.config import Config
from tinyllama_jax.data import mixture
from tinyllama_jax.data.rows import Rows
from tinyllama_jax.data.tokenizer import load_tokenizer
from tinyllama_jax.errors import require
from tinyllama_jax.runtime.mesh import check_fits
from tinyllama_jax.training.step import check_attention


class Inputs(NamedTuple):
    """Everything on disk that decides the numbers of a run."""

    tokenizer: SentencePieceProcessor
    names: list[str]
    """The sources' names; the lists below have their order."""
    train: list[Rows]
    held_out: list[Rows]
    order: mixture.Mixture
    """Which row of which source stands at each place of the training order."""
    fingerprint: dict[str, Any]
    """What must not change when the run goes on, see `mixture.fingerprint`."""

    def ledger(self, rows: int) -> dict[str, float]:
        """Metrics of what the first `rows` training rows hold, see `mixture.ledger`."""
        return mixture.ledger(self.names, self.order, self.train, rows)


def open_inputs(config: Config, mesh: Mesh) -> Inputs:
    """Opens all that the run reads.

    Raises:
      UserError: something that does not fit the config, or a config that does not fit the mesh.
    """
    check_fits(config, mesh)
    check_attention(config, mesh)
    tokenizer = load_tokenizer(config.data.tokenizer)
    require(
        tokenizer.get_piece_size() == config.model.vocab_size,
        f"The tokenizer {config.data.tokenizer} has {tokenizer.get_piece_size():,} pieces and "
        f"model.vocab_size is {config.model.vocab_size:,}: make them equal.",
    )
    for prompt in config.sample.prompts:
        length = len(tokenizer.encode(prompt))
        require(
            0 < length < config.model.context,
            f"The prompt {prompt[:40]!r} of sample.prompts has {length} tokens and model.context "
            f"is {config.model.context}: give one that is neither empty nor fills the context.",
        )
    require(len(config.data.sources) > 0, "data.sources is empty: name at least one dataset.")
    train, held_out = (
        [
            Rows(source.path, split, config.model.context, config.model.vocab_size)
            for source in config.data.sources
        ]
        for split in ("train", "validation")
    )
    fills = [rows.fill for rows in train]
    order = mixture.make_mixture(config.data, config.model.context, fills)
    mixture.check_epochs(config.data, order, train, config.rows_after(config.steps))
    return Inputs(
        tokenizer=tokenizer,
        names=[source.name for source in config.data.sources],
        train=train,
        held_out=held_out,
        order=order,
        fingerprint=mixture.fingerprint(config.data, config.model.context, config.seed),
    )


def batches_after(first_step: int, config: Config, inputs: Inputs) -> Iterator[np.ndarray]:
    """The batches of the steps after `first_step`: tokens (A, B, S) of this process's rows.

    A counts micro-batches, B rows and S = T + 1 tokens. Where the config changes the batch size on
    the way, the order of the rows goes on with batches of another shape.
    """
    sizes = config.batch_sizes()
    ends = [start for start, _ in sizes[1:]] + [config.steps]
    for (start, micro_batches), end in zip(sizes, ends, strict=True):
        start = max(start, first_step)
        if start >= end:
            continue
        batches = mixture.batches(
            inputs.train,
            inputs.order,
            seed=config.seed,
            start=config.rows_after(start),
            micro_batches=micro_batches,
            rows=config.micro_rows,
            process=jax.process_index(),
            processes=jax.process_count(),
        )
        yield from itertools.islice(batches, end - start)
