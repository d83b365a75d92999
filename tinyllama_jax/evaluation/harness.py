"""Scores a model with the tasks of lm-evaluation-harness (lm-eval), which the eval extra installs.

lm-eval asks a model three kinds of questions, which its class `lm_eval.api.model.LM` documents.
`TinyLlamaLM` answers them. A test compares every answer with that of lm-eval's own `hf` model on
the exported weights.

Shapes: B rows, T tokens, S = T + 1.
"""

import dataclasses
import difflib
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import track
from sentencepiece import SentencePieceProcessor

from tinyllama_jax.config import ExecutionConfig, LlamaConfig
from tinyllama_jax.data.tokenizer import BOS, EOS
from tinyllama_jax.errors import UserError, first_line, require
from tinyllama_jax.evaluation.scores import SUITES, TaskScores
from tinyllama_jax.inference.generate import GREEDY, Sampler, for_decoding, generate
from tinyllama_jax.model import llama
from tinyllama_jax.runtime.mesh import batch_sharding, process_rows, put_batch

# Both libraries read these variables when they are imported, so they are set before. `datasets`
# would otherwise report each file that it opens to a server. lm-eval would fork this process to
# compute standard errors, which can hang a process in which JAX has threads.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ["DISABLE_MULTIPROC"] = "1"
try:
    import lm_eval.api.task
    from datasets.config import HF_CACHE_HOME, HF_HUB_OFFLINE
    from datasets.exceptions import DatasetNotFoundError
    from datasets.utils.logging import set_verbosity_error
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(
        f"Tasks need lm-evaluation-harness ({error}): pip install 'tinyllama-jax[eval]'."
    ) from error

if HF_HUB_OFFLINE:
    # Metrics have a switch of their own, which somebody who works offline would otherwise miss.
    os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
# `datasets` warns when it uses data that is already on this machine, which is intended here.
set_verbosity_error()
# lm-eval shows a progress bar while it builds a task's prompts. It takes a moment and would be left
# between the lines of a training run.
lm_eval.api.task.tqdm = functools.partial(lm_eval.api.task.tqdm, disable=True)

BATCH_TOKENS = 4096  # tokens that a device scores at once, padding included
PROMPTS = 16  # prompts that a device continues at once
SHORTEST = 32  # length of the shortest rows; the other lengths are its doubles, up to the context
# The defaults of tasks that do not say: the first is that of lm-eval's `hf` model, the others are
# those of transformers' `generate`.
MAX_NEW_TOKENS = 256
TOP_K, TOP_P = 50, 1.0
# Further options that a task may state, because with these values they change nothing.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "typical_p": 1.0}
BOOTSTRAP = 1000  # draws for the standard errors of metrics that have no formula for it
FEWSHOT_SEED = 1234  # lm-eval's default, so that prompts have the same examples as elsewhere

Scorer = Callable[[llama.Weights, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make_scorer(
    model: LlamaConfig, mesh: Mesh, dtype: DTypeLike, execution: ExecutionConfig = ExecutionConfig()
) -> Scorer:
    """Makes the compiled function `score(weights, tokens_BS, counts_BT)`.

    For each row it returns the log-probability of the tokens that count, and whether each of them
    was the likeliest in its place. Every process gets the results of all rows.

    Args:
      model: the model.
      mesh: the mesh that the rows are spread over.
      dtype: the dtype to compute in.
      execution: how to compute attention and the loss.
    """

    def score(weights, tokens_BS, counts_BT):
        # Gains are folded in before weights are rounded, as in training. The constraint gathers the
        # rounded weights on every device once, instead of wherever the compiler comes to one.
        weights = jax.tree.map(lambda w: w.astype(dtype), llama.fold_gains(weights))
        weights = jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, P()))
        scores_BT, likeliest_BT = llama.next_token_scores(model, weights, tokens_BS, execution)
        sums_B = jnp.sum(jnp.where(counts_BT, scores_BT, 0), axis=1)
        return sums_B, jnp.all(likeliest_BT | ~counts_BT, axis=1)

    rows = batch_sharding(mesh, rows_axis=0)
    return jax.jit(score, in_shardings=(None, rows, rows), out_shardings=NamedSharding(mesh, P()))


