"""The documentation: commands parse and run, links lead somewhere, numbers are the measured ones.

A command in a block of bash is run here, unless a comment behind it or above it in the block begins
with "needs", and says what no test has: hardware, a corpus, a network, minutes.
"""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

from support.paths import ROOT
from tinyllama_jax import cli
from tinyllama_jax.errors import ExitCode

README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs/performance.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MAKE_PAGES = runpy.run_path(str(ROOT / "docs/make_pages.py"))
RESULTS = ROOT / "benchmarks/results"


class Command(NamedTuple):
    page: str
    text: str
    needs: str
    """What its comment says after "needs"; empty where it needs nothing."""

    @property
    def words(self) -> list[str]:
        """Without the variables that stand before it."""
        words = shlex.split(self.text)
        while "=" in words[0]:
            words = words[1:]
        return words


def commands() -> list[Command]:
    """Every command of every block of bash, once each."""
    found: dict[str, Command] = {}
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            needs = ""
            for line in block.splitlines():
                text, _, comment = re.sub(r"(^|\s)#\s", "\0", line).partition("\0")
                own = comment.removeprefix("needs ") if comment.startswith("needs ") else ""
                if not text.strip():
                    needs = own or needs
                    continue
                command = Command(page.name, text.strip(), own or needs)
                found.setdefault(command.text, command)
    return list(found.values())


COMMANDS = commands()
RUN_HERE = [command for command in COMMANDS if not command.needs]


def name(command: Command) -> str:
    return f"{command.page}: {command.text[:60]}"


class Parsed(Exception):
    """The command line is read, and what it asks for is not done."""


@pytest.fixture
def parse(monkeypatch):
    """Reads a command line of `tinyllama` as the command itself does, and stops there."""
    real = tyro.cli

    def only_parse(what, **options):
        if isinstance(what, type):
            real(what, **options)
            raise Parsed

        def nothing(*_, **__):
            raise Parsed

        nothing.__wrapped__ = what  # whose parameters and docstring tyro reads
        nothing.__doc__, nothing.__annotations__ = what.__doc__, what.__annotations__
        real(nothing, **options)

    monkeypatch.setattr(tyro, "cli", only_parse)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")  # or the command would leave its own
    monkeypatch.chdir(ROOT)

    def parse(words):
        with pytest.raises(Parsed):
            assert cli.main(words) == "parsed"  # the code of an error, whose line pytest shows

    return parse


def check_tinyllama(words, parse):
    parse(words[1:])


def check_python(words, parse):
    script = words[1]
    if script == "-m":
        script = words[2].replace(".", "/") + ".py"
        source = (ROOT / script).read_text()
        for option in (word for word in words[3:] if word.startswith("--")):
            assert re.search(rf"\b{option[2:].replace('-', '_')}\b", source), option
    assert (ROOT / script).is_file(), script
    if script.startswith("launch/"):
        parse(["train", *words[2:]])


def check_sbatch(words, parse):
    assert (ROOT / words[1]).is_file(), words[1]
    parse(["train", *words[2:]])


def check_make(words, _):
    for target in words[1:]:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def check_pip(words, _):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[1:3] == ["install", "-e"]
    for extra in re.fullmatch(r"\.\[([\w,]+)\]", words[3])[1].split(","):
        assert extra in extras["optional-dependencies"]


def check_bash(words, _):
    assert (ROOT / words[1]).is_file(), words[1]


