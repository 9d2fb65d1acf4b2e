"""The notebooks: each runs from a clean kernel in its fast form, and is committed with the outputs of its full one."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(file: Path):
    return nbformat.read(file, as_version=4)


def test_the_three_are_there():
    assert {file.stem for file in NOTEBOOKS} >= {"inpainting", "deblurring", "your_own_problem"}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_from_a_clean_kernel(file, tmp_path, monkeypatch):
    """A cell that raises ends in CellExecutionError; a cell that takes more than five minutes in CellTimeoutError."""
    monkeypatch.setenv("RTB_INVERSE_FAST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # beside other tests, threads of one kernel wait for those of another
    NotebookClient(read(file), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_committed_as_it_ran_in_full(file):
    """Cell after cell, with pictures, nothing on stderr, and more draws than the fast form takes."""
    cells = [cell for cell in read(file).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    draws = re.findall(r"(\d+) draws for each of (\d+) observations", "".join(output.get("text", "") for output in outputs))
    assert draws and all(int(n) >= 16 and int(b) >= 10 for n, b in draws)
