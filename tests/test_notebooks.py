"""The notebooks run, show what they promise, are committed with clean outputs and equal their twins
in Python."""

import re
import shutil

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from support.paths import ROOT

NOTEBOOKS = ROOT / "notebooks"


def outputs(notebook, kind: str) -> list:
    """The outputs of one type, in order."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs if output.output_type == kind]


def printed(notebook) -> str:
    return "".join(stream.text for stream in outputs(notebook, "stream"))


def check_train_tiny(text: str):
    """A loss below what the frequencies of the pieces alone give."""
    loss, unigram = (
        float(re.search(rf"^{name} +([\d.]+) nats per token", text, re.MULTILINE)[1])
        for name in ("held-out loss", "unigram entropy")
    )
    assert 0 < loss < unigram - 0.7


def check_plan_a_run(text: str):
    """The original's own run: 90 days on 16 GPUs, which lie within what is predicted."""
    assert "16 x NVIDIA A100-SXM4-40GB, ESTIMATE WITHOUT THE COMPILER" in text
    low, high = map(float, re.search(r"^ days +([\d.]+) to ([\d.]+)", text, re.MULTILINE).groups())
    assert 60 < low < 90 < high < 100


def check_to_pytorch_and_back(text: str):
    """Both sides give the same texts, and the same numbers but for rounding."""
    assert text.count("60 of 60 tokens are the same") == 3
    differences = re.findall(r"largest difference of a (logit|key): (\S+)", text)
    assert [what for what, _ in differences] == ["logit", "key"]
    assert all(0 < float(value) < 1e-4 for _, value in differences)


# Name -> (what holds of its text, number of pictures).
SHOWN = {
    "train_tiny": (check_train_tiny, 1),
    "plan_a_run": (check_plan_a_run, 3),
    "to_pytorch_and_back": (check_to_pytorch_and_back, 2),
}
NEEDS_TORCH = {"to_pytorch_and_back"}


@pytest.fixture(
    params=[pytest.param(n, marks=[pytest.mark.torch] * (n in NEEDS_TORCH)) for n in SHOWN]
)
def name(request):
    return request.param


@pytest.fixture
def committed(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def check_outputs(name, notebook):
    """What it promises, its pictures, and no warnings."""
    check, pictures = SHOWN[name]
    check(printed(notebook))
    assert {stream.name for stream in outputs(notebook, "stream")} == {"stdout"}
    assert [set(shown.data) for shown in outputs(notebook, "display_data")] == pictures * [
        {"text/plain", "image/png"}
    ]
    assert not outputs(notebook, "error")


def test_every_notebook_is_looked_at():
    assert {path.stem for path in NOTEBOOKS.glob("*.py")} == set(SHOWN)


def test_notebook_runs_and_shows_what_it_promises(name, tmp_path, monkeypatch):
    # They run longer than they compile, unlike the other tests.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    copy = shutil.copy(NOTEBOOKS / f"{name}.ipynb", tmp_path)
    notebook = nbformat.read(copy, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    check_outputs(name, notebook)


def test_committed_outputs_can_be_read_without_running(name, committed):
    check_outputs(name, committed)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    # A picture's base64 may spell anything.
    assert not re.search(r"warning|/(home|root|tmp|usr|work)/|\\Users", printed(committed), re.I)


def test_notebook_and_its_twin_hold_the_same_cells(name, committed):
    twin = jupytext.read(NOTEBOOKS / f"{name}.py")
    cells, twins = (
        [(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (committed, twin)
    )
    assert cells == twins, f"bring them together: jupytext --sync notebooks/{name}.py"
