"""A run from its first step to its last, or to the signal that stops it."""

import contextlib
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tinyllama_jax.config import Config, differences, to_json
from tinyllama_jax.config_file import with_defaults
from tinyllama_jax.data.boundaries import loss_weights
from tinyllama_jax.data.tokenizer import ByteCounter
from tinyllama_jax.errors import require
from tinyllama_jax.evaluation import held_out
from tinyllama_jax.model.llama import Weights
from tinyllama_jax.performance import trace
from tinyllama_jax.performance.breakdown_table import render
from tinyllama_jax.runtime import processes, run_folder
from tinyllama_jax.runtime.checkpoint import Checkpoints, locked
from tinyllama_jax.runtime.compiler import keep_programs
from tinyllama_jax.runtime.mesh import make_mesh, put_batch
from tinyllama_jax.runtime.watch import watched
from tinyllama_jax.training import reports, warm_start
from tinyllama_jax.training.inputs import Inputs, batches_after, open_inputs
from tinyllama_jax.training.metrics import Metrics, Terminal
from tinyllama_jax.training.step import (
    MAX_SKIPPED_IN_A_ROW,
    State,
    abstract_state,
    compute_dtype,
    init_state,
    make_step,
)


class Diverged(Exception):
    """Loss or gradient was not finite several steps in a row."""


class Pending(NamedTuple):
    """A step that the devices may still work on."""

    step: int
    metrics: dict[str, jax.Array]
    vote: jax.Array | int
    """Whether a process was asked to stop, see `processes.Stop`."""


class Due(NamedTuple):
    """What the config asks for after a step, besides the step itself."""

    save: bool
    validate: bool
    assess: bool
    """Tasks of lm-evaluation-harness."""
    sample: bool


def due_after(step: int, config: Config) -> Due:
    """After the last step only the save is due here; the end of the run does the rest in full."""
    before_last = step < config.steps
    every = config.evaluation.every
    return Due(
        save=step == config.steps or step % config.checkpoint.every == 0,
        validate=before_last and step % config.validation.every == 0,
        assess=before_last and every > 0 and step % every == 0,
        sample=before_last and step % config.sample.every == 0,
    )


