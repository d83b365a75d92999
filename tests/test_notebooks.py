"""The notebook runs, learns, is committed with clean outputs and equals its twin in Python."""

import re
import shutil
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOKS / "train_tiny.ipynb", as_version=4)


def outputs(notebook, kind: str) -> list:
    """The outputs of one type, in order."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in cells for output in cell.outputs if output.output_type == kind]


def printed(notebook) -> str:
    return "".join(stream.text for stream in outputs(notebook, "stream"))


def check_outputs(notebook):
    """One picture, a loss below what the frequencies of the pieces alone give, no warnings."""
    text = printed(notebook)
    loss, unigram = (
        float(re.search(rf"^{name} +([\d.]+) nats per token", text, re.MULTILINE)[1])
        for name in ("held-out loss", "unigram entropy")
    )
    assert 0 < loss < unigram - 0.7
    assert {stream.name for stream in outputs(notebook, "stream")} == {"stdout"}
    assert [set(shown.data) for shown in outputs(notebook, "display_data")] == [
        {"text/plain", "image/png"}
    ]
    assert not outputs(notebook, "error")


def test_notebook_trains_below_the_unigram_entropy(tmp_path, monkeypatch):
    # It runs longer than it compiles, unlike the other tests.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    copy = shutil.copy(NOTEBOOKS / "train_tiny.ipynb", tmp_path)
    notebook = nbformat.read(copy, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    check_outputs(notebook)


def test_committed_outputs_can_be_read_without_running(committed):
    check_outputs(committed)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    # A picture's base64 may spell anything.
    assert not re.search(r"warning|/(home|root|tmp|usr|work)/|\\Users", printed(committed), re.I)


def test_notebook_and_its_twin_hold_the_same_cells(committed):
    twin = jupytext.read(NOTEBOOKS / "train_tiny.py")
    cells, twins = (
        [(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (committed, twin)
    )
    assert cells == twins, "bring them together: jupytext --sync notebooks/train_tiny.py"
