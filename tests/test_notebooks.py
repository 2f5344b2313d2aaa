"""Notebooks hold what their sources say, with outputs."""

from pathlib import Path

import jupytext
import nbformat
import pytest

SOURCES = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_notebook_is_its_source_and_has_been_run(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert not any(out.output_type == "error" or out.get("name") == "stderr" for out in outputs)
    figures = [
        out.data for out in outputs if "application/vnd.plotly.v1+json" in out.get("data", {})
    ]
    assert figures
    assert all("image/png" in data for data in figures)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_there_are_seven():
    assert len(SOURCES) == 7
