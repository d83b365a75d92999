"""Writes an export's model card, README.md: what the model is, what it read, how to open it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tinyllama_jax.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What the files of a run say about one of its checkpoints."""

    step: int
    """The step of the checkpoint."""
    tokens: int
    """The number of tokens read up to this step."""
    config: dict[str, Any]
    """The content of the run's config.json."""
    metrics: Mapping[int, dict[str, Any]]
    """The metrics by step, in rising order; empty if the run has no metrics.jsonl."""
    origin: dict[str, Any] | None
    """The path, step and SHA-256 of the weights that the run began with; None for a random start.
    """

    def last(self, name: str) -> tuple[int, Any] | None:
        """The step and the value of a metric, at this checkpoint's step or the nearest before it.

        Validation is not logged at every step, so a checkpoint often has no value of its own.
        """
        steps = [step for step in self.metrics if step <= self.step and name in self.metrics[step]]
        return (steps[-1], self.metrics[steps[-1]][name]) if steps else None


def render(name: str, config: LlamaConfig, dtype: str, facts: RunFacts | None) -> str:
    """Writes the card of a model as Markdown, from the config and the run's own files alone.

    Args:
      name: the name of the export's folder.
      config: the model.
      dtype: the dtype of the exported weights.
      facts: what is known of the run; None if the model does not come from a run.
    """
    rope = f"{config.rope_base:g}"
    if config.rope_factor != 1:
        rope += f", positions divided by {config.rope_factor:g}"
    model = _table(
        ("model", ""),
        ("layers / width", f"{config.layers} / {config.width}"),
        (
            "query heads / kv heads / head width",
            f"{config.query_heads} / {config.kv_heads} / {config.head_width}",
        ),
        ("SwiGLU width", config.swiglu_width),
        ("vocabulary", config.vocab_size),
        ("context", config.context),
        ("RoPE base", rope),
        ("RMSNorm eps", f"{config.norm_eps:g}"),
        ("weights", f"{config.parameters():,}, {dtype}"),
    )
    return f"""# {name}

A Llama of {config.parameters():,} weights, exported by tinyllama-jax. It is a pretrained model: it
continues text.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

{model}
{_training(facts) if facts else ""}"""


def _training(facts: RunFacts) -> str:
    """The part of the card that tells of the training."""
    run = facts.config
    optimizer = run["optimizer"]
    rows = [
        ("training", ""),
        ("step", f"{facts.step:,} of {run['steps']:,}"),
        ("tokens read", f"{facts.tokens:,}"),
        ("rows of a step, at the start", f"{run['batch_rows']:,} of {run['model']['context']:,}"),
        (
            "learning rate",
            f"{optimizer['schedule']}, {optimizer['peak_lr']:g} to {optimizer['end_lr']:g}, "
            f"{optimizer['warmup_steps']:,} steps of warm-up",
        ),
        (
            "AdamW",
            f"betas {optimizer['beta1']:g} and {optimizer['beta2']:g}, eps {optimizer['eps']:g}, "
            f"weight decay {optimizer['weight_decay']:g}, norm clipped at "
            f"{optimizer['clip_norm']:g}",
        ),
        ("seed", run["seed"]),
    ]
    if facts.origin:
        rows.append(("began with", f"weights of sha256 {facts.origin['sha256']}"))
    # metrics.jsonl may lack a metric: the run may have been killed before it logged one, or the
    # file may not have been copied along.
    if loss := facts.last("train/loss"):
        rows.append((f"training loss at step {loss[0]:,}", _number(loss[1])))
    sources = [("source", "tokens read", "share", "held-out loss", "bits a byte", "at step")]
    for source in run["data"]["sources"]:
        read = facts.last(f"data/{source['name']}/tokens")
        loss = facts.last(f"val/{source['name']}/loss")
        bits = facts.last(f"val/{source['name']}/bpb")
        # Tokens of an earlier step would not add up with the number of all tokens read.
        at_step = read is not None and read[0] == facts.step
        sources.append(
            (
                source["name"],
                f"{read[1]:,.0f}" if read and at_step else "",
                f"{read[1] / facts.tokens:.2%}" if read and at_step else "",
                _number(loss[1]) if loss else "",
                _number(bits[1]) if bits else "",
                f"{loss[0]:,}" if loss else "",
            )
        )
    return f"""
{_table(*rows)}

Losses are nats a token. In the training data a document ends with `</s>` and has no `<s>`; the
tokenizer adds neither.

{_table(*sources)}
"""


def _number(value: float | None) -> str:
    """A metric with four decimals; metrics.jsonl holds null for a value that was not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def _table(header: tuple, *rows: tuple) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
