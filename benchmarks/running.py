"""Models, worker processes and result files, which the benchmarks share.

Nothing here imports JAX or torch: the process that starts the workers must not hold memory of the
device that they measure.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from tinyllama_jax.config import DEMO, TINYLLAMA_1B, TINYLLAMA_120M, LlamaConfig
from tinyllama_jax.errors import UserError, first_line
from tinyllama_jax.files import make_folder, write_aside
from tinyllama_jax.runtime.allocator import take_card

T = TypeVar("T")

# A rehearsal (benchmarks/card/rehearse.py) runs on a CPU everything that a card would run: every
# model is the tiny one, shapes are those of --quick, and attention is plain JAX. Programs learn
# from this variable that they are part of one.
REHEARSED = bool(os.environ.get("TINYLLAMA_REHEARSED"))
REHEARSAL = "REHEARSED on a CPU with a stand-in for the card: this says NOTHING about any device."

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
if REHEARSED:
    MODELS = dict.fromkeys(MODELS, TINY)
RESULTS = REPOSITORY / "benchmarks" / ("rehearsed" if REHEARSED else "results")
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "tokamax"),
    *("torch", "triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "transformers"),
)
QUICK = "Quick: these numbers say NOTHING about any device."
OUT_OF_MEMORY = "out of memory"  # how such a failure begins
NO_TIME = "no time left"
NOT_KNOWN = "NOT KNOWN: "

Spec = dict[str, Any]
"""A worker's task, as JSON: `whose` (`tinyllama_jax`, or another system's name), `model`,
`rows` and `micro_rows` of a step, `precision`, `options`, `steps`, and `begun`, the time.time() at
which the worker was started."""


def is_quick(options: Any) -> bool:
    """Whether the shapes are so small that their times mean nothing."""
    return options.quick or REHEARSED


def spec_of(
    model: str, rows: int, precision: str, steps: int, micro_rows: int | None = None
) -> Spec:
    """The part of a spec that is the same for all systems of a benchmark."""
    return {
        "model": dataclasses.asdict(MODELS[model]),
        "rows": rows,
        "micro_rows": micro_rows or rows,
        "precision": precision,
        "steps": steps,
    }


def in_own_process(
    module: str, spec: Spec, seconds: float, environment: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Runs the worker of a benchmark in a new process and returns its result.

    Args:
      module: name of a benchmark that ends with `command`, such as `benchmarks.step.training`.
      spec: what the worker is asked to do, without `begun`.
      seconds: time after which the worker is killed; it is not started if this is not positive.
      environment: variables that the worker has besides those of this process; None removes one.

    Returns:
      The worker's result, or `failure` with the reason in one line. What a failed worker printed
      goes to this process's stderr.
    """
    if seconds <= 0:
        return {"failure": NO_TIME}
    asked = json.dumps(spec | {"begun": time.time()})
    # JAX would take most of the memory at once, and then not tell how much of it it needs; and the
    # last line of an error would be about the frames that JAX filters out.
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}
    changed = os.environ | own | (environment or {})
    given = {name: value for name, value in changed.items() if value is not None}
    # Modules come from this repository, whatever lies in the folder that the user is in (-P).
    given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), given.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="worker-") as folder:
        # Files and not pipes: libraries print whatever they like, processes that they started may
        # hold a pipe open, and some crash the worker after its work is done.
        result, log = Path(folder, "result.json"), Path(folder, "log")
        command = [sys.executable, "-P", "-m", module, "--worker", asked, str(result)]
        with log.open("wb") as printed:
            try:
                code = subprocess.run(
                    command, env=given, stdout=printed, stderr=printed, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        said = log.read_text(errors="replace")
        if result.exists():  # and then it is complete, since it was renamed into place
            lines = [line for line in said.splitlines() if line.startswith(NOT_KNOWN)]
            print("\n".join(lines), file=sys.stderr, end="\n" * bool(lines))
            return json.loads(result.read_text())
    print(said[-8000:], file=sys.stderr)
    if code is None:
        return {"failure": f"not done within {seconds:.0f} s"}
    return {"failure": _why(code, said)}


def _why(code: int, said: str) -> str:
    """The reason why a process left no result, by its exit code and output, in one line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code < 0:
        killed = f"killed by {signal.Signals(-code).name}"
        return f"{killed}: {lines[-1]}"[:160] if lines else killed
    # The last line says little: XLA adds tables to an error, and libraries print as they exit.
    errors = [line for line in said.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    last = (errors or lines or [f"exit code {code} without a result"])[-1]
    if re.search(r"out of memory|OutOfMemory|RESOURCE_EXHAUSTED", last, re.IGNORECASE):
        last = f"{OUT_OF_MEMORY}: {last}"
    return last[:160]


def if_known(what: str, tell: Callable[[], T]) -> T | None:
    """Returns what `tell` returns, or None and a line on stderr if it raises.

    Everything that only describes or predicts is called through here, since its failure must not
    cost a measurement: a program from a cache may not know its memory, a device may not report how
    full it is.
    """
    try:
        return tell()
    except Exception as error:  # libraries raise anything if they have nothing to tell
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        print(f"{NOT_KNOWN}{what}: {reason}", file=sys.stderr)
        return None


def own_caches(folder: str) -> dict[str, str | None]:
    """Variables by which compiled programs are cached in `folder`, and looked for nowhere else."""
    torch = {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
    }
    return {"XDG_CACHE_HOME": folder, "JAX_COMPILATION_CACHE_DIR": None} | torch


def device_kind() -> str:
    """The name of the device, without starting a framework here, which would hold its memory."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True)
        return shown.stdout.splitlines()[0]
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "cpu"


def versions() -> dict[str, str | None]:
    """The version of each package that matters for speed, None where it is not installed."""
    installed: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def commit() -> str | None:
    """The commit that the variable COMMIT names, or else the one that is checked out.

    It is given in full, with `-dirty` if files differ from it. The variable comes first, because a
    rented machine may have the files of one commit and the git folder of another.
    """
    if named := os.environ.get("COMMIT"):
        return named
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        # Without this, git would describe any repository that the files happen to lie in.
        if (REPOSITORY / ".git").exists():
            shown = subprocess.run([*git, "--dirty"], capture_output=True, text=True, check=True)
            return shown.stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pass
    return None


def results_path(options: Any, name: str, device: str) -> Path | None:
    """The path for results, without suffix: `options.out`, or benchmarks/results/DATE-NAME-DEVICE.

    It is None with `options.quick` and no `out`. A rehearsal writes to benchmarks/rehearsed/.
    """
    if options.quick and options.out is None:
        return None
    date = datetime.date.today().isoformat()
    out = options.out or RESULTS / f"{date}-{name}-{device.replace(' ', '-')}"
    return RESULTS / f"REHEARSED-{out.name}" if REHEARSED else out


def suffixed(out: Path, suffix: str) -> Path:
    """The path with a suffix appended, even if there are dots in its name."""
    return out.with_name(out.name + suffix)


def marked(title: str, lines: list[str]) -> tuple[str, list[str]]:
    """A title and lines below a table; in a rehearsal, both say that it was one."""
    return (f"REHEARSED: {title}", [REHEARSAL, *lines]) if REHEARSED else (title, lines)


def show(title: str, table: list[list[str]], lines: list[str]) -> None:
    """Prints a table, whose first row is the headings, and lines below it.

    Headings are broken into two lines after a comma.
    """
    title, lines = marked(title, lines)
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
    """Writes a table, whose first row is the headings, to `out`.md, and `facts` to `out`.json."""
    title, legend = marked(title, legend)
    make_folder(out.parent)
    result = {"device": device, "versions": versions(), "commit": commit(), "rehearsed": REHEARSED}
    result |= facts
    write_aside(suffixed(out, ".json"), json.dumps(result, indent=1) + "\n")
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    head, *rows = table
    lines = [f"# {title}", "", *legend, f"Commit {result['commit']}, {known}.", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [cell.replace("|", "/") for cell in row] + [""] * (len(head) - len(row))
        lines.append(f"| {' | '.join(cells)} |")
    write_aside(suffixed(out, ".md"), "\n".join(lines) + "\n")


def command(
    options: type,
    description: str | None,
    main: Callable[[Any], int],
    worker: Callable[[Spec], Any] | None = None,
) -> None:
    """Runs a benchmark from the command line, or its worker if `in_own_process` started it.

    Args:
      options: dataclass of the options that `main` takes.
      description: text of `--help`.
      main: takes the options and returns the exit code.
      worker: takes a spec and returns a result that JSON can hold.
    """
    take_card()  # before anything starts JAX
    if worker and sys.argv[1:2] == ["--worker"]:
        asked, result = sys.argv[2:]
        write_aside(Path(result), json.dumps(worker(json.loads(asked))))
        sys.exit()
    try:
        sys.exit(main(tyro.cli(options, description=description)))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
