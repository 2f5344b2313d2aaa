"""Text that a model writes itself."""

import json

import pytest
import torch
from support.commands import lnfree

import lnfree_interp as lf
from lnfree_interp.data import sampled
from lnfree_interp.data.sampled import write_samples
from lnfree_interp.data.sources import open_sequences
from lnfree_interp.errors import DataError, OutputError


@pytest.fixture(scope="module")
def bundled():
    return lf.load(lf.bundled_checkpoint(), device="cpu")


def sample(model, n, length=12, **more):
    return lf.sample_text(model, n, length, progress=False, **more)


def test_the_same_seed_gives_the_same_text_however_much_is_asked_for(bundled):
    before = torch.get_rng_state()
    many = sample(bundled, 40)
    assert torch.equal(torch.get_rng_state(), before)
    assert many.shape == (40, 12)
    assert (many[:, 0] == bundled.tokenizer.bos_token_id).all()
    assert torch.equal(sample(bundled, 33), many[:33])
    assert not torch.equal(sample(bundled, 40, seed=1), many)
    assert len({tuple(row) for row in many.tolist()}) == 40


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_are_drawn_from_the_models_own_distribution(bundled, temperature):
    """Drawn from p, a token's surprise under p is its entropy on average."""
    tokens = sample(bundled, 128, 40, temperature=temperature)
    with torch.no_grad():
        log_p = (bundled(tokens)[:, :-1].double() / temperature).log_softmax(-1)
    surprise = -log_p.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    gap = surprise - entropy  # a martingale: its terms are uncorrelated
    error = gap.std() / gap.numel() ** 0.5
    assert gap.mean().abs() < 4 * error
    other = (bundled(tokens)[:, :-1].double() / (2 * temperature)).log_softmax(-1)
    wrong = -other.gather(-1, tokens[:, 1:, None])[..., 0] + (other.exp() * other).sum(-1)
    assert wrong.mean().abs() > 20 * error


def test_a_file_goes_on_where_it_stopped(bundled, tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "_BATCH", 4)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert write_samples(bundled, whole, 10, 8, progress=False) == 0
    cut.write_bytes(whole.read_bytes()[: -len(whole.read_bytes()) // 3])
    assert write_samples(bundled, cut, 10, 8, progress=False) == 4
    assert cut.read_bytes() == whole.read_bytes()
    assert write_samples(bundled, cut, 6, 8, progress=False) == 10
    assert cut.read_bytes() == whole.read_bytes()
    rows = [json.loads(line)["tokens"] for line in whole.read_text().splitlines()]
    assert torch.equal(torch.tensor(rows), sample(bundled, 10, 8)[:, 1:])
    text = open_sequences(whole, bundled.tokenizer, 8, prepend_bos=True)
    taken = sorted(text.take(10).tolist())
    assert taken == sorted(sample(bundled, 10, 8).tolist())  # whole sequences, in another order
    with pytest.raises(OutputError, match=r"was sampled with .*'seed': 0.*choose another name"):
        write_samples(bundled, cut, 20, 8, seed=1, progress=False)
    assert cut.read_bytes() == whole.read_bytes()


def test_what_is_not_sampled_text_stays(bundled, tmp_path):
    for content in ('{"text": "mine"}\n', "mine\n", "[1]\n"):
        file = tmp_path / "mine.jsonl"
        file.write_text(content)
        with pytest.raises(OutputError, match="is not sampled text: choose another name"):
            write_samples(bundled, file, 2, 8, progress=False)
        assert file.read_text() == content
    with pytest.raises(OutputError, match="cannot be written"):
        write_samples(bundled, tmp_path / "none" / "x.jsonl", 2, 8, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "0 sequences cannot be sampled: give 1 or more"),
        ((2, 1), "sequences of 1 tokens cannot be sampled: give 2 to"),
        ((2, 10**6), "the model's context"),
        ((2, 8, 0.0), "temperature=0.0: give a positive number"),
        ((2, 8, float("nan")), "give a positive number"),
    ],
)
def test_what_cannot_be_sampled_is_refused(bundled, arguments, message):
    n, length, *temperature = arguments
    with pytest.raises(DataError, match=message):
        sample(bundled, n, length, **({"temperature": temperature[0]} if temperature else {}))


def test_a_model_without_a_tokenizer_has_nothing_to_begin_with(bundled, monkeypatch):
    monkeypatch.setattr(bundled, "tokenizer", None)
    with pytest.raises(DataError, match="set its bos_token"):
        sample(bundled, 2)


def test_the_command_says_how_to_train_on_it(monkeypatch, tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    for arguments in (
        ["sample", "--out", file, "--sequences", 40, "--sequence-length", 32],
        ["remove", "--data", file, "--out", tmp_path / "run", "--sequence-length", 32, "--steps",
         16, "--batch", 2, "--heldout", 2, "--prepend-bos", "--recipe", "distilled"],
    ):  # fmt: skip
        lnfree(monkeypatch, *arguments)
    shown = capsys.readouterr().out
    assert f"lnfree remove --data {file} --sequence-length 32 --prepend-bos" in shown
    assert (tmp_path / "run" / "model").exists()


def test_an_interrupted_command_says_that_it_can_go_on(monkeypatch, tmp_path, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampled, "_draw", interrupted)
    with pytest.raises(SystemExit) as stopped:
        lnfree(monkeypatch, "sample", "--out", tmp_path / "own.jsonl")
    assert stopped.value.code == 130
    assert "the same command continues it" in capsys.readouterr().err
