"""`lnfree freeze`, as a user runs it."""

import pytest
import torch
from support.commands import lnfree

import lnfree_interp as lf
from lnfree_interp.errors import DataError, OutputError
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.removal import freeze_job
from lnfree_interp.removal.freeze_job import read_question


def run(monkeypatch, *arguments):
    lnfree(monkeypatch, "freeze", *arguments)


def test_it_writes_a_model_on_which_the_questions_are_exact(monkeypatch, tmp_path, capsys):
    out = tmp_path / "frozen"
    run(monkeypatch, "--question", "logits", "L2H1", "--sequences", 8, "--sequence-length", 64,
        "--out", out)  # fmt: skip
    said = capsys.readouterr().out
    assert "blocks.2.ln1.qk and ln_final without training" in said
    assert "top-1 agreement" in said
    model = lf.load(out)
    assert len(lf.live_sites(model)) == 11
    lf.attribute_logits(model, "for i in", " range").verify()
    lf.attribute_scores(model, "for i in", 2, 1).verify()
    sidecar = lf.formats.read_sidecar(out)
    assert set(sidecar.sigma) == set(sidecar.sigma_first) == {"blocks.2.ln1.qk", "ln_final"}


def test_training_and_one_constant(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--steps", 4, "--batch", 2, "--sequences", 8, "--sequence-length", 32,
        "--one-constant", "--out", tmp_path / "frozen")  # fmt: skip
    assert "ln_final after 4 steps" in capsys.readouterr().out
    model = lf.load(tmp_path / "frozen")
    assert lf.get_norm(model, "ln_final").first is None
    assert torch.isfinite(model("for i in")).all()


def test_a_training_that_was_interrupted_goes_on(monkeypatch, tmp_path, capsys):
    text = ("--sequences", 8, "--sequence-length", 32)
    options = ("--steps", 4, *text, "--out", tmp_path / "frozen")
    right = freeze_job.export

    def full_disk(*args, **more):
        raise OutputError("no space left")

    monkeypatch.setattr(freeze_job, "export", full_disk)
    with pytest.raises(SystemExit):
        run(monkeypatch, *options)
    monkeypatch.setattr(freeze_job, "export", right)
    metrics = tmp_path / "frozen-training" / "metrics.jsonl"
    before = metrics.read_text()
    run(monkeypatch, *options, "--resume")
    assert metrics.read_text() == before
    assert lf.get_norm(lf.load(tmp_path / "frozen"), "ln_final").frozen
    with pytest.raises(SystemExit):
        run(monkeypatch, "--resume", *text, "--out", tmp_path / "other")
    assert "steps=0 trains nothing" in capsys.readouterr().err


def test_words_stand_for_questions():
    assert read_question("L3H4") == lf.Score(3, 4)
    assert read_question("L3N41") == lf.Neuron(3, 41)
    assert read_question("blocks.0.ln2") == NormSite("ln2", 0)
    with pytest.raises(DataError, match="'heads' is no question: give logits"):
        read_question("heads")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--question", "nothing"], "is no question"),
        (["--question", "L9H0"], "no L9H0"),
        (["--question", "blocks.9.ln2"], "not a norm site"),
        (["somebody/else"], "no text was named"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, said, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments, "--sequences", 4, "--sequence-length", 32,
            "--out", tmp_path / "x")  # fmt: skip
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
