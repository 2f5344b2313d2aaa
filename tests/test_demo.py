"""The command line, end to end on the bundled checkpoint with a tiny schedule."""

import html.parser
import json
import subprocess
import sys

import pytest
import torch
from support.commands import lnfree
from transformers import AutoTokenizer, GPT2LMHeadModel

import lnfree_interp as lf
from lnfree_interp import demo
from lnfree_interp.errors import OutputError
from lnfree_interp.files import new_folder
from lnfree_interp.plots.page import Section, page
from lnfree_interp.report.sections import PROMPTS
from lnfree_interp.tables import Table

SIZE_LIMIT = 8_000_000


@pytest.fixture
def little_text(monkeypatch):
    """A few sequences in place of the whole library: the path is the same, the wait is not."""
    right = lf.stdlib_corpus

    def few(split):
        return right(split).select(range(40) if split == "train" else range(3))

    monkeypatch.setattr(demo, "stdlib_corpus", few)
    monkeypatch.setattr(demo, "pack", lambda *what: lf.pack(*what)[:48])


def test_bundled_checkpoint_is_an_ordinary_folder():
    folder = lf.bundled_checkpoint()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= SIZE_LIMIT
    hf_model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    config = hf_model.config
    assert config.tie_word_embeddings
    assert config.activation_function == "gelu_new"
    assert config.layer_norm_epsilon == 1e-5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return 'é→' + x\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) == config.vocab_size
    # Trained: norms moved away from their initial values, and Python is no surprise.
    assert (hf_model.transformer.ln_f.weight - 1).abs().max() > 0.1
    assert hf_model.transformer.h[0].ln_1.bias.abs().max() > 0.01
    tokens = tokenizer(["import os\nimport sys\n\nclass A:\n    def __init__(self"])["input_ids"]
    best = hf_model(torch.tensor(tokens)).logits[0, -1].argmax().item()
    assert tokenizer.decode([best]) in {",", "):", ")"}


def test_bundled_training_record_matches_the_weights():
    record = json.loads((lf.bundled_checkpoint() / "training.json").read_text())
    hf_model = GPT2LMHeadModel.from_pretrained(lf.bundled_checkpoint())
    assert record["parameters"] == sum(p.numel() for p in hf_model.parameters())
    assert record["curve"][-1]["heldout"] == min(point["heldout"] for point in record["curve"])