class TinyLlamaLM(TemplateLM):
    """A model on a mesh that answers lm-eval's questions.

    Each of several processes runs lm-eval by itself, asks the same questions and gets the same
    answers. lm-eval's own support for several processes would divide the questions among them, but
    here every batch of questions is spread over all devices.

    Texts get no beginning-of-sequence token. There is none in training, and the original's scores
    were measured without one (lm-eval's `hf-causal` model of 2023). lm-eval's `hf` model of today
    adds one if the tokenizer in a folder asks for it, which exports of `tinyllama convert` do not.

    Args:
      model: the model.
      tokenizer: the tokenizer that the model was trained with.
      mesh: the mesh to compute on. It must be set as JAX's mesh while lm-eval asks.
      scorer: the scoring function, from `make_scorer` for this model and mesh.
      dtype: the dtype to generate in.
      weights: the weights in any float dtype, on the devices of the mesh.
      quiet: whether to show no progress bar.
    """

    def __init__(
        self,
        model: LlamaConfig,
        tokenizer: SentencePieceProcessor,
        mesh: Mesh,
        scorer: Scorer,
        dtype: DTypeLike,
        weights: llama.Weights,
        *,
        quiet: bool = False,
    ):
        super().__init__()
        self._model, self._weights, self._tokenizer = model, weights, tokenizer
        self._mesh, self._scorer, self._dtype = mesh, scorer, dtype
        self._bar = functools.partial(
            track, console=Console(stderr=True), transient=True, disable=quiet
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return EOS

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before the first token of a text that has no context."""
        return BOS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """The tokens of a text, without special ones whatever lm-eval asks for."""
        return self._tokenizer.encode(string)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the likeliest one."""
        # lm-eval's class turns texts into tokens and calls `_loglikelihood_tokens`. That shows a
        # progress bar of its own.
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, which may be longer than the context."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.context,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((("", ""), context, continuation))
                owners.append(index)
        sums = [0.0] * len(requests)
        for index, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[index] += score
        return sums

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            require(
                len(continuation) <= self._model.context,
                f"A task asks for an answer of {len(continuation)} tokens and the model's context "
                f"is {self._model.context}: leave the task out.",
            )
            # A row that is too long loses its beginning. It may have one token more than the
            # context, because the last one is predicted and not read.
            rows.append(((context + continuation)[-self._model.context - 1 :], len(continuation)))
        # Rows of similar length go together, so that little is padding, and the longest go first: a
        # batch that does not fit into memory fails at once.
        by_length = defaultdict(list)
        for index in sorted(range(len(rows)), key=lambda index: -len(rows[index][0])):
            by_length[_padded(len(rows[index][0]) - 1, self._model.context)].append(index)
        batches = []
        for T, indices in by_length.items():
            B = max(1, BATCH_TOKENS // T) * self._mesh.size
            batches += [(T, B, indices[at : at + B]) for at in range(0, len(indices), B)]

        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for T, B, indices in self._bar(batches, "scoring"):
            # Padding stands behind a row's tokens, where causal attention does not see it.
            tokens_BS = np.zeros((B, T + 1), np.int32)
            counts_BT = np.zeros((B, T), bool)
            for row, index in enumerate(indices):
                tokens, count = rows[index]
                tokens_BS[row, : len(tokens)] = tokens
                counts_BT[row, len(tokens) - 1 - count : len(tokens) - 1] = True
            local = process_rows(B)
            batch = [put_batch(x[local], self._mesh, 0) for x in (tokens_BS, counts_BT)]
            sums_B, likeliest_B = map(np.asarray, self._scorer(self._weights, *batch))
            for row, index in enumerate(indices):
                answers[index] = float(sums_B[row]), bool(likeliest_B[row])
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues prompts, each as its task wants it."""
        weights = jax.tree.map(lambda w: jnp.asarray(w).astype(self._dtype), self._weights)
        weights = for_decoding(weights)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        options = [
            read_generation_options(request.task_name, request.args[1]) for request in requests
        ]
        # A batch shares its options, and the longest prompts go first: a model that does not fit
        # into memory fails at once.
        alike = defaultdict(list)
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            alike[options[index]].append(index)
        B = PROMPTS * self._mesh.size
        batches = [
            (shared, at, indices[at : at + B])
            for shared, indices in alike.items()
            for at in range(0, len(indices), B)
        ]
        texts = [""] * len(requests)
        for shared, at, indices in self._bar(batches, "generating"):
            ends = [*shared.until, self._tokenizer.id_to_piece(EOS)]
            # A prompt that is too long loses its beginning, so that all new tokens have room.
            room = self._model.context - shared.max_tokens
            new = generate(
                self._model,
                weights,
                [prompts[index][-room:] or [self.prefix_token_id] for index in indices],
                max_tokens=shared.max_tokens,
                sampler=shared.sampler,
                # Row r of a batch draws by seed + r, so a sample depends on its place among all
                # prompts and not on how many fit into a batch.
                seed=at,
                eos=EOS,
                stop=lambda ids, ends=ends: any(end in self._tokenizer.decode(ids) for end in ends),
            )
            for index, ids in zip(indices, new, strict=True):
                texts[index] = postprocess_generated_text(self._tokenizer.decode(ids), ends, None)
        return texts


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How a task wants its prompts to be continued."""

    until: tuple[str, ...]
    """Strings that end a text."""
    max_tokens: int
    """The most new tokens."""
    sampler: Sampler


def read_generation_options(task: str, given: Mapping[str, Any]) -> GenerationOptions:
    """Reads a task's `generation_kwargs` as lm-eval's `hf` model and transformers would.

    Args:
      task: the name of the task, for messages.
      given: its `generation_kwargs`.

    Raises:
      UserError: an option is not supported here, or transformers would refuse its value.
    """
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS))
    until = tuple(end for end in kwargs.pop("until") if end)
    max_tokens, do_sample = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
    temperature = float(kwargs.pop("temperature", 0.0))
    top_k, top_p = kwargs.pop("top_k", None), kwargs.pop("top_p", None)
    for name, value in kwargs.items():
        require(
            name in NEUTRAL and value == NEUTRAL[name],
            f"{task} wants texts with {name} = {value!r}, which is not done here: leave it out.",
        )
    if not do_sample:
        return GenerationOptions(until, max_tokens, GREEDY)
    require(
        temperature > 0,
        f"{task} wants samples but tells no temperature above 0: its generation_kwargs need one.",
    )
    top_k, top_p = TOP_K if top_k is None else top_k, TOP_P if top_p is None else top_p
    try:
        return GenerationOptions(until, max_tokens, Sampler(temperature, int(top_k), float(top_p)))
    except UserError:
        raise UserError(
            f"{task} wants samples with top_k = {top_k} and top_p = {top_p}, which cannot be: "
            "leave it out."
        ) from None


