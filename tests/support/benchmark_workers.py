"""Stand-ins for the worker processes of benchmarks/, so that tests need not start any."""

import dataclasses
import time

from benchmarks import running
from tinyllama_jax.config import LlamaConfig


def our_spec(model: LlamaConfig, rows: int, **options) -> running.Spec:
    """What a worker is asked for our step in fp32, in micro-batches of four rows.

    Args:
      model: trained instead of a named one.
      rows: of a step.
      options: fields of ExecutionConfig.
    """
    spec = running.spec_of("tiny", rows, "float32", 2, micro_rows=4)
    spec |= {"whose": "tinyllama_jax", "options": options, "flags": {}, "without": ("norm", "loss")}
    spec |= {"predict": True, "begun": time.time()}
    return spec | {"model": dataclasses.asdict(model)}


def work_in_this_process(monkeypatch, run) -> None:
    """Makes `running.in_own_process` call `run(spec)`, on a machine without a GPU."""

    def in_this_process(module, spec, seconds, environment=None):
        return run(spec | {"begun": time.time()})

    monkeypatch.setattr(running, "in_own_process", in_this_process)
    monkeypatch.setattr(running, "device_kind", lambda: "cpu")
