"""`tinyllama eval`."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from tinyllama_jax.errors import ExitCode, require


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Score a model by tasks of lm-evaluation-harness, which downloads data that is not here."""

    path: Positional[Path]
    """A run folder, which keeps the scores in results.json; or a Hugging Face folder."""
    tasks: tuple[str, ...]
    """`commonsense` or `instruct`, the original's tasks; or names of lm-eval's or own ones."""
    step: int | None = None
    """Checkpoint to take; the newest by default."""
    limit: int | None = None
    """Only the first documents of each task."""
    include_path: Path | None = None
    """Folder of own task files."""


def evaluate(options: EvaluateOptions) -> int:
    """Prints the scores, beside those the original published.

    Raises:
      UserError: no model there, lm-evaluation-harness is not installed, or a task it does not have.
    """
    import jax
    from rich.console import Console

    from tinyllama_jax.conversion import convert
    from tinyllama_jax.data.tokenizer import load_tokenizer
    from tinyllama_jax.evaluation import harness, scores
    from tinyllama_jax.runtime.mesh import auto_dtype, make_mesh, on_every_device

    path, limit = options.path, options.limit
    require(limit is None or limit > 0, "--limit must be above 0.")
    model = convert.open_model(path, options.step)
    tokenizer = load_tokenizer(path / "tokenizer.model")
    mesh = make_mesh()
    dtype = auto_dtype(mesh)
    asked = harness.Tasks(
        options.tasks,
        model.config,
        tokenizer,
        mesh,
        dtype,
        limit=limit,
        include_path=options.include_path,
    )
    with jax.set_mesh(mesh):
        results = asked.score(on_every_device(model.weights, mesh, dtype))
    name = path.resolve().name
    if model.facts:  # of a run
        scores.write_results(path, model.facts.step, results, limit)
        name = f"step {model.facts.step}"
    Console().print(scores.render(name, results, options.tasks, limit))
    return ExitCode.DONE