def linked_from(report):
    """What the page's own tags would fetch; plotly's script mentions addresses, but only inside."""
    found = []

    class Links(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.extend(value for name, value in attributes if name in {"src", "href", "srcset"})

    Links().feed(report)
    return found


def test_demo_end_to_end(monkeypatch, tmp_path, capsys, little_text):
    out = tmp_path / "run"
    lnfree(monkeypatch, "demo", "--out", out, "--steps", "13", "--seed", "3")
    printed = capsys.readouterr().out
    assert "largest logit difference from transformers" in printed
    assert "LN-free minus vanilla" in printed
    assert str(out / "report.html") in printed
    assert {file.name for file in out.iterdir()} == {
        "control", "metrics.json", "model", "report.html"
    }  # fmt: skip

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["seed"] == 3
    for model in ("original", "vanilla", "lnfree"):
        entry = metrics["cross_entropy"][model]
        assert 0 < entry["median"] < entry["p99"]
        assert 0 < entry["mean"] < 10
    assert metrics["dla_nmae"]["lnfree"] < 1e-4
    assert metrics["dla_nmae"]["original"] > 0.01
    assert set(metrics["max_relative_error"]) == {"load", "fold", "export", "decomposition"}
    assert max(metrics["max_relative_error"].values()) <= 1e-5
    assert max(metrics["max_relative_error_float64"].values()) <= 1e-10
    assert len(metrics["sigma"]) == 13

    # The exported folder is the model that was evaluated: plain transformers, same cross-entropy.
    hf_model = GPT2LMHeadModel.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    sequences = demo.pack(demo.stdlib_corpus("heldout"), tokenizer, 256)[:: demo.EVERY]
    with torch.no_grad():
        losses = [hf_model(b[None], labels=b[None]).loss.item() for b in sequences]
    mean = sum(losses) / len(losses)
    assert mean == pytest.approx(metrics["cross_entropy"]["lnfree"]["mean"], abs=1e-4)
    assert lf.load(out / "model").cfg.normalization_type is None
    control = lf.load(out / "control")
    assert len(lf.live_sites(control)) == 13
    found = lf.evaluate_loss(control, sequences).mean
    assert found == pytest.approx(metrics["cross_entropy"]["vanilla"]["mean"], abs=1e-4)

    report = (out / "report.html").read_text()
    assert linked_from(report) == []
    assert report.count("plotly-graph-div") == 5 + 3 * len(PROMPTS)
    lnfree_fails(monkeypatch, capsys, 2, "already exists", "demo", "--out", out)


def lnfree_fails(monkeypatch, capsys, status, message, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        lnfree(monkeypatch, *arguments)
    assert exit_info.value.code == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("lnfree: ")


def test_bad_checkpoints_are_one_line_and_write_nothing(monkeypatch, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for checkpoint, message in (
        (empty, "no config.json"),
        (tmp_path / "nowhere", "no such folder"),
        ("openai-community/gpt2-nonexistent", "cannot be reached"),
    ):
        out = tmp_path / "out"
        lnfree_fails(monkeypatch, capsys, 2, message, "demo", checkpoint, "--out", out)
        assert not out.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["empty"]


def test_ctrl_c_leaves_nothing(monkeypatch, tmp_path, capsys, little_text, gpt2_folder):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "report", interrupt)  # the very last step, files half-written
    with pytest.raises(SystemExit) as exit_info:
        lnfree(monkeypatch, "demo", gpt2_folder, "--out", tmp_path / "run", "--steps", "14")
    assert exit_info.value.code == 130
    assert "nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", [".", "file", "file/below", "link", "x" * 250])
def test_output_folders_that_cannot_be_are_refused_before_the_work(
    monkeypatch, tmp_path, capsys, out
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    lnfree_fails(monkeypatch, capsys, 2, "", "demo", "--out", out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link"]


def test_new_folder_takes_its_parents_away_again(tmp_path):
    for error, seen in (
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "full"), OutputError),
    ):

        def write_half(error=error):
            with new_folder(tmp_path / "a/b/c") as folder:
                (folder / "file").write_text("half")
                raise error

        with pytest.raises(seen):
            write_half()
        assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "a/b/c") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "a/b/c/file").read_text() == "whole"


def test_steps_that_cannot_be_are_refused(monkeypatch, capsys, tmp_path, little_text):
    for steps, message in (("0", "steps must be positive"), ("5", "too few for 13 norm sites")):
        lnfree_fails(
            monkeypatch, capsys, 2, message, "demo", "--out", tmp_path / "x", f"--steps={steps}"
        )


def test_the_package_itself_imports_nothing_heavy():
    heavy = "torch, transformers, transformer_lens, datasets, plotly, pandas"
    check = (
        "import sys, lnfree_interp, lnfree_interp.cli; "
        f"print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_loss_statistics_by_brute_force():
    model = lf.load(lf.bundled_checkpoint())
    sequences = torch.randint(4096, (5, 40), generator=torch.Generator().manual_seed(0))
    found = lf.evaluate_loss(model, sequences, batch=2)
    logits = model(sequences).double().log_softmax(-1)
    losses = sorted(-logits[b, p, sequences[b, p + 1]].item() for b in range(5) for p in range(39))
    assert found.mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.median == pytest.approx(losses[97], rel=1e-5)
    at = 0.99 * (len(losses) - 1)
    low = int(at)
    p99 = losses[low] + (at - low) * (losses[low + 1] - losses[low])
    assert found.p99 == pytest.approx(p99, rel=1e-5)
    one_by_one = lf.evaluate_loss(model, sequences, batch=1)
    torch.testing.assert_close(one_by_one.per_token, found.per_token, rtol=1e-4, atol=1e-4)


def test_every_public_name_resolves():
    for name in lf.__all__:
        assert getattr(lf, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lf.no_such_name


def test_page_and_tables_escape_what_they_show():
    table = Table(["token", "logit"], [["<script>alert(1)</script>", "1.0"]])
    made = page("t", "<b>lead</b>", [Section("<i>", "a & b", [table])])
    assert "<script>alert" not in made
    assert "&lt;script&gt;alert" in made
    assert "<b>lead" not in made
    assert table.to_text().splitlines()[0].split() == ["token", "logit"]