def run(config: Config, mesh: Mesh | None = None, profile: str | None = None) -> bool:
    """Trains, or goes on with the run that `config.run_folder` holds.

    Args:
      config: the run.
      mesh: devices with axes `data` and `fsdp`; all devices on `fsdp` by default. Where they belong
        to several processes, each of these calls this function.
      profile: START:STOP, steps to trace into RUN/profile/; it decides no number of the run.

    Returns:
      Whether the run is complete; False after SIGINT or SIGTERM, with a checkpoint saved.

    Raises:
      UserError: something in the config, the data or the run folder does not fit.
      Diverged: too many steps in a row were not finite; the last checkpoint is kept.
    """
    # ---- What the run reads. All of it is checked before anything is written.
    mesh = make_mesh() if mesh is None else mesh
    keep_programs(mesh)
    dtype, folder = compute_dtype(config, mesh), Path(config.run_folder)
    with processes.together():
        traced = trace.parse_steps(profile, config)
        inputs = open_inputs(config, mesh)
        score_tasks = reports.make_task_scorer(config, mesh, inputs.tokenizer, dtype)
    facts = {"config": to_json(config), "data": inputs.fingerprint, "profile": {"steps": profile}}
    processes.check_alike(facts | {"version": processes.software()})
    initial = warm_start.find_source(config)

    with locked(folder), jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        # ---- Where it begins: at the newest checkpoint, at given weights, or afresh.
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(folder, config.checkpoint))
        )
        watch = stack.enter_context(watched(folder))
        state, origin = begin(config, mesh, checkpoints, inputs.fingerprint, initial)
        first_step = int(state["step"])
        metrics = stack.enter_context(contextlib.closing(Metrics(folder, first_step)))
        terminal = stack.enter_context(contextlib.closing(Terminal(config.steps, first_step)))
        stop = processes.Stop(mesh)
        stack.enter_context(stop.listening())
        if first_step > config.steps:
            terminal.say(
                f"{folder} is at step {first_step}, past the {config.steps} steps asked for."
            )
            return True
        if processes.is_first():
            run_folder.describe_run(folder, config, mesh, origin)
            if first_step < config.steps:
                run_folder.set_incomplete(folder)
        profiler = trace.Profiler(traced, first_step, folder, config, mesh, terminal.say)
        stack.enter_context(contextlib.closing(profiler))

        train_step = make_step(config, mesh)
        batches = batches_after(first_step, config, inputs)
        new_sizes = {start for start, _ in config.batch_sizes()}  # where the step is compiled again
        clock = reports.Clock(first_step)
        report = functools.partial(
            report_step, config, mesh, inputs, clock, checkpoints, metrics, terminal, stop
        )
        score = held_out.make_score(
            config.model, mesh, dtype, config.execution, mask_documents=config.data.mask_documents
        )
        count_bytes = ByteCounter(inputs.tokenizer)
        validate = functools.partial(
            validate_sources, config, mesh, inputs, score, count_bytes, metrics, terminal
        )

        # ---- The loop.
        pending = None  # the step before, whose metrics have not been read yet
        for step in range(first_step + 1, config.steps + 1):
            if step > first_step + 1:  # the watch takes the first step for a part of the start
                watch.at("data", step)
            profiler.before(step, state)
            tokens_ABS = next(batches)
            if step > first_step + 1:
                watch.at("compile" if step - 1 in new_sizes else "step", step)
            loss_weights_ABT = loss_weights(tokens_ABS, config.data.first_tokens)
            batch = [put_batch(x, mesh, rows_axis=1) for x in (tokens_ABS, loss_weights_ABT)]
            state, step_metrics = train_step(state, *batch)

            # Read one step late, while the devices work on this one: they never wait for the host.
            if pending is not None:
                report(pending)
            pending = Pending(step, step_metrics, stop.vote())

            if step == profiler.last_step:
                jax.block_until_ready(state)  # or the pause would take some of the step's time
                watch.at("profile", step)
                with clock.paused():
                    if breakdown := profiler.end(train_step, state, batch):
                        terminal.console.print(render(breakdown))

            due = due_after(step, config)
            if any(due) or stop.signal:
                report(pending)
                pending = None
                with clock.paused(), profiler.paused():
                    if due.save or stop.signal:
                        watch.at("save", step)
                        save(checkpoints, state, step, config, inputs, origin)
                    if due.validate and not stop.signal:
                        watch.at("validation", step)
                        validate(step, state["weights"], config.validation.rows)
                    if due.assess and not stop.signal:
                        watch.at("evaluation", step)
                        assess(step, state["weights"], score_tasks, metrics, terminal)
                    if due.sample and not stop.signal:
                        watch.at("sample", step)
                        sample(step, state["weights"], config, inputs, dtype, terminal)
            checkpoints.poll()

            if stop.signal:
                if pending is not None:  # the signal came after its metrics were asked for
                    report(pending)
                watch.at("save", step)
                save(checkpoints, state, step, config, inputs, origin)  # unless it is saved already
                checkpoints.finish()
                terminal.say(
                    f"Stopped by {stop.signal} after step {step}, saved. "
                    "The same command again goes on from here."
                )
                return False

        # ---- The end. A run that is killed on its way through this does all of it again.
        checkpoints.finish()
        if processes.from_first(lambda: run_folder.is_complete(folder, config.steps)):
            terminal.say(f"{folder} is complete at step {config.steps}; nothing is left to train.")
            return True
        watch.at("evaluation", config.steps)
        assess(config.steps, state["weights"], score_tasks, metrics, terminal)
        watch.at("validation", config.steps)
        values = validate(config.steps, state["weights"], None)
        watch.at("sample", config.steps)
        sample(config.steps, state["weights"], config, inputs, dtype, terminal)
        watch.at("end", config.steps)
        if processes.is_first():
            terminal.console.print(reports.baselines(values, inputs, config.model.vocab_size))
            run_folder.set_complete(folder, config.steps)
        return True