def _padded(T: int, context: int) -> int:
    """The length to which rows of T tokens are padded: powers of 2, and the context.

    Every length is a program to compile, so there are only a few.
    """
    return min(context, max(SHORTEST, 1 << (T - 1).bit_length()))


class Tasks:
    """A set of tasks with their data, and the compiled function that scores texts.

    A training run makes one and scores its weights with it again and again.

    Args:
      names: names of lm-eval's tasks, groups or tags, of suites in `scores.SUITES`, or of tasks in
        the user's own files.
      model: the model that will be scored.
      tokenizer: the tokenizer that the model was trained with.
      mesh: the mesh to compute on.
      dtype: the dtype to compute in.
      limit: the number of documents to score of each task; None scores all.
      include_path: a folder with the user's own task files.
      execution: how to compute attention and the loss.
      quiet: whether to show no progress bars.

    Raises:
      UserError: as `load_tasks`.
    """

    def __init__(
        self,
        names: Sequence[str],
        model: LlamaConfig,
        tokenizer: SentencePieceProcessor,
        mesh: Mesh,
        dtype: DTypeLike,
        *,
        limit: int | None = None,
        include_path: Path | None = None,
        execution: ExecutionConfig = ExecutionConfig(),
        quiet: bool = False,
    ):
        self._tasks: Any = load_tasks(names, model, include_path)
        self._limit = limit
        scorer = make_scorer(model, mesh, dtype, execution)
        self._lm = functools.partial(
            TinyLlamaLM, model, tokenizer, mesh, scorer, dtype, quiet=quiet
        )

    def score(self, weights: llama.Weights) -> TaskScores:
        """Scores a model. The mesh must be set as JAX's mesh (`jax.set_mesh`).

        Args:
          weights: the weights in any float dtype, on the devices of the mesh.

        Returns:
          Task or group -> metric -> value. If a task extracts answers by several filters, the first
          one counts.
        """
        results: Any = evaluate(
            self._lm(weights),
            self._tasks,
            limit=self._limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP,
            confirm_run_unsafe_code=code_allowed(),
        )
        scores: dict[str, dict[str, float]] = {}
        for task, values in results["results"].items():
            for name, value in values.items():
                # lm-eval names a value "metric,filter"; other keys, such as "alias", are no values.
                metric, _, answer_filter = name.partition(",")
                if answer_filter and isinstance(value, int | float):
                    scores.setdefault(task, {}).setdefault(metric, float(value))
        return scores


