"""Groups of a corpus written by Apache Beam: on a cluster that runs its pipelines, or one machine.

Workers see the source, the tokenizer and the dataset's folder under the same paths as the caller,
and have this package. They write shards and sidecars; the caller joins them.
"""

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import apache_beam as beam
from apache_beam.metrics.metric import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState

from tinyllama_jax.errors import UserError, require
from tinyllama_jax.files import write_aside
from tinyllama_jax.preparation.groups import Group, Preparation, write_group

# Beam's own DirectRunner first downloads another (Prism) from GitHub and runs that; this is the one
# in Python that it falls back to.
LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


def make_pipeline(runner: str, options: Sequence[str]) -> beam.Pipeline:
    """A pipeline without a step.

    Args:
      runner: `DirectRunner` is this machine; else a name or class of Beam's.
      options: NAME=VALUE, or NAME alone, of Beam's pipeline options.

    Raises:
      UserError: a runner or an option that Beam does not know, or a value that it does not take.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = PipelineOptions([f"--{option}" for option in options])
            known = parsed.get_all_options()
            named = parsed.get_all_options(retain_unknown_options=True)
    except SystemExit:  # argparse's way
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"--beam-options: {reason}.") from None
    unknown = sorted(named.keys() - known.keys())
    require(not unknown, f"--beam-options: Beam has no option {', '.join(unknown)}.")
    try:
        chosen = LOCAL_RUNNER if runner.lower() in ("direct", "directrunner") else runner
        return beam.Pipeline(runner=chosen, options=parsed)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--runner {runner}: {' '.join(str(error).split())}") from None


def run_groups(pipeline: beam.Pipeline, preparation: Preparation, groups: Sequence[Group]) -> None:
    """Writes the groups, each by one worker, and waits for them.

    Raises:
      UserError: what `write_group` raised first, when all are done; a pipeline that was cancelled.
    """
    if not groups:
        return
    for group in groups:
        _sentence(preparation, group).unlink(missing_ok=True)
    # Workers may stand in other folders.
    paths = {name: getattr(preparation, name).absolute() for name in ("source", "tokenizer", "out")}
    preparation = dataclasses.replace(preparation, **paths)
    _ = pipeline | beam.Create(groups) | beam.Reshuffle() | beam.Map(_write, preparation)
    try:
        ended = pipeline.run().wait_until_finish()
    except RuntimeError as error:
        # What Beam makes of Ctrl-C where a worker is this process.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    failed = [file for g in groups if (file := _sentence(preparation, g)).exists()]
    if sentences := [file.read_text() for file in failed]:
        for file in failed:
            file.unlink()
        raise UserError(sentences[0])
    require(ended == PipelineState.DONE, f"Beam ended as {ended}: the same command goes on.")


def _write(group: Group, preparation: Preparation) -> None:
    try:
        write_group(preparation, group, _count)
    except UserError as error:
        # As an exception, each runner would repeat it and wrap it in a traceback of its own.
        write_aside(_sentence(preparation, group), str(error))


def _sentence(preparation: Preparation, group: Group) -> Path:  # that the user should hear
    return preparation.sidecar(group).with_suffix(".error")


def _count(bytes_read: int, tokens: int) -> None:
    """For the runner's own display of progress."""
    Metrics.counter("tinyllama", "bytes_read").inc(bytes_read)
    Metrics.counter("tinyllama", "tokens").inc(tokens)
