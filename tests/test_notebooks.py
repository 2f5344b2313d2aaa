"""Notebooks hold what their sources say, with outputs."""

import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from support import run_notebooks

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


def test_there_are_ten():
    assert len(SOURCES) == 10


NEEDS_SMOLLM2 = ["8_indirect_objects.py", "9_induction_and_a_fact.py"]


@pytest.mark.parametrize("installed", [True, False])
def test_a_notebook_that_needs_smollm2_is_skipped_aloud_without_it(installed, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(run_notebooks, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(run_notebooks, "run", lambda source, keep: asked.append(source.name) or 1.0)
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--check"])
    run_notebooks.main()
    said = capsys.readouterr().out
    for name in NEEDS_SMOLLM2:
        skipped = f"{name}: skipped, SmolLM2 is not installed: make smollm2\n"
        assert (name in asked, skipped in said) == (installed, not installed)
    assert len(asked) == len(SOURCES) - (0 if installed else len(NEEDS_SMOLLM2))


@pytest.mark.parametrize("name", NEEDS_SMOLLM2)
def test_a_notebook_that_needs_smollm2_says_how_to_get_it(name):
    source = next(source for source in SOURCES if source.name == name)
    assert "`make smollm2`" in jupytext.read(source).cells[0].source
