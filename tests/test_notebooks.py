"""The notebooks hold what their paired scripts say; `make test` runs them with nbmake."""

from pathlib import Path

import jupytext
import pytest

COLAB = Path(__file__).parent.parent / "colab"


@pytest.mark.parametrize("script", sorted(COLAB.glob("*.py")), ids=lambda path: path.stem)
def test_notebook_is_in_step_with_its_script(script):
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not stored"


def test_there_are_notebooks():
    assert list(COLAB.glob("*.ipynb"))