def check_activate(words, _):
    venv = re.search(r"^VENV \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert words == [".", f"{venv}/bin/activate"]


CHECKS = {
    "tinyllama": check_tinyllama,
    "python": check_python,
    "sbatch": check_sbatch,
    "make": check_make,
    "pip": check_pip,
    "bash": check_bash,
    ".": check_activate,
}


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_a_command_is_one_that_there_is(command, parse):
    CHECKS[command.words[0]](command.words, parse)


def test_the_stages_that_gpu_sh_is_asked_for_are_its_own():
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    asked = re.findall(r'STAGES="([^"]+)"', " ".join(command.text for command in COMMANDS))
    assert asked
    for stage in " ".join(asked).split():
        assert f"stage_{stage}()" in script


# What a run of the README is cut down to; its micro-batch is split over the suite's devices.
TINY = (
    "--steps 2 --optimizer.warmup-steps 1 --micro-batches 1"
    " --model.layers 1 --model.width 32 --model.swiglu-width 32"
)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """A folder with text, the configs, and what the README makes of them; runs/demo is that run."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "notes").mkdir()
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    for source in sources[:120]:
        (folder / "notes" / f"{source.stem}.txt").write_text(source.read_text())
    for command in RUN_HERE:
        if command.words[:2] in (["tinyllama", "tokenizer"], ["tinyllama", "prepare"]):
            execute(command, folder)
        if command.words[:2] == ["tinyllama", "train"]:
            execute(command, folder, TINY)
    shutil.copytree(folder / "runs/own", folder / "runs/demo")
    return folder


def execute(command: Command, folder: Path, more: str = "") -> None:
    """Runs a command of `tinyllama` in a folder, with its `*` filled in and further options."""
    with contextlib.chdir(folder):
        words = []
        for word in [*command.words[1:], *shlex.split(more)]:
            words += sorted(map(str, Path().glob(word))) if "*" in word else [word]
        assert cli.main(words) == ExitCode.DONE


@pytest.mark.parametrize("command", RUN_HERE, ids=name)
def test_a_command_that_needs_nothing_runs(command, newcomer):
    verb = command.words[:2]
    if verb[0] == ".":
        return  # changes a shell, and does nothing
    assert verb[0] == "tinyllama", f'say what "{command.text}" needs'
    if verb[1] in ("tokenizer", "prepare", "train"):
        return  # by the fixture, since the others read what they make
    execute(command, newcomer)


LINKED = [*sorted(ROOT.glob("*.md")), *PAGES[1:]]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert [MAKE_PAGES["anchor"](found) for found in headings].count(heading) == 1, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_in_the_repository(page):
    rooms = "configs|launch|docs|tests|benchmarks|tinyllama_jax|notebooks"
    for path in re.findall(rf"(?<![\w./-])(?:{rooms})/[\w./-]+\w", page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_page_is_linked_from_the_readme():
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in README.read_text()


def test_the_map_names_every_room():
    tree = re.search(r"^```\nlaunch/.*?^```", README.read_text(), re.MULTILINE | re.DOTALL)[0]
    packages = [path.parent.name for path in ROOT.glob("tinyllama_jax/*/__init__.py")]
    for room in [*packages, "launch", "configs", "docs", "notebooks", "benchmarks", "tests"]:
        assert re.search(rf"(^| ){room}/", tree, re.MULTILINE), room


def test_the_readme_is_read_in_minutes():
    assert len(README.read_text().splitlines()) <= 150


def test_the_options_page_is_what_config_py_says():
    made = MAKE_PAGES["options_page"]()
    assert made == MAKE_PAGES["OPTIONS"].read_text(), "run python docs/make_pages.py"


def test_the_index_of_the_log_is_its_entries():
    log = MAKE_PAGES["LOG"].read_text()
    assert MAKE_PAGES["indexed_log"](log) == log, "run python docs/make_pages.py"
    assert log.count("\n## ") == len(re.findall(r"^  \[.+\]\(#.+\);?$", log, re.MULTILINE))


def test_every_exit_code_is_explained():
    page = (ROOT / "docs/running.md").read_text()
    explained = {
        row[1]: int(row[0]) for row in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)
    }
    assert explained == {code.name: code.value for code in ExitCode}


# Label in the tables -> result files, and how the names of their rows begin and end.
MEASURED = {
    "this project, cuDNN's attention": (
        ("training", "peers", "variants"),
        "tinyllama_jax, 16 rows",
        "attention cudnn",
    ),
    "this project, its own attention": (("peers",), "tinyllama_jax", "attention pallas"),
    "PyTorch, compiled, cuDNN's attention": (("training",), "torch", "attention cudnn"),
    "PyTorch, compiled, flash attention": (("peers",), "torch", "attention flash"),
    "transformers, compiled": (("peers",), "torch transformers", "attention auto"),
    "this project, 24 rows at a time": (("variants",), "tinyllama_jax, 24 rows", "cudnn"),
    "this project without its norm kernels": (("variants",), "tinyllama_jax", "norm's kernels"),
    "this project without its loss kernels": (("variants",), "tinyllama_jax", "loss's kernels"),
    "this project, products by cuBLAS alone": (("variants",), "tinyllama_jax", "gemm False"),
}


def result(kind: str) -> dict:
    path = RESULTS / f"2026-11-27-{kind}-1b-NVIDIA-H100-80GB-HBM3.json"
    return json.loads(path.read_text())


def measured(label: str) -> list[dict]:
    """Every turn of a system."""
    files, start, end = MEASURED[label]
    steps = [step for file in files for step in result(file)["steps"] if step.get("tokens_per_s")]
    return [
        step
        for step in steps
        if step["name"].startswith(f"{start},") and step["name"].endswith(end)
    ]


def table(page: Path, columns: int) -> dict[str, list[str]]:
    """Rows with so many columns behind the first, by the first; without emphasis and spaces."""
    rows = re.findall(r"^\|(.+)\|$", page.read_text(), re.MULTILINE)
    cells = [[cell.strip(" *") for cell in row.split("|")] for row in rows]
    return {
        row[0]: [cell.replace(" ", "") for cell in row[1:]]
        for row in cells
        if len(row) == columns + 1
    }


@pytest.mark.parametrize(
    ("page", "label"),
    [
        (page, label)
        for page in (README, PERFORMANCE)
        for label in table(page, 3)
        if label in MEASURED
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_speed_of_a_system_is_what_was_measured(page, label):
    speed, share, gib = table(page, 3)[label]
    turns = measured(label)
    speeds = [round(turn["tokens_per_s"]) for turn in turns]
    assert min(speeds) <= int(speed.replace(",", "")) <= max(speeds)
    assert share in {f"{turn['mfu_full']:.1%}" for turn in turns}
    assert {gib} == {f"{turn['peak_gib']:.1f}" for turn in turns}


def test_both_tables_name_the_same_peers():
    named = set(table(README, 3)) & set(MEASURED)
    assert set(table(PERFORMANCE, 3)) >= set(MEASURED) > named
    assert named == set(list(MEASURED)[:5])


def test_the_ratios_in_the_readme_are_those_of_its_table():
    speed = {
        label: int(row[0].replace(",", ""))
        for label, row in table(README, 3).items()
        if label in MEASURED
    }
    ours, _, peer, _, transformers = (speed[label] for label in list(MEASURED)[:5])
    said = (
        f"{ours / peer:.2f} times PyTorch with the same cuDNN and {ours / transformers:.2f} times"
    )
    assert said in " ".join(README.read_text().split())


PARTS = {
    "matrix products": "matmul",
    "attention": "attention",
    "memory-bound work": "memory",
    "optimizer": "optimizer",
    "idle": "idle",
}


@pytest.mark.parametrize(("label", "kind"), PARTS.items())
def test_the_parts_of_a_step_are_those_of_its_trace(label, kind):
    found = result("breakdown")
    (part,) = (row for row in found["rows"] if row["kind"] == kind)
    least = part["roofline_seconds"]
    assert table(PERFORMANCE, 3)[label] == [
        f"{1e3 * part['seconds']:,.2f}",
        f"{part['seconds'] / found['step_seconds']:.1%}",
        f"{1e3 * least:,.2f}" if least else "",
    ]


QUOTED = [
    ("performance.md", "2026-11-25-generation-cpu.md", "5.38 1.71 1.59 1.58"),
    ("performance.md", "2026-11-25-training-demo-cpu.md", "1.12"),
    ("performance.md", "2026-11-27-ceilings-NVIDIA-H100-80GB-HBM3.md", "697 731"),
    ("data.md", "data-2026-11-24-120mb.md", "3.04 3.51 2.81 3.26 22.7 32.7"),
]


@pytest.mark.parametrize(("page", "file", "numbers"), QUOTED, ids=lambda value: value)
def test_a_number_that_is_quoted_stands_in_its_table(page, file, numbers):
    text = (ROOT / "docs" / page).read_text()
    assert f"../benchmarks/results/{file}" in text
    for number in numbers.split():
        for where in (text, (RESULTS / file).read_text()):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", where), number


def test_the_curve_is_of_the_run_in_the_table():
    rows, picture = table(README, 6), (ROOT / "docs/demo.svg").read_text()
    for source in ("prose", "code"):
        assert f"{source}, held out: {rows[source][1].strip('*')} at the end" in picture
