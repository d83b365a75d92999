"""A run from its first step to its last, or to the signal that stops it."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.table import Table
from sentencepiece import SentencePieceProcessor

from tinyllama_jax.config import Config, differences, to_json
from tinyllama_jax.config_file import with_defaults
from tinyllama_jax.data import mixture
from tinyllama_jax.data.boundaries import loss_weights
from tinyllama_jax.data.tokenizer import EOS, ByteCounter, load_tokenizer
from tinyllama_jax.errors import require
from tinyllama_jax.evaluation import held_out
from tinyllama_jax.evaluation.scores import TaskScores
from tinyllama_jax.files import write_aside
from tinyllama_jax.inference.generate import Sampler, generate
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.performance import trace
from tinyllama_jax.performance.breakdown_table import render
from tinyllama_jax.performance.flops import mfu
from tinyllama_jax.runtime import processes
from tinyllama_jax.runtime.checkpoint import Checkpoints, locked
from tinyllama_jax.runtime.compiler import keep_programs
from tinyllama_jax.runtime.mesh import check_fits, make_mesh, put_batch
from tinyllama_jax.runtime.watch import watched
from tinyllama_jax.training import warm_start
from tinyllama_jax.training.metrics import Metrics, Terminal, read_metrics
from tinyllama_jax.training.step import (
    MAX_SKIPPED_IN_A_ROW,
    State,
    abstract_state,
    check_attention,
    compute_dtype,
    init_state,
    make_step,
)

ScoreTasks = Callable[[Weights], TaskScores]

BASELINE_ROWS = 8192  # training rows that the bigram model is counted on


class Diverged(Exception):
    """Loss or gradient was not finite several steps in a row."""


def run(config: Config, mesh: Mesh | None = None, profile: str | None = None) -> bool:
    """Trains, or goes on with the run that `config.run_folder` holds.

    Args:
      config: the run.
      mesh: devices with axes `data` and `fsdp`; all devices on `fsdp` by default. Where they are of
        several processes, each of these calls this function.
      profile: START:STOP, steps to trace into RUN/profile/; no part of what the run is.

    Returns:
      Whether the run is complete; False after SIGINT or SIGTERM, with a checkpoint saved.

    Raises:
      UserError: something in the config, the data or the run folder does not fit.
      Diverged: too many steps in a row were not finite; the last checkpoint is kept.
    """
    mesh = make_mesh() if mesh is None else mesh
    keep_programs(mesh)
    with processes.together():
        traced = trace.parse_steps(profile, config)
        tokenizer, names, order, train_rows, held_out_rows, fingerprint = _check(config, mesh)
        score_tasks = _tasks(config, mesh, tokenizer)
    facts = {"config": to_json(config), "data": fingerprint, "version": processes.software()}
    facts["profile"] = {"steps": profile}
    processes.check_alike(facts)
    source = warm_start.find_source(config)
    folder = Path(config.run_folder)

    with locked(folder), jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(folder, config.checkpoint)
        stack.callback(checkpoints.close)
        watch = stack.enter_context(watched(folder))
        state, origin = _start(config, mesh, checkpoints, fingerprint, source)
        first_step = int(state["step"])
        metrics = Metrics(folder, first_step)
        stack.callback(metrics.close)
        terminal = Terminal(config.steps, first_step)
        stack.callback(terminal.close)
        stop = processes.Stop(mesh)
        stack.enter_context(stop.listening())
        if first_step > config.steps:
            terminal.say(
                f"{folder} is at step {first_step}, past the {config.steps} steps asked for."
            )
            return True
        if processes.is_first():
            _describe_run(folder, config, mesh, origin)
        profiler = trace.Profiler(traced, first_step, folder, config, mesh, terminal.say)
        stack.callback(profiler.close)

        train_step = make_step(config, mesh)
        dtype = compute_dtype(config, mesh)
        score = held_out.make_score(
            config.model, mesh, dtype, config.execution, mask_documents=config.data.mask_documents
        )
        count_bytes = ByteCounter(tokenizer)

        def report(step: int, device_metrics: dict[str, jax.Array | int]) -> None:
            """Reads the metrics of a step; stops the run if too many were not finite."""
            values = {name: float(value) for name, value in device_metrics.items()}
            stop.agree(values.pop("stop"))
            if values["train/skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
                raise Diverged(
                    f"Loss or gradient was not finite {MAX_SKIPPED_IN_A_ROW} steps in a row, up to "
                    f"step {step}: lower --optimizer.peak-lr, or look at the rows of these steps. "
                    f"Checkpoints kept: {checkpoints.steps()}."
                )
            if step % config.log_every and step not in (1, config.steps):
                terminal.step(step, None)
                return
            values |= clock.rates(step, config, mesh)
            values |= mixture.ledger(names, order, train_rows, config.rows_after(step))
            metrics.write(step, values)
            terminal.step(step, _line(values), clock.eta(step, config))

        def validate(step: int, rows: int | None) -> None:
            """Held-out loss and bits per byte of each source, over `rows` rows or all."""
            watch.at("validation", step)
            for name, source in zip(names, held_out_rows, strict=True):
                count = len(source) if rows is None else min(rows, len(source))
                unseen = [source[i] for i in range(count)]
                found = held_out.evaluate(score, state["weights"], unseen, config.micro_rows, mesh)
                bits = found.bits_per_byte(count_bytes(np.stack(unseen)))
                metrics.write(step, {f"val/{name}/loss": found.loss, f"val/{name}/bpb": bits})
                terminal.say(
                    f"step {step}  val/{name}: loss {found.loss:.4f}  {bits:.3f} bits/byte"
                )

        def assess(step: int, score_tasks: ScoreTasks) -> None:
            """Scores of the tasks that the config names."""
            watch.at("evaluation", step)
            for task, found in score_tasks(state["weights"]).items():
                values = {name: found[name] for name in found if not name.endswith("_stderr")}
                metrics.write(step, {f"eval/{task}/{name}": x for name, x in values.items()})
                shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                terminal.say(f"step {step}  eval/{task}: {shown}")

        def save(step: int) -> None:
            watch.at("save", step)
            rows = config.rows_after(step)
            values = {"rows": rows, "fingerprint": fingerprint, "config": to_json(config)}
            ledger = mixture.ledger(names, order, train_rows, rows)
            checkpoints.save(state, values | {"ledger": ledger, "origin": origin})

        rows = _batches(config, train_rows, order, first_step)
        new_sizes = {start for start, _ in config.batch_sizes()}  # the step is compiled again
        clock = _Clock(first_step)
        pending: tuple[int, dict[str, jax.Array | int]] | None = None
        for step in range(first_step + 1, config.steps + 1):
            if step > first_step + 1:  # the first step is a part of the start
                watch.at("data", step)
            profiler.before(step, state)
            tokens_ABS = next(rows)
            if step > first_step + 1:
                watch.at("compile" if step - 1 in new_sizes else "step", step)
            weights_ABT = loss_weights(tokens_ABS, config.data.first_tokens)
            batch = [put_batch(x, mesh, rows_axis=1) for x in (tokens_ABS, weights_ABT)]
            state, step_metrics = train_step(state, *batch)
            # Metrics are read one step late, while the devices work on this one.
            if pending is not None:
                report(*pending)
            pending = (step, step_metrics | {"stop": stop.vote()})

            if step == profiler.last_step:
                jax.block_until_ready(state)  # or the pause would take time of the step
                watch.at("profile", step)
                with clock.paused():
                    if found := profiler.end(train_step, state, batch):
                        terminal.console.print(render(found))

            last = step == config.steps
            saves = last or step % config.checkpoint.every == 0
            validates = step % config.validation.every == 0 and not last
            assesses = score_tasks and step % config.evaluation.every == 0 and not last
            samples = step % config.sample.every == 0 and not last
            if saves or validates or assesses or samples or stop.signal:
                report(*pending)
                pending = None
                with clock.paused(), profiler.paused():
                    if saves or stop.signal:
                        save(step)
                    if validates and not stop.signal:
                        validate(step, config.validation.rows)
                    if score_tasks and assesses and not stop.signal:
                        assess(step, score_tasks)
                    if samples and not stop.signal:
                        watch.at("sample", step)
                        _sample(config, state, tokenizer, dtype, folder, step, terminal)
            checkpoints.poll()
            if stop.signal:
                if pending is not None:  # the signal came after they were last looked at
                    report(*pending)
                save(step)  # unless it is saved: the signal may have come while validating
                checkpoints.finish()
                terminal.say(
                    f"Stopped by {stop.signal} after step {step}, saved. "
                    "The same command again goes on from here."
                )
                return False

        # The last validation reads all held-out rows; a run that was killed before it does it now.
        checkpoints.finish()
        last_loss = f"val/{names[-1]}/loss"
        if processes.from_first(lambda: last_loss in read_metrics(folder).get(config.steps, {})):
            terminal.say(f"{folder} is complete at step {config.steps}; nothing is left to train.")
            return True
        if score_tasks:
            assess(config.steps, score_tasks)
        validate(config.steps, None)
        watch.at("sample", config.steps)
        _sample(config, state, tokenizer, dtype, folder, config.steps, terminal)
        watch.at("end", config.steps)
        if processes.is_first():
            _compare_with_baselines(config, train_rows, held_out_rows, tokenizer, folder, terminal)
        return True


class _Inputs(NamedTuple):
    tokenizer: SentencePieceProcessor
    names: list[str]
    order: mixture.Mixture
    train_rows: list[mixture.Rows]
    held_out_rows: list[mixture.Rows]
    fingerprint: dict


def _check(config: Config, mesh: Mesh) -> _Inputs:
    """What the run reads; raises `UserError` where it does not fit the config or the mesh."""
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
    train_rows, held_out_rows = (
        [
            mixture.Rows(source.path, split, config.model.context, config.model.vocab_size)
            for source in config.data.sources
        ]
        for split in ("train", "validation")
    )
    fills = [source.fill for source in train_rows]
    order = mixture.make_mixture(config.data, config.model.context, fills)
    mixture.check_epochs(config.data, order, train_rows, config.rows_after(config.steps))
    return _Inputs(
        tokenizer=tokenizer,
        names=[source.name for source in config.data.sources],
        order=order,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        fingerprint=mixture.fingerprint(config.data, config.model.context, config.seed),
    )


def _tasks(config: Config, mesh: Mesh, tokenizer: SentencePieceProcessor) -> ScoreTasks | None:
    """The tasks that the run is scored by; raises `UserError` where they cannot be had."""
    asked = config.evaluation
    if not asked.every:
        return None
    from tinyllama_jax.evaluation import harness

    return harness.Tasks(
        asked.tasks,
        config.model,
        tokenizer,
        mesh,
        compute_dtype(config, mesh),
        limit=asked.limit,
        include_path=None if asked.include_path is None else Path(asked.include_path),
        execution=config.execution,
        quiet=True,
    ).score


def _start(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    fingerprint: dict,
    source: warm_start.Source | None,
) -> tuple[State, dict | None]:
    """The state of the newest checkpoint, of `source` or a fresh one, and whose weights it began
    with; refuses a run of another config."""
    newest = checkpoints.newest()
    if newest is None and source is not None:
        return source.state(config, mesh), source.origin
    if newest is None:
        return init_state(config, mesh), None
    step, values = newest
    changed = differences(with_defaults(values["config"], config), to_json(config))
    require(
        not changed,
        f"{config.run_folder} holds a run of another config ({'; '.join(changed)}): "
        "give another --run-folder, or the same options.",
    )
    require(
        values["fingerprint"] == fingerprint,
        f"{config.run_folder} was trained on other data than {config.data.tokenizer} and its "
        "sources hold now: restore those files, or give another --run-folder.",
    )
    if (before := values["config"]["steps"]) != config.steps > step and processes.is_first():
        print(f"steps: {before} -> {config.steps}: the new learning rates hold from step {step}.")
    return checkpoints.restore(step, abstract_state(config, mesh)), values["origin"]


def _batches(
    config: Config, train_rows: list[mixture.Rows], order: mixture.Mixture, first_step: int
) -> Iterator[np.ndarray]:
    """The batches of the steps after `first_step`: the order goes on where another size begins."""
    sizes = config.batch_sizes()
    ends = [start for start, _ in sizes[1:]] + [config.steps]
    for (start, micro_batches), end in zip(sizes, ends, strict=True):
        start = max(start, first_step)
        if start >= end:
            continue
        batches = mixture.batches(
            train_rows,
            order,
            seed=config.seed,
            start=config.rows_after(start),
            micro_batches=micro_batches,
            rows=config.micro_rows,
            process=jax.process_index(),
            processes=jax.process_count(),
        )
        yield from itertools.islice(batches, end - start)


def _describe_run(folder: Path, config: Config, mesh: Mesh, origin: dict | None) -> None:
    """Writes config.json, environment.json and tokenizer.model, so the folder stands alone."""
    packages = processes.software()
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    environment = {
        "python": packages.pop("python"),
        "packages": packages,
        "processes": jax.process_count(),
        "devices": [device.device_kind for device in mesh.devices.flat],
        "mesh": dict(mesh.shape),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "commit": commit,
        "began_with": origin,
    }
    write_aside(folder / "config.json", json.dumps(to_json(config), indent=2) + "\n")
    write_aside(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    # Each time: the one there may be of an earlier run that was stopped before any checkpoint.
    shutil.copyfile(config.data.tokenizer, folder / ".tokenizer.model")
    (folder / ".tokenizer.model").rename(folder / "tokenizer.model")


class _Clock:
    """Training time, without what validation, samples and checkpoints take."""

    def __init__(self, first_step: int):
        self._start, self._paused = time.monotonic(), 0.0
        self._last_step, self._last_time = first_step, 0.0
        self._compiled: tuple[int, float] | None = None

    def _now(self) -> float:
        return time.monotonic() - self._start - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self._paused += time.monotonic() - before

    def rates(self, step: int, config: Config, mesh: Mesh) -> dict[str, float]:
        """Speed since the last call; MFU for chips whose peak is known."""
        now = self._now()
        rows = config.rows_after(step) - config.rows_after(self._last_step)
        tokens = rows * config.model.context
        per_sec = tokens / (now - self._last_time)
        self._last_step, self._last_time = step, now
        self._compiled = self._compiled or (step, now)
        values = {
            "perf/tokens_per_sec": per_sec,
            "perf/tokens_per_sec_per_device": per_sec / mesh.size,
        }
        kind = mesh.devices.flat[0].device_kind
        for name, causal in [("full", False), ("causal", True)]:
            share = mfu(config.model, per_sec / mesh.size, kind, causal=causal)
            if share is not None:
                values[f"perf/mfu_{name}"] = share
        return values

    def eta(self, step: int, config: Config) -> float | None:
        """Seconds left at the mean speed since the first report, which was mostly compilation."""
        first_step, first_time = self._compiled or (step, 0.0)
        if step == first_step:
            return None
        first, now, last = map(config.rows_after, (first_step, step, config.steps))
        return (self._now() - first_time) / (now - first) * (last - now)


def _line(values: dict[str, float]) -> str:
    share = values.get("perf/mfu_full")
    return (
        f"loss {values['train/loss']:.4f}  lr {values['train/lr']:.2e}  "
        f"{values['perf/tokens_per_sec']:,.0f} tokens/s  "
        f"mfu {'n/a' if share is None else format(share, '.1%')}"
    )


def _sample(config, state, tokenizer, dtype, folder: Path, step: int, terminal: Terminal) -> None:
    """Lets the model continue the config's prompts and keeps what it says."""
    weights = jax.tree.map(lambda w: w.astype(dtype), state["weights"])
    prompts = [tokenizer.encode(prompt) for prompt in config.sample.prompts]
    new = generate(
        config.model,
        weights,
        prompts,
        max_tokens=config.sample.max_tokens,
        sampler=Sampler(config.sample.temperature),
        seed=config.seed,
        eos=EOS,
    )
    texts = [tokenizer.decode(start + ids) for start, ids in zip(prompts, new, strict=True)]
    if not processes.is_first():
        return
    (folder / "samples").mkdir(exist_ok=True)
    write_aside(folder / "samples" / f"{step:07}.txt", "\n---\n".join(texts) + "\n")
    terminal.say(f"step {step}  sample: {texts[0]!r}")


