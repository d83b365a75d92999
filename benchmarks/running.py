"""What the benchmarks of the training step share: models, processes of their own, results on disk.

Nothing here imports JAX or torch, so that the process which starts the others holds no memory of
the device.
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

# A rehearsal (rehearse.py) goes through all that a card would, on a CPU: every model is the tiny
# one, shapes are those of --quick, and attention is plain JAX. This is where programs learn it.
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
"""What a process is told to do, as JSON: `whose` (`tinyllama_jax`, or another system's name),
`model`, `rows` and `micro_rows` of a step, `precision`, `options`, `steps`, and in `begun` the
time.time() at which it was started."""


def is_quick(options: Any) -> bool:
    """Whether shapes are so small that they time nothing."""
    return options.quick or REHEARSED


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
    """What the worker of a script found, or `failure`: one line. What it printed before it failed
    goes to this process's stderr.

    Args:
      script: path of a benchmark that ends with `command`.
      spec: without `begun`.
      seconds: after which it is killed; it is not begun where there are none.
      environment: what it has besides this process's own; None: has not.
    """
    if seconds <= 0:
        return {"failure": NO_TIME}
    asked = json.dumps(spec | {"begun": time.time()})
    # JAX would take most of the memory at once, and say nothing of how much it needs; and the last
    # line of an error would be about what it filters.
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}
    changed = os.environ | own | (environment or {})
    given = {name: value for name, value in changed.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="worker-") as folder:
        # Files, not pipes: libraries print what they like to, what they have started may hold a
        # pipe open, and some bring the process down when all is done.
        result, log = Path(folder, "result.json"), Path(folder, "log")
        command = [sys.executable, script, "--worker", asked, str(result)]
        with log.open("wb") as printed:
            try:
                code = subprocess.run(
                    command, env=given, stdout=printed, stderr=printed, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        said = log.read_text(errors="replace")
        if result.exists():  # and it is whole
            lines = [line for line in said.splitlines() if line.startswith(NOT_KNOWN)]
            print("\n".join(lines), file=sys.stderr, end="\n" * bool(lines))
            return json.loads(result.read_text())
    print(said[-8000:], file=sys.stderr)
    if code is None:
        return {"failure": f"not done within {seconds:.0f} s"}
    return {"failure": _why(code, said)}


def _why(code: int, said: str) -> str:
    """Why a process left no result, in a line: by its exit code and what it printed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code < 0:
        killed = f"killed by {signal.Signals(-code).name}"
        return f"{killed}: {lines[-1]}"[:160] if lines else killed
    # Not the last line: XLA adds tables to an error, and libraries say good-bye.
    errors = [line for line in said.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    last = (errors or lines or [f"exit code {code} without a result"])[-1]
    if re.search(r"out of memory|OutOfMemory|RESOURCE_EXHAUSTED", last, re.IGNORECASE):
        last = f"{OUT_OF_MEMORY}: {last}"
    return last[:160]


def if_known(what: str, tell: Callable[[], T]) -> T | None:
    """What `tell` says of a program or a device, or None and a line on stderr.

    All that describes or foretells goes through here, since it must never cost what was measured:
    a program from a cache need not tell its memory, nor a device how full it is.
    """
    try:
        return tell()
    except Exception as error:  # whatever a library raises where it has nothing to tell
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        print(f"{NOT_KNOWN}{what}: {reason}", file=sys.stderr)
        return None


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
    """What COMMIT says, or what is checked out: in full, and with `-dirty` where files differ.

    A machine that is lent may have the files of one commit and the git folder of another, so that
    whoever sends them has the word.
    """
    if named := os.environ.get("COMMIT"):
        return named
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        # Or git would tell of a repository that the files happen to lie in.
        if (REPOSITORY / ".git").exists():
            shown = subprocess.run([*git, "--dirty"], capture_output=True, text=True, check=True)
            return shown.stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pass
    return None


def results_path(options: Any, name: str, device: str) -> Path | None:
    """Where results go, without suffix: `options.out`, else benchmarks/results/DATE-NAME-DEVICE,
    and nowhere with `options.quick`. What is rehearsed goes to benchmarks/rehearsed/."""
    if options.quick and options.out is None:
        return None
    date = datetime.date.today().isoformat()
    out = options.out or RESULTS / f"{date}-{name}-{device.replace(' ', '-')}"
    return RESULTS / f"REHEARSED-{out.name}" if REHEARSED else out


def suffixed(out: Path, suffix: str) -> Path:
    """The path with a suffix more, whatever dots are in its name."""
    return out.with_name(out.name + suffix)


def marked(title: str, lines: list[str]) -> tuple[str, list[str]]:
    """Both with what a reader of a rehearsal must know."""
    return (f"REHEARSED: {title}", [REHEARSAL, *lines]) if REHEARSED else (title, lines)


def show(title: str, table: list[list[str]], lines: list[str]) -> None:
    """Prints the table, headings first, and lines below it; headings break after a comma."""
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
    """Writes the table to `out`.md, headings first, and all that was found to `out`.json."""
    title, legend = marked(title, legend)
    make_folder(out.parent)
    told = {"device": device, "versions": versions(), "commit": commit(), "rehearsed": REHEARSED}
    told |= facts
    write_aside(suffixed(out, ".json"), json.dumps(told, indent=1) + "\n")
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    head, *rows = table
    lines = [f"# {title}", "", *legend, f"Commit {told['commit']}, {known}.", ""]
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
    """A benchmark's command line: `main` by its options, or `worker` in a process of its own."""
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
