"""Generates text: continues prompts of any lengths with new tokens from a model.

Generation runs two compiled programs. The first reads all prompts at once and fills a cache of keys
and values. The second is a loop that adds `CHUNK` tokens to each row; the host calls it again and
again, and looks at the new tokens between two calls to see which rows have ended. The size of the
cache is fixed at the start, so nothing is compiled again as the texts grow.

Under `jax.set_mesh` each device generates its own rows and holds their part of the cache. Every
device has all weights, so the devices exchange nothing inside the loop, and a device can stop when
its own rows have ended.

Shapes: B rows, T tokens of the longest prompt with its padding, C = CHUNK, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import LlamaConfig
from tinyllama_jax.errors import require
from tinyllama_jax.inference.sampler import GREEDY, Sampler
from tinyllama_jax.model import decoding, llama
from tinyllama_jax.runtime.mesh import BATCH_AXES

CHUNK = 8  # new tokens per row in one call of the second program
# The sizes T and of the cache are this number times a power of two. A program is compiled for each
# pair of sizes, so few programs serve texts of all lengths.
SMALLEST = 32


def generate(
    config: LlamaConfig,
    weights: llama.Weights,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampler: Sampler = GREEDY,
    seed: int = 0,
    eos: int | None,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continues each prompt as if it were alone: the others change its result only by rounding.

    Args:
      config: the model.
      weights: in the dtype to compute in, and sharded in any way over the mesh that is set, if one
        is. For several calls, convert them once by `for_decoding`: every call would make a copy.
      prompts: token ids, at least one in each prompt.
      max_tokens: the largest number of new tokens of a row. A row also ends when prompt and new
        tokens together fill the context.
      sampler: how tokens are chosen.
      seed: makes samples reproducible. The random numbers for a token depend only on `seed + i`,
        where i is the index of the prompt, and on the position of the token in its text. So equal
        prompts get different texts, and prompt i by itself gets the same text from `seed + i`.
      eos: the token that ends a row and is not returned; None: no token does.
      stop: called with all new ids of a row after each new id; True ends the row with that id.

    Returns:
      The new ids of each row.

    Raises:
      UserError: a prompt is empty, holds an id outside the vocabulary, or fills the context;
        `max_tokens` is not above 0; or the seed does not fit 32 bits.
    """
    rows = [[] for _ in prompts]
    chunks = stream(
        config,
        weights,
        prompts,
        max_tokens=max_tokens,
        sampler=sampler,
        seed=seed,
        eos=eos,
        stop=stop,
    )
    for new in chunks:
        for row, ids in zip(rows, new, strict=True):
            row += ids
    return rows


