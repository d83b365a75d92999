"""What the benchmarks of the training step share: models, processes of their own, results on disk.

Nothing here imports JAX or torch, so that the process which starts the others holds no memory of
the device.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from tinyllama_jax.config import (
    DEMO,
    TINYLLAMA_1B,
    TINYLLAMA_120M,
    LlamaConfig,
    UserError,
    make_folder,
    write_aside,
)

REPOSITORY = Path(__file__).parents[1]
TINY = LlamaConfig(
    vocab_size=512,
    layers=2,
    width=64,
    query_heads=4,
    kv_heads=2,
    head_width=16,
    swiglu_width=96,
    context=64,
)
MODELS = {"1b": TINYLLAMA_1B, "120m": TINYLLAMA_120M, "demo": DEMO, "tiny": TINY}
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "tokamax"),
    *("torch", "triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "transformers"),
)
QUICK = "Quick: these numbers say NOTHING about any device."

Spec = dict[str, Any]
"""What a process is told to do, as JSON: `whose` (`tinyllama_jax`, or another system's name),
`model`, `rows` and `micro_rows` of a step, `precision`, `options`, `steps`, and in `begun` the
time.time() at which it was started."""


def spec_of(
    model: str, rows: int, precision: str, steps: int, micro_rows: int | None = None
) -> Spec:
    """What all systems of a benchmark are told alike."""
    return {
        "model": dataclasses.asdict(MODELS[model]),
        "rows": rows,
        "micro_rows": micro_rows or rows,
        "precision": precision,
        "steps": steps,
    }


def in_own_process(
    script: str, spec: Spec, seconds: float, environment: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """What `script --worker SPEC` prints last, or `failure`: one line.

    Args:
      script: path of a benchmark that ends with `command`.
      spec: without `begun`.
      seconds: after which it is killed.
      environment: what it has besides this process's own; None: has not.
    """
    asked = json.dumps(spec | {"begun": time.time()})
    command = [sys.executable, script, "--worker", asked]
    # JAX would take most of the memory at once, and say nothing of how much it needs; and the last
    # line of an error would be about what it filters.
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}
    changed = os.environ | own | (environment or {})
    given = {name: value for name, value in changed.items() if value is not None}
    try:
        shown = subprocess.run(command, env=given, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failure": f"not done within {seconds:.0f} s"}
    if shown.returncode:
        lines = [line for line in shown.stderr.splitlines() if line.strip()]
        return {"failure": (lines or [f"exit code {shown.returncode}"])[-1][:160]}
    return json.loads(shown.stdout.splitlines()[-1])


def own_caches(folder: str) -> dict[str, str | None]:
    """An environment in which programs are kept for those alone who share the folder."""
    torch = {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
    }
    return {"XDG_CACHE_HOME": folder, "JAX_COMPILATION_CACHE_DIR": None} | torch


def device_kind() -> str:
    """By name, without starting a framework in this process, which would hold memory."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True)
        return shown.stdout.splitlines()[0]
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "cpu"


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """What is checked out, in full and with `-dirty` where files differ; None without git."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        shown = subprocess.run([*git, "--dirty"], capture_output=True, text=True, check=True)
        return shown.stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def results_path(options: Any, name: str, device: str) -> Path | None:
    """Where results go, without suffix: `options.out`, else benchmarks/results/DATE-NAME-DEVICE,
    and nowhere with `options.quick`."""
    if options.out is not None or options.quick:
        return options.out
    date = datetime.date.today().isoformat()
    return REPOSITORY / "benchmarks" / "results" / f"{date}-{name}-{device.replace(' ', '-')}"


def suffixed(out: Path, suffix: str) -> Path:
    """The path with a suffix more, whatever dots are in its name."""
    return out.with_name(out.name + suffix)


def show(title: str, table: list[list[str]], lines: list[str]) -> None:
    """Prints the table, headings first, and lines below it; headings break after a comma."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    head, *rows = table
    for name in head:
        shown.add_column(name.replace(", ", ",\n"), justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    for line in lines:
        console.print(line, markup=False, highlight=False)


def write_results(
    out: Path, device: str, title: str, legend: list[str], table: list[list[str]], facts: Spec
) -> None:
    """Writes the table to `out`.md, headings first, and all that was found to `out`.json."""
    make_folder(out.parent)
    told = {"device": device, "versions": versions(), "commit": commit()} | facts
    write_aside(suffixed(out, ".json"), json.dumps(told, indent=1) + "\n")
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    head, *rows = table
    lines = [f"# {title}", "", *legend, f"Commit {told['commit']}, {known}.", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(row + [''] * (len(head) - len(row)))} |" for row in rows]
    write_aside(suffixed(out, ".md"), "\n".join(lines) + "\n")


def command(
    options: type,
    description: str | None,
    main: Callable[[Any], int],
    worker: Callable[[Spec], Any] | None = None,
) -> None:
    """A benchmark's command line: `main` by its options, or `worker` in a process of its own."""
    if worker and sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(json.loads(sys.argv[2]))))
        sys.exit()
    try:
        sys.exit(main(tyro.cli(options, description=description)))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