def begin(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    fingerprint: dict[str, Any],
    initial: warm_start.Source | None,
) -> tuple[State, dict[str, Any] | None]:
    """The state that training goes on from, and whose weights the run began with (None: fresh).

    Args:
      config: the run.
      mesh: its devices.
      checkpoints: of the run; the newest decides.
      fingerprint: of the data.
      initial: weights to begin with where there is no checkpoint; None: fresh ones.

    Raises:
      UserError: the folder holds a run of another config or of other data.
    """
    newest = checkpoints.newest()
    if newest is None and initial is not None:
        return initial.state(config, mesh), initial.origin
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


def report_step(
    config: Config,
    mesh: Mesh,
    inputs: Inputs,
    clock: reports.Clock,
    checkpoints: Checkpoints,
    metrics: Metrics,
    terminal: Terminal,
    stop: processes.Stop,
    pending: Pending,
) -> None:
    """Reads a step's metrics and stop vote, and logs the metrics where the config asks for it.

    Raises:
      Diverged: too many steps in a row were not finite.
    """
    step = pending.step
    values = {name: float(value) for name, value in pending.metrics.items()}
    stop.agree(int(pending.vote))
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
    values |= inputs.ledger(config.rows_after(step))
    metrics.write(step, values)
    terminal.step(step, reports.line_of(values), clock.eta(step, config))


def save(
    checkpoints: Checkpoints,
    state: State,
    step: int,
    config: Config,
    inputs: Inputs,
    origin: dict[str, Any] | None,
) -> None:
    """Begins to save the state, with all that a later start compares itself to."""
    rows = config.rows_after(step)
    run_values = {"rows": rows, "fingerprint": inputs.fingerprint, "config": to_json(config)}
    checkpoints.save(state, run_values | {"ledger": inputs.ledger(rows), "origin": origin})


def validate_sources(
    config: Config,
    mesh: Mesh,
    inputs: Inputs,
    score: held_out.Score,
    count_bytes: ByteCounter,
    metrics: Metrics,
    terminal: Terminal,
    step: int,
    weights: Weights,
    rows: int | None,
) -> dict[str, float]:
    """Logs held-out loss and bits per byte of each source, over `rows` rows of it or all (None).

    Returns:
      The metrics of all sources.
    """
    values = {}
    for name, source_rows in zip(inputs.names, inputs.held_out, strict=True):
        loss, bits = reports.validate(
            weights, score, source_rows, count_bytes, config.micro_rows, mesh, rows
        )
        source = {f"val/{name}/loss": loss, f"val/{name}/bpb": bits}
        metrics.write(step, source)
        terminal.say(f"step {step}  val/{name}: loss {loss:.4f}  {bits:.3f} bits/byte")
        values |= source
    return values


def assess(
    step: int,
    weights: Weights,
    score_tasks: reports.ScoreTasks | None,
    metrics: Metrics,
    terminal: Terminal,
) -> None:
    """Logs the scores of the tasks that the config names, if it names any."""
    for task, values in reports.task_values(score_tasks(weights) if score_tasks else {}).items():
        metrics.write(step, {f"eval/{task}/{name}": value for name, value in values.items()})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        terminal.say(f"step {step}  eval/{task}: {shown}")


def sample(
    step: int,
    weights: Weights,
    config: Config,
    inputs: Inputs,
    dtype: jnp.dtype,
    terminal: Terminal,
) -> None:
    """Lets the model continue the config's prompts, and keeps the texts in the run folder."""
    texts = reports.sample(weights, inputs.tokenizer, config, dtype)
    reports.write_samples(texts, Path(config.run_folder), step)
    terminal.say(f"step {step}  sample: {texts[0]!r}")
