"""The model as lm-evaluation-harness asks it, and its tasks; needs the eval extra.

Source of what a request means: lm-eval's own documentation of `lm_eval.api.model.LM`. A test holds
every answer against lm-eval's `hf` model on the exported weights.

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

# Read where they are imported: `datasets` would tell a server of each file that it opens, and
# lm-eval would fork this process, whose threads are JAX's, for standard errors.
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
    os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")  # metrics have a switch of their own
set_verbosity_error()  # it warns of what is meant: data that is on this machine already
# Its bar for each task's prompts is gone in a blink, and would stand between the lines of a run.
lm_eval.api.task.tqdm = functools.partial(lm_eval.api.task.tqdm, disable=True)

BATCH_TOKENS = 4096  # of a device at once, padding included
PROMPTS = 16  # of a device that are continued at once
SHORTEST = 32  # tokens of the shortest rows; longer ones double up to the context
MAX_NEW_TOKENS = 256  # of a task that does not say, as of lm-eval's `hf`
# Of samples whose task does not say, as of transformers' `generate`.
TOP_K, TOP_P = 50, 1.0
# What else a task may say, since it changes nothing.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "typical_p": 1.0}
BOOTSTRAP = 1000  # draws for the standard errors that have no formula
FEWSHOT_SEED = 1234  # lm-eval's default

Scorer = Callable[[llama.Weights, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make_scorer(
    model: LlamaConfig, mesh: Mesh, dtype, execution: ExecutionConfig = ExecutionConfig()
) -> Scorer:
    """The compiled `score(weights, tokens_BS, counts_BT)`: of each row, the log-probability of the
    tokens that count, and whether each of them is the likeliest; whole on every process."""

    def score(weights, tokens_BS, counts_BT):
        weights = jax.tree.map(lambda w: w.astype(dtype), llama.fold_gains(weights))
        weights = jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, P()))
        scores_BT, likeliest_BT = llama.next_token_scores(model, weights, tokens_BS, execution)
        sums_B = jnp.sum(jnp.where(counts_BT, scores_BT, 0), axis=1)
        return sums_B, jnp.all(likeliest_BT | ~counts_BT, axis=1)

    rows = batch_sharding(mesh, rows_axis=0)
    return jax.jit(score, in_shardings=(None, rows, rows), out_shardings=NamedSharding(mesh, P()))


class TinyLlamaLM(TemplateLM):
    """A model on a mesh, as lm-eval asks it.

    Rows of like length go together, the longest first, over all devices. Of several processes each
    asks the same and hears the same: to lm-eval they are one.

    A text gets no bos, as in training, and as where the original's scores come from (lm-eval's
    `hf-causal` of 2023). Its `hf` of today adds one if a folder's tokenizer asks for it; exports of
    `tinyllama convert` do not.

    Args:
      model: its shape.
      tokenizer: that it was trained with.
      mesh: the devices, set as JAX's mesh while there are questions.
      scorer: from `make_scorer` for this model and mesh.
      dtype: to generate in.
      weights: in any dtype, on the devices of the mesh.
      quiet: no progress bar.
    """

    def __init__(
        self,
        model: LlamaConfig,
        tokenizer: SentencePieceProcessor,
        mesh: Mesh,
        scorer: Scorer,
        dtype,
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
        return EOS

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text follows where there is no context."""
        return BOS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # there is a bar below

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
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

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            require(
                len(continuation) <= self._model.context,
                f"A task asks for an answer of {len(continuation)} tokens and the model's context "
                f"is {self._model.context}: leave the task out.",
            )
            # Too long: cut on the left. The last token is only predicted.
            rows.append(((context + continuation)[-self._model.context - 1 :], len(continuation)))
        by_length = defaultdict(list)
        for index in sorted(range(len(rows)), key=lambda index: -len(rows[index][0])):
            by_length[_padded(len(rows[index][0]) - 1, self._model.context)].append(index)
        batches = []
        for T, indices in by_length.items():
            B = max(1, BATCH_TOKENS // T) * self._mesh.size
            batches += [(T, B, indices[at : at + B]) for at in range(0, len(indices), B)]

        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for T, B, indices in self._bar(batches, "scoring"):
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

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        weights = jax.tree.map(lambda w: jnp.asarray(w).astype(self._dtype), self._weights)
        weights = for_decoding(weights)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        wishes = [read_wish(request.task_name, request.args[1]) for request in requests]
        alike = defaultdict(list)
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            alike[wishes[index]].append(index)
        B = PROMPTS * self._mesh.size
        batches = [
            (wish, at, indices[at : at + B])
            for wish, indices in alike.items()
            for at in range(0, len(indices), B)
        ]
        texts = [""] * len(requests)
        for wish, at, indices in self._bar(batches, "generating"):
            ends = [*wish.until, self._tokenizer.id_to_piece(EOS)]
            # Too long: cut on the left, so that all new tokens have room.
            room = self._model.context - wish.max_tokens
            new = generate(
                self._model,
                weights,
                [prompts[index][-room:] or [self.prefix_token_id] for index in indices],
                max_tokens=wish.max_tokens,
                sampler=wish.sampler,
                seed=at,  # a sample hangs on its place among all, however many go together
                eos=EOS,
                stop=lambda ids, ends=ends: any(end in self._tokenizer.decode(ids) for end in ends),
            )
            for index, ids in zip(indices, new, strict=True):
                texts[index] = postprocess_generated_text(self._tokenizer.decode(ids), ends, None)
        return texts


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a task wants of the texts that follow its prompts."""

    until: tuple[str, ...]
    max_tokens: int
    sampler: Sampler


def read_wish(task: str, given: Mapping[str, Any]) -> Wish:
    """A task's `generation_kwargs` as lm-eval's `hf` model and transformers understand them.

    Raises:
      UserError: what is not done here, or would fail there.
    """
    how: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS))
    until = tuple(end for end in how.pop("until") if end)
    max_tokens, do_sample = how.pop("max_gen_toks"), how.pop("do_sample")
    temperature = float(how.pop("temperature", 0.0))
    top_k, top_p = how.pop("top_k", None), how.pop("top_p", None)
    for name, value in how.items():
        require(
            name in NEUTRAL and value == NEUTRAL[name],
            f"{task} wants texts with {name} = {value!r}, which is not done here: leave it out.",
        )
    if not do_sample:
        return Wish(until, max_tokens, GREEDY)
    require(
        temperature > 0,
        f"{task} wants samples but tells no temperature above 0: its generation_kwargs need one.",
    )
    top_k, top_p = TOP_K if top_k is None else top_k, TOP_P if top_p is None else top_p
    try:
        return Wish(until, max_tokens, Sampler(temperature, int(top_k), float(top_p)))
    except UserError:
        raise UserError(
            f"{task} wants samples with top_k = {top_k} and top_p = {top_p}, which cannot be: "
            "leave it out."
        ) from None


def _padded(T: int, context: int) -> int:
    """Tokens of the rows that hold T, so that few programs serve all lengths."""
    return min(context, max(SHORTEST, 1 << (T - 1).bit_length()))


class Tasks:
    """Tasks with their data, and the compiled function that scores their texts.

    Args:
      names: of tasks, groups or tags of lm-eval, of suites of `SUITES`, or of own task files.
      model: that will be asked.
      tokenizer: that it was trained with.
      mesh: the devices.
      dtype: to compute in.
      limit: only the first documents of each task.
      include_path: folder of own task files.
      execution: how.
      quiet: no progress bars of ours.

    Raises:
      UserError: as `load_tasks`.
    """

    def __init__(
        self,
        names: Sequence[str],
        model: LlamaConfig,
        tokenizer: SentencePieceProcessor,
        mesh: Mesh,
        dtype,
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
        """What lm-eval makes of the answers; `jax.set_mesh` holds the mesh.

        Args:
          weights: in any dtype, on the devices of the mesh.

        Returns:
          {task or group: {metric: value}}. Where a task counts under several filters of the
          answers, the first.
        """
        results: Any = evaluate(
            self._lm(weights),
            self._tasks,
            limit=self._limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP,
            confirm_run_unsafe_code=code_allowed(),
        )
        found: dict[str, dict[str, float]] = {}
        for task, values in results["results"].items():
            for name, value in values.items():
                metric, _, answers = name.partition(",")
                if answers and isinstance(value, int | float):
                    found.setdefault(task, {}).setdefault(metric, float(value))
        return found


def load_tasks(
    names: Sequence[str], model: LlamaConfig, include_path: Path | None = None
) -> Mapping[str, Any]:
    """Tasks with their data, as lm-eval's evaluator takes them.

    What is neither on this machine nor offline (`HF_HUB_OFFLINE=1`) is downloaded by lm-eval.

    Args:
      names: of tasks, groups or tags of lm-eval, of suites of `SUITES`, or of own task files.
      model: that will be asked.
      include_path: folder of own task files.

    Raises:
      UserError: an unknown name, a dataset that cannot be had, or a task that
        the model cannot do.
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
        found = _load(manager, name)
        for task in found["tasks"].values():
            if count is not None or task.config.num_fewshot is None:
                task.set_config(key="num_fewshot", value=count or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            _check_task(task, model, allowed)
        for kind in loaded:
            loaded[kind] |= found.get(kind, {})
    return loaded


@functools.cache
def _task_manager(include_path: Path | None, include_defaults: bool) -> TaskManager:
    """lm-eval's index of task files; of its own, more than ten thousand, that takes seconds."""
    own = None if include_path is None else str(include_path)
    return TaskManager(include_path=own, include_defaults=include_defaults)


def _load(manager: TaskManager, name: str) -> Mapping[str, Any]:
    try:
        return manager.load([name])
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"The data of task {name}, or its metric, is not here and cannot be had "
            f"({first_line(error)}): run the same where there is network, copy what that leaves "
            f"in {HF_CACHE_HOME} to this machine, and set HF_HOME to the copy."
        ) from error


def _check_task(task, model: LlamaConfig, code_is_allowed: bool) -> None:
    """Raises `UserError` for what would only fail hours later."""
    require(
        code_is_allowed or not getattr(task, "UNSAFE_CODE", False),
        f"{task.config.task} runs the programs that the model writes, on this machine: set "
        "HF_ALLOW_CODE_EVAL=1 to allow that, or leave it out.",
    )
    if task.OUTPUT_TYPE != "generate_until":
        return
    wish = read_wish(task.config.task, task.config.generation_kwargs or {})
    require(
        wish.max_tokens < model.context,
        f"{task.config.task} asks for up to {wish.max_tokens} new tokens and the model's context "
        f"is {model.context}: leave it out.",
    )


def code_allowed() -> bool:
    """Whether programs that a model writes may run here, by the switch of Hugging Face's metric."""
    return os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
