"""The notebooks: executed with small numbers, and what a reader of the repository sees of them."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))
SETTINGS = re.compile(r"^([A-Z]+(?:, [A-Z]+)*) = (\d+(?:, \d+)*)(?=\s|$)", re.MULTILINE)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    return [output for output in cell.outputs if "image/jpeg" in output.get("data", {})]


def test_there_is_one_for_each_job():
    assert [path.stem for path in NOTEBOOKS] == ["restore", "score", "tune"]


def shortened(notebook):
    """Return the notebook with two of everything."""
    for cell in code(notebook):
        cell.source = SETTINGS.sub(lambda m: f"{m[1]} = {', '.join('2' for _ in m[2].split(','))}", cell.source)
    return notebook


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """What runs a notebook's cells in its kernel, in this process, which has the libraries loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, shell):
    """With two of everything, sampling steps too; as many pictures come out as are kept in the file."""
    notebook = shortened(read(path))
    for cell in code(notebook):
        if restorer := shell.user_ns.get("restorer"):
            restorer.settings = replace(restorer.settings, num_inference_steps=2)
        with capture_output() as captured:
            result = shell.run_cell(cell.source)
        result.raise_error()
        shown = [output.data for output in captured.outputs] + [shell.display_formatter.format(result.result)[0]]
        assert sum("image/jpeg" in data for data in shown) == len(pictures(cell)), cell.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel_of_its_own(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = shortened(read(path))
    kept = [len(pictures(cell)) for cell in code(notebook)]
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert [len(pictures(cell)) for cell in code(notebook)] == kept


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_of_a_notebook(path):
    """Small, run from top to bottom without an error, with pictures, and nothing of the machine that ran it."""
    notebook, text = read(path), path.read_text(encoding="utf-8")
    assert path.stat().st_size < 1_000_000
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert sum(len(pictures(cell)) for cell in code(notebook)) >= 2
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    assert not re.search(r"/(root|home|tmp|Users)/", text)
    assert any("OPPOer/FaceScore" in c.source or "Ethanliang99/AuthFace" in c.source for c in notebook.cells[-1:])
