"""Token ids from a trained model: prompts, each of any length, and what follows them.

A call runs two programs. One reads all prompts at once and leaves a cache of keys and values; the
other is a loop that adds a token to each row, `CHUNK` tokens a call, so that the host can look at
them. The size of the cache is fixed at the start, so neither is compiled again as texts grow.

Under `jax.set_mesh` each device goes on with its own rows and keeps their part of the cache. The
weights are whole on all of them, so that the devices need nothing from each other.

Shapes: B rows, T tokens of the longest prompt and its padding, C = CHUNK, V vocabulary.
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

CHUNK = 8  # new tokens of a row between two looks at them
SMALLEST = 32  # sizes are powers of two from here on, so that few programs serve all lengths


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
    """Continues prompts: each as if it were alone, but for rounding.

    Args:
      config: the model.
      weights: in the dtype to compute in; whole or in parts over the mesh that is set, if one is.
        Or as `for_decoding` gives them, which saves a copy of them where there are several calls.
      prompts: ids, at least one each.
      max_tokens: new tokens of a row at most; fewer where its text fills the context.
      sampler: how tokens are chosen.
      seed: of the samples. A token hangs on the seed plus the index of its row, and on its position
        in the text: row i is what its prompt gives alone with `seed + i`.
      eos: ends a row and is not returned; None: never ends one early.
      stop: asked with the new ids of a row after each of them; True ends the row there.

    Returns:
      The new ids of each row.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, or a prompt that fills the context.
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
    """As `generate`, but yields the ids as they come: those of each row since the last time."""
    require(max_tokens > 0, "--max-tokens must be above 0.")
    require(0 <= seed < 2**32, f"--seed must lie between 0 and {2**32 - 1}.")
    for prompt in prompts:
        _check(config, prompt)
    if not prompts:
        return
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    limits_B = np.minimum(max_tokens, config.context - lengths_B)
    T = _size(max(lengths_B))
    columns = _size(T + max(limits_B) - 1)  # nobody reads the last token
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    B = -(-len(prompts) // devices) * devices  # the last rows may be no one's
    lengths_B = np.pad(lengths_B, (0, B - len(prompts)), constant_values=1)
    tokens_BT = np.zeros((B, T), np.int32)
    for tokens_T, prompt in zip(tokens_BT, prompts, strict=False):
        tokens_T[: len(prompt)] = prompt
    # With their types: a program is compiled for each of them.
    how = (
        (seed + np.arange(B)).astype(np.uint32),
        np.float32(sampler.temperature),
        np.int32(sampler.top_k),
        np.float32(sampler.top_p),
    )
    end = np.int32(-1 if eos is None else eos)

    weights = for_decoding(weights)
    newest_B, texts = _begin(config, columns, weights, tokens_BT, lengths_B, how)
    new_BC, new, column = np.asarray(newest_B)[:, None], 1, T
    rows, open_B = [[] for _ in prompts], np.arange(B) < len(prompts)
    while True:
        before = [len(row) for row in rows]
        for index, row in enumerate(rows):
            if open_B[index]:
                ids_C = new_BC[index, :new].tolist()
                open_B[index] = _extend(row, ids_C, limits_B[index], eos, stop)
        yield [row[start:] for row, start in zip(rows, before, strict=True)]
        if not open_B.any():
            return
        new = min(CHUNK, max(limits_B[i] - len(rows[i]) for i in np.flatnonzero(open_B)))
        new_BC, texts = _go_on(
            config, weights, texts, np.int32(column), open_B, np.int32(new), end, how
        )
        new_BC, column = np.asarray(new_BC), column + new


def _check(config: LlamaConfig, prompt: Sequence[int]) -> None:
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
    """The smallest size of `SMALLEST` times a power of two that is `least` or more."""
    return SMALLEST << max(0, math.ceil(math.log2(least / SMALLEST)))


def _extend(
    row: list[int],
    ids: Sequence[int],
    limit: int,
    eos: int | None,
    stop: Callable[[list[int]], bool] | None,
) -> bool:
    """Adds ids to a row, up to where it ends; says whether it goes on after them."""
    for token in ids:
        if token == eos:
            return False
        row.append(token)
        if (stop is not None and stop(row)) or len(row) == limit:
            return False
    return True


@jax.jit
def _for_decoding(weights: llama.Weights) -> llama.Weights:
    return _everywhere(decoding.for_decoding(weights))


def for_decoding(weights: llama.Weights) -> llama.Weights:
    """The weights as the two programs take them: a copy, unless they are so already."""
    return weights if isinstance(weights["blocks"], list) else _for_decoding(weights)


class _Texts(NamedTuple):
    """Where the rows are, on the devices."""

    newest_B: jax.Array
    """Tokens that the model has not read yet."""
    positions_B: jax.Array
    """Where they stand in their texts."""
    cache: decoding.Cache


ROWS = P(BATCH_AXES)  # split over all devices
HOW = (ROWS, P(), P(), P())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(config, columns, weights, tokens_BT, lengths_B, how) -> tuple[jax.Array, _Texts]:
    """Reads the prompts and chooses the first token of each row."""

    def begin(weights, tokens_BT, lengths_B, how):
        logits_BV, cache = decoding.prefill(config, weights, tokens_BT, lengths_B, columns)
        return _Texts(_choose(logits_BV, lengths_B, *how), lengths_B, cache)

    begin = _on_own_rows(begin, (P(), ROWS, ROWS, HOW), ROWS)
    texts = begin(weights, tokens_BT, lengths_B, how)
    return _everywhere(texts.newest_B), texts


@functools.partial(jax.jit, static_argnums=0, donate_argnames="texts")
def _go_on(config, weights, texts, column, open_B, steps, end, how) -> tuple[jax.Array, _Texts]:
    """Up to `steps` more tokens of each row, (B, C), until none of a device's open ones goes on.

    The first goes into `column` of the cache.
    """

    def go_on(weights, texts, column, open_B, steps, end, how):
        def goes_on(state):
            step, _, open_B, _ = state
            return (step < steps) & jnp.any(open_B)

        def add_token(state):
            step, new_BC, open_B, (newest_B, positions_B, cache) = state
            logits_BV, cache = decoding.decode(
                config, weights, newest_B, positions_B, column + step, cache
            )
            positions_B = positions_B + 1
            newest_B = _choose(logits_BV, positions_B, *how)
            new_BC = new_BC.at[:, step].set(newest_B)
            texts = _Texts(newest_B, positions_B, cache)
            return step + 1, new_BC, open_B & (newest_B != end), texts

        new_BC = jnp.zeros((len(open_B), CHUNK), jnp.int32)
        _, new_BC, _, texts = jax.lax.while_loop(goes_on, add_token, (0, new_BC, open_B, texts))
        return new_BC, texts

    go_on = _on_own_rows(go_on, (P(), ROWS, P(), ROWS, P(), P(), HOW), ROWS)
    new_BC, texts = go_on(weights, texts, column, open_B, steps, end, how)
    return _everywhere(new_BC), texts


def _on_own_rows(run: Callable, in_specs, out_specs) -> Callable:
    """`run` by every device of the mesh on its own rows; as it is where none is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return run
    # Kernels say nothing about which devices agree.
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _everywhere(tree):
    """Whole on every device of the mesh, for each process to read."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, P())


def _choose(logits_BV, positions_B, seeds_B, temperature, top_k, top_p) -> jax.Array:
    """The token of each row for its position, int32; one program for all samplers."""
    logits_BV = logits_BV.astype(jnp.float32)

    def sample():
        filtered = (top_k > 0) | (top_p < 1)
        kept_BV = jax.lax.cond(
            filtered,
            lambda: filter_logits(logits_BV / temperature, top_k, top_p),
            lambda: logits_BV / temperature,
        )
        keys_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds_B), positions_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        # The argmax of logits and Gumbel noise is a sample from their softmax.
        return jnp.argmax(kept_BV + noise_BV, axis=-1)

    def greedy():
        return jnp.argmax(logits_BV, axis=-1)

    return jax.lax.cond(temperature > 0, sample, greedy).astype(jnp.int32)


def filter_logits(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits with -inf for every token that a `Sampler` never takes.

    `top_p` counts the probabilities that `top_k` leaves. Tokens as likely as the last one that is
    kept are kept too.
    """
    V = logits_BV.shape[-1]
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    ranks_V = jnp.arange(V)
    sorted_BV = jnp.where(ranks_V < jnp.where(top_k > 0, top_k, V), sorted_BV, -jnp.inf)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    likelier_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    taken_BV = (likelier_BV < top_p) | (top_p >= 1)
    least_B1 = jnp.min(
        sorted_BV, axis=-1, keepdims=True, initial=jnp.inf, where=taken_BV & jnp.isfinite(sorted_BV)
    )
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
