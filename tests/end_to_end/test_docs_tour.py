"""docs/tour.ipynb, every cell of it, in a folder of its own; for fewer pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient", reason="nbclient is an extra: pip install 'vlmvqa[dev]'")
import nbformat
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"
SIZE = "PICTURES, EPOCHS = 600, 10"


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The notebook with its outputs, and the folder that it was run in."""
    folder = tmp_path_factory.mktemp("tour")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (sized,) = [cell for cell in notebook.cells if SIZE in cell.source]
    sized.source = sized.source.replace(SIZE, "PICTURES, EPOCHS = 24, 1")
    client = NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()  # a cell that fails ends it
    return notebook, folder


def printed(notebook: Any, word: str) -> str:
    """What the cell prints that has this word in its source."""
    (cell,) = [one for one in notebook.cells if one.cell_type == "code" and word in one.source]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(notebook: Any, word: str) -> int:
    cells = [one for one in notebook.cells if one.cell_type == "code" and word in one.source]
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def test_it_trains_and_scores(executed: tuple[Any, Path]) -> None:
    notebook, folder = executed
    assert "shuffled images" in printed(notebook, '"launch" / "train.py"') and (folder / "tour/run/model").is_dir()


def test_it_shows_the_row_and_the_mask(executed: tuple[Any, Path]) -> None:
    notebook, _ = executed
    assert "visible to the last token of each question" in printed(notebook, "row_drawing.describe")
    assert pictures(notebook, 'cmap="Blues"') == 1


def test_a_shared_row_has_the_losses_of_its_questions_alone(executed: tuple[Any, Path]) -> None:
    numbers = [float(one) for one in re.findall(r"\d+\.\d+", printed(executed[0], "def loss_of"))]
    assert len(numbers) == 4 and numbers[:2] == pytest.approx(numbers[2:], abs=1e-5)


def test_it_asks_and_looks(executed: tuple[Any, Path]) -> None:
    notebook, _ = executed
    assert printed(notebook, "model.beam_candidates").count("what color is the") == 2
    assert pictures(notebook, "draw(picture, attribute(") == 1
    assert "exchanged pictures" in printed(notebook, "def right")


def test_it_is_kept_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
