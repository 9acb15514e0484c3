"""Each notebook is committed without outputs, and runs from its first cell to its last, in quick mode."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BADGE = "](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/{})"


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request):
    return request.param


def test_a_notebook_is_committed_as_if_never_run(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    for cell in code(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec"} and notebook.metadata.kernelspec.name == "python3"


def test_a_notebook_s_badge_opens_it(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    assert first.startswith("# ") and BADGE.format(path.name) in first
    assert first.count("colab.research.google.com/github") == 1


def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_QUICK", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))  # no profile and no history of this machine's user
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures are outputs
    try:
        importlib.metadata.distribution("lora-jax")
    except importlib.metadata.PackageNotFoundError:
        monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()  # raises a cell's error

    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr" and "Warning" in o.text]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    final = notebook.cells[-1]
    assert final.cell_type == "code" and "assert " in final.source, "a notebook ends by checking what it claims"
    assert final.execution_count == len(code(notebook))
    assert [output.text for output in final.outputs] == ["All claims hold.\n"]