def _compare_with_baselines(config, train_rows, held_out_rows, tokenizer, folder, terminal) -> None:
    """Prints the last validation beside what simple models reach on the same held-out tokens."""
    last = read_metrics(folder)[config.steps]
    table = Table("held out", "tokens", "loss", "unigram", "bigram", "bits/byte", "gzip -9")
    for source, train, unseen in zip(config.data.sources, train_rows, held_out_rows, strict=True):
        rows_BS = np.stack([unseen[i] for i in range(len(unseen))])
        # Spread over all training rows: the first ones would be those of the first modules.
        some = np.linspace(0, len(train) - 1, min(len(train), BASELINE_ROWS)).astype(int)
        train_BS = np.stack([train[i] for i in some])
        vocab_size = config.model.vocab_size
        targets = rows_BS[:, 1:][loss_weights(rows_BS) > 0]
        # At once: decoded row by row, each would lose its leading space.
        text = tokenizer.decode(rows_BS[:, 1:].ravel().tolist()).encode()
        table.add_row(
            source.name,
            f"{len(targets):,}",
            f"{last[f'val/{source.name}/loss']:.3f}",
            f"{held_out.unigram_entropy(targets, vocab_size):.3f}",
            f"{held_out.bigram_loss(train_BS, rows_BS, vocab_size):.3f}",
            f"{last[f'val/{source.name}/bpb']:.3f}",
            f"{held_out.gzip_bits_per_byte(text):.3f}",
        )
    terminal.console.print(table)
