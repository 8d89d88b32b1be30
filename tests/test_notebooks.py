"""Every notebook of examples/ runs, and what it shows on GitHub is what its code shows."""

import ast
import json
import re
from pathlib import Path

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))
# In place of the cell with the tag "parameters": one layer of each kind in one block.
QUICK = {
    "dense_to_calibrated": {
        "STEPS": 1,
        "PROMPTS": 2,
        "SKIP": ["transformer_blocks.*", "single_transformer_blocks.[!0]*", "*.proj_out", "*.to_[qk]"],
    },
}


def code_cells(notebook):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def run(source, names):
    """Run one cell as a kernel does; the value of its last line, where that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def stored(cell):
    """Kinds of what a cell shows."""
    kinds = {name for output in cell["outputs"] for name in output.get("data", ())}
    kinds |= {output["name"] for output in cell["outputs"] if output["output_type"] == "stream"}
    return kinds - {"text/plain"}


def test_every_notebook_has_its_settings():
    assert {notebook.stem for notebook in NOTEBOOKS} == set(QUICK)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_its_cells_run_and_show_what_is_stored(notebook, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend("agg")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), start=1):
        value = run("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(QUICK[notebook.stem]) <= set(names)
            names |= QUICK[notebook.stem]
        shown = {"stdout"} if capsys.readouterr().out else set()
        shown |= {"image/png"} if isinstance(value, Figure) else set()
        assert stored(cell) == shown, f"cell {number}: run the notebook and commit it again"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_is_stored_as_one_run_left_it(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "execute_result", "display_data"}  # no errors
    printed = " ".join(
        "".join(output["text"])
        for cell in cells
        for output in cell["outputs"]
        if output["output_type"] == "stream"
    )
    assert not re.search(r"(?<![\w.])/\w+/|Warning", printed)  # nothing of the machine that ran it
    assert notebook.stat().st_size < 1_000_000