def stream(
    config: LlamaConfig,
    weights: llama.Weights,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampler: Sampler = GREEDY,
    seed: int = 0,
    eos: int | None,
    stop: Callable[[list[int]], bool] | None = None,
) -> Iterator[list[list[int]]]:
    """Does the same as `generate`, but yields the new ids while it generates them.

    Takes the arguments of `generate` and raises the same errors. Yields a list with one list for
    each row, which holds the ids that are new since the last time.
    """
    require(max_tokens > 0, "--max-tokens must be above 0.")
    require(0 <= seed < 2**32, f"--seed must lie between 0 and {2**32 - 1}.")
    for prompt in prompts:
        _check(config, prompt)
    if not prompts:
        return
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    limits_B = np.minimum(max_tokens, config.context - lengths_B)
    T = _size(max(lengths_B))
    columns = _size(T + max(limits_B) - 1)  # the last token is never fed back to the model
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    # The batch is filled up with rows that belong to no prompt, so that the devices can divide it.
    B = -(-len(prompts) // devices) * devices
    # Their length is 1 and not 0, because the model reads the logits after the last token.
    lengths_B = np.pad(lengths_B, (0, B - len(prompts)), constant_values=1)
    tokens_BT = np.zeros((B, T), np.int32)
    for tokens_T, prompt in zip(tokens_BT, prompts, strict=False):
        tokens_T[: len(prompt)] = prompt
    # NumPy values of fixed dtypes: for Python numbers JAX would compile the programs once more.
    sampling = (
        (seed + np.arange(B)).astype(np.uint32),
        np.float32(sampler.temperature),
        np.int32(sampler.top_k),
        np.float32(sampler.top_p),
    )
    end = np.int32(-1 if eos is None else eos)

    weights = for_decoding(weights)
    newest_B, texts = _begin(config, columns, weights, tokens_BT, lengths_B, sampling)
    # `new` of the columns of new_BC hold new tokens; `column` is the next free one of the cache.
    new_BC, new, column = np.asarray(newest_B)[:, None], 1, T
    rows, open_B = [[] for _ in prompts], np.arange(B) < len(prompts)  # open: not ended
    while True:
        before = [len(row) for row in rows]
        for index, row in enumerate(rows):
            if open_B[index]:
                ids_C = new_BC[index, :new].tolist()
                open_B[index] = _extend(row, ids_C, limits_B[index], eos, stop)
        yield [row[start:] for row, start in zip(rows, before, strict=True)]
        if not open_B.any():
            return
        # No more tokens than the longest open row may still get: the cache ends there.
        new = min(CHUNK, max(limits_B[i] - len(rows[i]) for i in np.flatnonzero(open_B)))
        new_BC, texts = _go_on(
            config, weights, texts, np.int32(column), open_B, np.int32(new), end, sampling
        )
        new_BC, column = np.asarray(new_BC), column + new


def _check(config: LlamaConfig, prompt: Sequence[int]) -> None:
    """Raises UserError if the prompt cannot be continued."""
    require(len(prompt) > 0, "The prompt is empty: give at least one token.")
    outside = [token for token in prompt if not 0 <= token < config.vocab_size]
    require(
        not outside,
        f"The prompt holds the token id {outside[:1]}, outside the vocabulary of "
        f"{config.vocab_size}.",
    )
    require(
        len(prompt) < config.context,
        f"The prompt has {len(prompt)} tokens, and the context of {config.context} must hold a "
        "new one too: shorten the prompt.",
    )


def _size(least: int) -> int:
    """Returns the smallest product of `SMALLEST` and a power of two that is not below `least`."""
    return SMALLEST << max(0, math.ceil(math.log2(least / SMALLEST)))


def _extend(
    row: list[int],
    ids: Sequence[int],
    limit: int,
    eos: int | None,
    stop: Callable[[list[int]], bool] | None,
) -> bool:
    """Adds ids to a row until it ends; returns whether it goes on after all of them."""
    for token in ids:
        if token == eos:
            return False
        row.append(token)
        if (stop is not None and stop(row)) or len(row) == limit:
            return False
    return True


# Compiled as one program, so that arrays between the stored and the decoding form are not kept.
@jax.jit
def _for_decoding(weights: llama.Weights) -> llama.Weights:
    return _everywhere(decoding.for_decoding(weights))


def for_decoding(weights: llama.Weights) -> llama.Weights:
    """Converts weights to the form that the two programs read: whole, and an array for each layer.

    The result is a copy, unless the weights have that form already; then they are returned.
    """
    return weights if isinstance(weights["blocks"], list) else _for_decoding(weights)


class _Texts(NamedTuple):
    """The state of generation on the devices."""

    newest_B: jax.Array
    """The last token of each row, which the model has not read yet."""
    positions_B: jax.Array
    """The position of that token in its text."""
    cache: decoding.Cache


ROWS = P(BATCH_AXES)  # the rows are split over all devices
SAMPLING = (ROWS, P(), P(), P())  # seeds of the rows, temperature, top-k, top-p


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(config, columns, weights, tokens_BT, lengths_B, sampling) -> tuple[jax.Array, _Texts]:
    """Reads the prompts and chooses the first token of each row."""

    def begin(weights, tokens_BT, lengths_B, sampling):
        logits_BV, cache = decoding.prefill(config, weights, tokens_BT, lengths_B, columns)
        return _Texts(_choose(logits_BV, lengths_B, *sampling), lengths_B, cache)

    begin = _on_own_rows(begin, (P(), ROWS, ROWS, SAMPLING), ROWS)
    texts = begin(weights, tokens_BT, lengths_B, sampling)
    return _everywhere(texts.newest_B), texts


# The cache is donated, so that new keys and values are written into it in place.
@functools.partial(jax.jit, static_argnums=0, donate_argnames="texts")
def _go_on(
    config, weights, texts, column, open_B, steps, end, sampling
) -> tuple[jax.Array, _Texts]:
    """Adds up to `steps` tokens to each row and returns them, (B, C).

    A device stops earlier when all of its open rows have ended with the token `end`. The keys and
    values of the first token go into `column` of the cache, those of the next into the next column.
    """

    def go_on(weights, texts, column, open_B, steps, end, sampling):
        def goes_on(state):
            step, _, open_B, _ = state
            return (step < steps) & jnp.any(open_B)

        def add_token(state):
            step, new_BC, open_B, (newest_B, positions_B, cache) = state
            logits_BV, cache = decoding.decode(
                config, weights, newest_B, positions_B, column + step, cache
            )
            positions_B = positions_B + 1
            newest_B = _choose(logits_BV, positions_B, *sampling)
            new_BC = new_BC.at[:, step].set(newest_B)
            texts = _Texts(newest_B, positions_B, cache)
            return step + 1, new_BC, open_B & (newest_B != end), texts

        # A while loop and not a scan, so that a device stops when its last open row has ended.
        new_BC = jnp.zeros((len(open_B), CHUNK), jnp.int32)
        _, new_BC, _, texts = jax.lax.while_loop(goes_on, add_token, (0, new_BC, open_B, texts))
        return new_BC, texts

    go_on = _on_own_rows(go_on, (P(), ROWS, P(), ROWS, P(), P(), SAMPLING), ROWS)
    new_BC, texts = go_on(weights, texts, column, open_B, steps, end, sampling)
    return _everywhere(new_BC), texts


def _on_own_rows(run: Callable, in_specs, out_specs) -> Callable:
    """Wraps `run` so that every device of the mesh, if one is set, computes its own rows.

    By `jax.shard_map` and not by sharding constraints: the devices have loops of their own then,
    which may end at different times.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run
    # The check must be off, because attention kernels do not declare over which mesh axes their
    # results vary.
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _everywhere(tree):
    """Replicates arrays on every device of the mesh, so that each process can read them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, P())


