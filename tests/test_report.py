"""The report, as its readers get it: built by the command, opened in a browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import freeze_all

import lnfree_interp as lf
from lnfree_interp.errors import CheckpointError, DataError, OutputError
from lnfree_interp.report import Question, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def free_folder(gpt2_folder, tmp_path):
    folder = tmp_path / "free"
    lf.export(freeze_all(lf.load(gpt2_folder)), folder)
    return folder


def opened(page: Path, folder: Path) -> tuple[str, str]:
    """The page after its scripts have run, and what they wrote to the console."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder}", "--enable-logging=stderr", "--v=0",
        "--virtual-time-budget=20000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)
    return run.stdout, console


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; CI installs one")
def test_every_figure_is_drawn_and_nothing_fails(gpt2_folder, free_folder, tmp_path):
    page = tmp_path / "report.html"
    write_report(
        free_folder, page, against=str(gpt2_folder), blocks=4, progress=False,
        questions=[Question("for i in <script>alert(1)</script> range", "i", "n")],
    )  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="https?://', text.partition("</head>")[2])
    assert "<script>alert(1)" not in text
    assert "of the residual stream" in text
    figures = text.count("<figure>")
    assert figures == 10
    dom, console = opened(page, tmp_path / "profile")
    assert dom.count('class="main-svg"') >= figures
    assert dom.count('class="plotly-graph-div js-plotly-plot"') == figures
    assert "Error" not in console, console
    assert "pattern x OV table" in dom
    assert dom.count("<td>NO</td>") == 0


def test_a_run_says_how_it_went(gpt2_folder, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "lnfree_interp", "remove", str(gpt2_folder), "--steps", "14"]
    command += ["--block", "16", "--batch", "2", "--heldout", "2", "--out", str(run)]
    subprocess.run(command, check=True, capture_output=True)
    page = tmp_path / "report.html"
    command = [sys.executable, "-m", "lnfree_interp", "report", str(run), "--out", str(page)]
    command += ["--blocks", "4", "--prompt", "for i in", "--answer", "i"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"wrote {page}" in done.stdout
    text = page.read_text(encoding="utf-8")
    assert "14 steps, in which 10 norm sites were frozen" in text
    assert "Removing the norms" in text
    assert str(gpt2_folder) in done.stdout  # what the run started from
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "already exists" in again.stderr


def test_the_original_is_what_the_folder_says(gpt2_folder, tmp_path):
    from lnfree_interp.report import _subject

    folder = tmp_path / "folder"
    (folder / "model").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"version": 1}))
    (folder / "metrics.jsonl").touch()
    assert _subject(str(folder), None).original is None  # made in Python: nothing is guessed
    assert _subject(str(folder), "other").original == "other"
    for about, original in (
        ({"model": None}, str(lf.bundled_checkpoint())),
        ({"model": "gpt2", "revision": "abc"}, "gpt2"),
    ):
        (folder / "run.json").write_text(json.dumps({"version": 1, "about": about}))
        found = _subject(str(folder), None)
        assert found.original == original
        assert found.revision == about.get("revision")
    (folder / "run.json").unlink()
    (folder / "metrics.json").write_text(json.dumps({"source": "gpt2"}))
    assert _subject(str(folder), None).original == "gpt2"


def test_a_live_model_alone(gpt2_folder, tmp_path):
    page = write_report(
        gpt2_folder, tmp_path / "live.html", blocks=2, progress=False,
        questions=[Question("for i in", "i")],
    )  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert re.search(r"\d+ live norms", text)
    assert "held: a live norm" in text
    assert "How exact is all this" not in text


def test_wrong_reports_are_refused(gpt2_folder, tmp_path):
    asked = [Question("for i in", "zzz qqq")]
    with pytest.raises(DataError, match="is one token"):
        write_report(gpt2_folder, tmp_path / "report.html", questions=asked, blocks=1)
    with pytest.raises(OutputError, match="not a writable folder"):
        write_report(gpt2_folder, tmp_path / "nowhere" / "report.html")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(CheckpointError, match="not finished"):
        write_report(unfinished, tmp_path / "report.html")
    command = [sys.executable, "-m", "lnfree_interp", "report", str(gpt2_folder), "--prompt", "a"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    assert "belong together" in run.stderr