def load_tasks(
    names: Sequence[str], model: LlamaConfig, include_path: Path | None = None
) -> Mapping[str, Any]:
    """Loads tasks with their data, in the form that lm-eval's evaluator takes.

    lm-eval downloads data that is not on this machine, unless `HF_HUB_OFFLINE=1` is set.

    Args:
      names: names of lm-eval's tasks, groups or tags, of suites in `scores.SUITES`, or of tasks in
        the user's own files.
      model: the model that will be scored.
      include_path: a folder with the user's own task files.

    Raises:
      UserError: a name is unknown, a dataset is not here and cannot be downloaded, or a task asks
        for something that the model cannot do.
    """
    require(
        include_path is None or include_path.is_dir(),
        f"There is no folder {include_path}: --include-path is for task files of your own.",
    )
    shots = {}
    for name in names:
        suite = SUITES.get(name)
        shots |= {c.task: c.shots for c in suite.columns} if suite else {name: None}
    require(len(shots) > 0, f"Name a task, or one of {', '.join(SUITES)}.")
    # lm-eval's own tasks are indexed only if the user's files do not have all the names.
    manager = _task_manager(include_path, include_path is None)
    if any(name not in manager.all_subtasks for name in shots):
        manager = _task_manager(include_path, True)
    known = manager.task_index
    for name in shots:
        if name in known:
            continue
        close = difflib.get_close_matches(name, [*SUITES, *known], n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them."
        raise UserError(f"There is no task {name!r}: {hint}")
    allowed = code_allowed()
    require(
        allowed or "humaneval" not in shots,
        "humaneval runs the programs that the model writes, on this machine: set "
        "HF_ALLOW_CODE_EVAL=1 to allow that, or name the other tasks.",
    )
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, count in shots.items():
        task_set = _load(manager, name)
        for task in task_set["tasks"].values():
            # A suite decides the number of examples, and otherwise the task's own file. lm-eval
            # needs a number in any case.
            if count is not None or task.config.num_fewshot is None:
                task.set_config(key="num_fewshot", value=count or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            _check_task(task, model, allowed)
        for kind in loaded:
            loaded[kind] |= task_set.get(kind, {})
    return loaded


@functools.cache
def _task_manager(include_path: Path | None, include_defaults: bool) -> TaskManager:
    """lm-eval's index of task files, which takes seconds to build for its own ten thousand."""
    own = None if include_path is None else str(include_path)
    return TaskManager(include_path=own, include_defaults=include_defaults)


def _load(manager: TaskManager, name: str) -> Mapping[str, Any]:
    """Loads one task, group or tag with its data."""
    try:
        return manager.load([name])
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"The data of task {name}, or its metric, is not here and cannot be had "
            f"({first_line(error)}): run the same where there is network, copy what that leaves "
            f"in {HF_CACHE_HOME} to this machine, and set HF_HOME to the copy."
        ) from error


def _check_task(task: Any, model: LlamaConfig, code_is_allowed: bool) -> None:
    """Raises `UserError` for a task that would only fail when its turn comes, hours later."""
    require(
        code_is_allowed or not getattr(task, "UNSAFE_CODE", False),
        f"{task.config.task} runs the programs that the model writes, on this machine: set "
        "HF_ALLOW_CODE_EVAL=1 to allow that, or leave it out.",
    )
    if task.OUTPUT_TYPE != "generate_until":
        return
    options = read_generation_options(task.config.task, task.config.generation_kwargs or {})
    require(
        options.max_tokens < model.context,
        f"{task.config.task} asks for up to {options.max_tokens} new tokens and the model's "
        f"context is {model.context}: leave it out.",
    )


def code_allowed() -> bool:
    """Whether programs that a model writes may run on this machine.

    The user allows it by the environment variable that Hugging Face's metric for code reads.
    """
    return os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
