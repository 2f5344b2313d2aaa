"""The report, as its readers get it: built by the command, opened in a browser."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from support.commands import lnfree
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.errors import CheckpointError, DataError, OutputError
from lnfree_interp.removal.named_models import find_model, load_named
from lnfree_interp.removal.run import StepRecord
from lnfree_interp.removal.run_folder import VERSION
from lnfree_interp.report.job import ReportJob
from lnfree_interp.report.sections import Question
from lnfree_interp.report.write import write_report

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
        ReportJob(source=str(free_folder), original=str(gpt2_folder), sequences=4, data="stdlib"),
        page, progress=False,
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


def test_a_run_says_how_it_went(gpt2_folder, tmp_path, monkeypatch, capsys):
    run, page, text = tmp_path / "run", tmp_path / "report.html", tmp_path / "code.txt"
    text.write_text("".join(f"for i in range({n}):\n    print(i)\n\n" for n in range(600)))
    monkeypatch.chdir(tmp_path)
    small = ("--sequence-length", 16, "--batch", 2, "--heldout", 2, "--steps", 14)
    lnfree(
        monkeypatch, "remove", os.path.relpath(gpt2_folder), "--data", text, "--out", run, *small
    )
    monkeypatch.chdir("/")  # the run knows where it came from
    prompt = ("--prompt", "for i in", "--answer", "i")
    command = ("report", run, "--out", page, "--sequences", 4, "--data", text, *prompt)
    capsys.readouterr()
    lnfree(monkeypatch, *command)
    said = capsys.readouterr().out
    assert f"wrote {page}" in said
    assert str(gpt2_folder) in said  # what the run started from
    written = page.read_text(encoding="utf-8")
    assert "14 steps, in which 10 norm sites were frozen" in written
    assert "Removing the norms" in written
    with pytest.raises(SystemExit) as stopped:
        lnfree(monkeypatch, *command)
    assert stopped.value.code == 2
    assert "already exists" in capsys.readouterr().err
    few = ("--sequences", 2, "--no-effects", "--neurons", 0, "--pairs", 0, "--data", text)
    lnfree(monkeypatch, "evaluate", run, *few)
    said = capsys.readouterr().out
    assert re.search(rf"tokens +{gpt2_folder.name} +run\n", said)
    assert "minus original" in said
    lnfree(monkeypatch, "evaluate", gpt2_folder, "--original", run, *few)
    assert re.search(rf"tokens +run +{gpt2_folder.name}\n", capsys.readouterr().out)


def test_the_original_is_what_the_folder_says(tmp_path):
    folder = tmp_path / "folder"
    (folder / "model").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"version": VERSION}))
    (folder / "metrics.jsonl").touch()
    assert find_model(folder).original is None  # made in Python: nothing is guessed
    for about, original in (
        ({"model": None}, str(lf.bundled_checkpoint())),
        ({"model": "gpt2", "revision": "abc"}, "gpt2@abc"),
        ({"model": "gpt2", "revision": None}, "gpt2"),
    ):
        (folder / "run.json").write_text(json.dumps({"version": VERSION, "about": about}))
        assert find_model(folder).original == original
        assert find_model(folder).bundled == (about["model"] is None)
    with pytest.raises(
        CheckpointError, match=r"started from gpt2, which cannot be loaded.*--original"
    ):
        load_named("gpt2", recorded_by=str(folder))
    (folder / "model").rmdir()
    with pytest.raises(CheckpointError, match="lnfree remove --resume"):
        find_model(folder)
    (folder / "model").mkdir()
    (folder / "run.json").unlink()
    (folder / "metrics.json").write_text(json.dumps({"source": "gpt2"}))
    assert find_model(folder).original == "gpt2"


def test_a_line_that_was_cut_off_is_no_step(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"version": VERSION}))
    (tmp_path / "model").mkdir()
    whole = json.dumps(asdict(StepRecord(0, {"cross_entropy": 2.0}, 1e-4, {})))
    (tmp_path / "metrics.jsonl").write_text(f"{whole}\n{whole[:20]}")
    assert [record.step for record in find_model(tmp_path).history] == [0]


def test_names_with_a_revision(gpt2_folder, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere/at-all: "):
        load_named("nowhere/at-all@v2")
    for name, message in ((" ", "name of the model is empty"), ("@v2", "@v2: ")):
        with pytest.raises(CheckpointError, match=message):
            load_named(name)
    (tmp_path / "model").mkdir()
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"metrics\.json cannot be read"):
        find_model(tmp_path)
    odd = tmp_path / "a@b"
    shutil.copytree(gpt2_folder, odd)
    assert load_named(str(odd)).cfg.n_layers == 3


def test_a_live_model_alone(gpt2_folder, tmp_path):
    page = write_report(
        ReportJob(source=str(gpt2_folder), sequences=2, data="stdlib"), tmp_path / "live.html",
        progress=False,
        questions=[Question("for i in", "i")],
    )  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert re.search(r"\d+ live norms", text)
    assert "NOT exact: ln_final held, which misses" in text
    assert "How exact is all this" not in text


def test_wrong_reports_are_refused(gpt2_folder, tmp_path, monkeypatch, capsys):
    asked = [Question("for i in", "zzz qqq")]
    with pytest.raises(DataError, match="is one token"):
        write_report(
            ReportJob(source=str(gpt2_folder), sequences=1, data="stdlib"),
            tmp_path / "report.html", questions=asked,
        )  # fmt: skip
    with pytest.raises(DataError, match=r"no text was named for .*give --data"):
        write_report(ReportJob(source=str(gpt2_folder)), tmp_path / "report.html")
    with pytest.raises(OutputError, match="not a writable folder"):
        write_report(ReportJob(source=str(gpt2_folder)), tmp_path / "nowhere" / "report.html")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text(json.dumps({"version": VERSION}))
    with pytest.raises(CheckpointError, match="is a run without a model"):
        write_report(ReportJob(source=str(unfinished)), tmp_path / "report.html")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        lnfree(monkeypatch, "report", gpt2_folder, "--prompt", "a")
    assert stopped.value.code == 2
    assert "belong together" in capsys.readouterr().err


def test_a_question_runs_the_model_once(folded):
    """All figures about one prompt; demo and report ask several prompts in one run."""
    from lnfree_interp.report import sections as build
    from lnfree_interp.report.sections import Question

    runs = []
    handle = folded.embed.register_forward_hook(lambda *_: runs.append(1))
    asked = Question("for i in", "r", "e")
    section = build.explanation(build.traced(folded, asked), asked)
    assert len(section.content) == 7
    assert len(runs) == 1
    questions = [Question("for i in", "r", "e"), Question("return", "s", "d")]
    build.attributions(folded, questions, ("sublayer", "head", "neuron"))
    assert len(runs) == 2
    handle.remove()