def _choose(logits_BV, positions_B, seeds_B, temperature, top_k, top_p) -> jax.Array:
    """Chooses the token of each row, int32, by the parameters of a `Sampler`.

    The parameters are operands and not constants, so that one program serves all samplers.
    `jax.lax.cond` skips the noise and the sorting where they are not asked for.
    """
    # In bf16 many tokens have equal logits, and the sums for top-p would be too coarse.
    logits_BV = logits_BV.astype(jnp.float32)

    def sample():
        filtered = (top_k > 0) | (top_p < 1)
        kept_BV = jax.lax.cond(
            filtered,
            lambda: filter_logits(logits_BV / temperature, top_k, top_p),
            lambda: logits_BV / temperature,
        )
        # A key for each row and position, not one that is split in every step: a token does not
        # depend on how many steps or rows came before it.
        keys_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds_B), positions_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        # The argmax of logits plus Gumbel noise is a sample from the softmax of the logits.
        return jnp.argmax(kept_BV + noise_BV, axis=-1)

    def greedy():
        return jnp.argmax(logits_BV, axis=-1)

    return jax.lax.cond(temperature > 0, sample, greedy).astype(jnp.int32)


def filter_logits(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Returns the logits with -inf for every token that `top_k` and `top_p` exclude.

    `top_p` is a share of the probability that is left after `top_k`. Tokens with exactly the logit
    of the last one that is kept are kept too.

    Args:
      logits_BV: in fp32, already divided by the temperature.
      top_k: int32 scalar, as in `Sampler`.
      top_p: fp32 scalar, as in `Sampler`.
    """
    V = logits_BV.shape[-1]
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    ranks_V = jnp.arange(V)
    # Not `jax.lax.top_k`, whose k must be a constant of the compiled program.
    sorted_BV = jnp.where(ranks_V < jnp.where(top_k > 0, top_k, V), sorted_BV, -jnp.inf)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # The probability of all tokens that are likelier, which is 0 for the first: it is always taken.
    likelier_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    # The sums may round to 1 before the last token, which a top_p of 1 must still keep.
    taken_BV = (likelier_BV < top_p) | (top_p >= 1)
    least_B1 = jnp.min(
        sorted_BV, axis=-1, keepdims=True, initial=jnp.inf, where=taken_BV & jnp.isfinite(sorted_BV)
    )
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
