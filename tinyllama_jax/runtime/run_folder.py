"""The files that let a run's folder stand alone, and the fact that the run is complete."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tinyllama_jax.config import Config, to_json
from tinyllama_jax.files import write_aside
from tinyllama_jax.runtime import processes

COMPLETE = "complete.json"


def describe_run(folder: Path, config: Config, mesh: Mesh, origin: dict[str, Any] | None) -> None:
    """Writes config.json, environment.json and tokenizer.model.

    Args:
      folder: of the run.
      config: the run.
      mesh: its devices.
      origin: whose weights the run began with; None: fresh ones.
    """
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
    # Copied at each start: the one that is there may be of an earlier run, which was stopped before
    # its first checkpoint.
    write_aside(folder / "tokenizer.model", Path(config.data.tokenizer).read_bytes())


def is_complete(folder: Path, step: int) -> bool:
    """Whether the run has ended with this step: last checkpoint, validation, tasks and samples."""
    try:
        return json.loads((folder / COMPLETE).read_text())["step"] == step
    except (OSError, ValueError, KeyError, TypeError):
        return False


def set_complete(folder: Path, step: int) -> None:
    """Notes that nothing is left to do for a run that ends with this step."""
    write_aside(folder / COMPLETE, json.dumps({"step": step}) + "\n")


def set_incomplete(folder: Path) -> None:
    """Forgets an earlier end: a run that is begun again makes all of it anew."""
    (folder / COMPLETE).unlink(missing_ok=True)
