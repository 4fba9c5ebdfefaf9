"""The notebooks: stored without outputs, and every one runs from top to bottom and tells the truth."""

import json
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST = ROOT / "notebooks" / "01_first_reconnaissance.ipynb"
LIMIT = 120  # seconds a notebook

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the kernel's own client


def identity(path):
    return path.stem


def execute(path, folder, result):
    """Run a notebook in a folder; return an expression's value at its end, and the seconds."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({result}))"))
    client = NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    start = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - start
    (output,) = notebook.cells[-1].outputs
    return json.loads(output.text), seconds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=identity)
def test_no_output_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_every_notebook_has_a_test_here():
    assert NOTEBOOKS == [FIRST]


@pytest.mark.slow
def test_first_reconnaissance_shows_what_it_says(tmp_path):
    result = """{
        "laws": [a + b == b + a, a + b - b == a],
        "claims": [exact, forgotten, erased],
        "history": history,
        "bytes": [message.count_bytes(), pictures.numpy().nbytes, len(encoder.to_bytes())],
        "cache": cache.exists(),
    }"""
    values, seconds = execute(FIRST, tmp_path, result)
    assert values["laws"] == [True, True]
    assert values["claims"] == [True, True, True]
    assert [entry["merged"] for entry in values["history"]] == [
        entry["pooled"] for entry in values["history"]
    ]
    last = values["history"][-1]
    assert last["merged"] > 0.7 and last["merged"] > 2 * last["isolated"]
    assert values["bytes"] == sorted(values["bytes"])
    assert not values["cache"] and not list(tmp_path.iterdir())
    assert seconds < LIMIT
