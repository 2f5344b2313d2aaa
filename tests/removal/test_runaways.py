"""Tokens that run away, and the norms that hold them."""

import pytest
import torch
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.errors import TrainingError
from lnfree_interp.models.agreement import random_tokens
from lnfree_interp.removal import run_job as run_job_module
from lnfree_interp.removal import runaways
from lnfree_interp.removal.freezing import restored
from lnfree_interp.removal.job import RemovalJob
from lnfree_interp.removal.run_job import run_job
from lnfree_interp.removal.runaways import FAR, runs_away_at
from lnfree_interp.removal.statistics import measure_sigma

TEXT = torch.randint(100, (6, 24), generator=torch.Generator().manual_seed(3))
WILD = 250  # a token that no other sequence has


def frozen_gpt2(*wild_layers):
    """All norms frozen. A token may be eight times as large as the others, and the MLP of a layer
    answer to it, unless its norm is live.

    Args:
        wild_layers: The layers of such MLPs, in order.
    """
    model = live_model("gpt2", torch.float32, n_layer=3)
    if wild_layers:
        with torch.no_grad():
            model.W_E[WILD] *= 8
            model.blocks[0].mlp.W_out[:] = 0  # so that its norm cannot help
    for layer in wild_layers:
        with torch.no_grad():
            mlp, norm = model.blocks[layer].mlp, model.blocks[layer].ln2
            _, cache = model.run_with_cache(with_the_wild_token())
            y, size = norm(cache["resid_mid", layer]), cache["resid_mid", 0][0].norm()
            direction = y[2, 5] / y[2, 5].norm()
            mlp.W_in[:, 0], mlp.b_in[0] = direction, -y[2, 5].norm()  # what is larger than live
            mlp.W_out[0] = 16 * direction * size
    sited = lf.with_norm_sites(model)
    sigma = measure_sigma(sited, lf.list_norm_sites(sited), TEXT)
    for site, value in sigma.items():
        lf.freeze_site(sited, site, value)
    return sited


def with_the_wild_token():
    text = TEXT.clone()
    text[2, 5] = WILD
    return text


def running_away(model, tokens):
    return runs_away_at(model, tokens) < len(lf.list_norm_sites(model))


def test_sequences_with_a_token_that_is_far_too_large():
    model = frozen_gpt2()
    assert not running_away(model, TEXT).any()
    text = TEXT.clone()
    with torch.no_grad():
        model.embed.W_E[WILD] *= 1e6
    text[4, 7] = WILD
    sites = len(lf.list_norm_sites(model))
    assert runs_away_at(model, text).tolist() == [sites] * 4 + [0, sites]
    lf.get_norm(model, "blocks.0.ln1.qk").thaw()
    assert runs_away_at(model, text).tolist() == [sites] * 4 + [1, sites]
    with torch.no_grad():
        model.embed.W_E[WILD] = torch.nan
    assert running_away(model, text).tolist() == [False] * 4 + [True, False]


def test_what_a_token_is_measured_against():
    """A token may be up to FAR times as large as a constant; live norms do not count."""
    model = frozen_gpt2()
    norm = lf.get_norm(model, "ln_final")
    found = {}
    look = [("ln_final.hook_in", lambda x, hook: found.update(most=norm.token_sigma(x).max()))]
    model.run_with_hooks(TEXT, fwd_hooks=look, return_type=None)
    norm.freeze(found["most"].item() / FAR * 1.001)
    assert not running_away(model, TEXT).any()
    norm.freeze(found["most"].item() / FAR * 0.999)
    assert running_away(model, TEXT).sum() == 1
    norm.thaw()
    assert not running_away(model, TEXT).any()


def test_the_norm_before_the_mlp_that_answers_is_live_again(monkeypatch):
    monkeypatch.setattr(runaways, "FAR", 30.0)
    model = frozen_gpt2(1)
    text = with_the_wild_token()
    before = {str(s): lf.get_norm(model, s).constant for s in lf.list_norm_sites(model)}
    assert running_away(model, text).any()
    held = lf.thaw_runaways(model, text, progress=False)
    assert list(map(str, held)) == ["blocks.1.ln2"]
    assert not running_away(model, text).any()
    assert list(map(str, lf.live_sites(model))) == ["blocks.1.ln2"]
    for site in lf.list_norm_sites(model):
        if site not in held:
            assert lf.get_norm(model, site).constant == before[str(site)]
    assert lf.thaw_runaways(model, text, progress=False) == ()


def test_two_norms_where_one_alone_is_not_enough(monkeypatch):
    """Two MLPs answer to a token: with the norm of either live it runs away still."""
    monkeypatch.setattr(runaways, "FAR", 30.0)
    model, text = frozen_gpt2(1, 2), with_the_wild_token()
    for layer in (1, 2):
        with restored([lf.get_norm(model, f"blocks.{layer}.ln2")]):
            lf.get_norm(model, f"blocks.{layer}.ln2").thaw()
            assert running_away(model, text).any()
    held = lf.thaw_runaways(model, text, progress=False)
    assert list(map(str, held)) == ["blocks.1.ln2", "blocks.2.ln2"]
    assert not running_away(model, text).any()


def test_a_norm_that_turns_out_to_be_needless_stays_frozen(monkeypatch):
    """The norm of block 0 holds most sequences; the last one needs two others, which hold all."""
    model, text = frozen_gpt2(), TEXT[:3].clone()
    text[:, 0] = torch.arange(3)
    held_by = [[{0}, {1}], [{0}, {2}], [{1, 2}]]

    def pretend(model, tokens):
        live = {site.layer for site in lf.live_sites(model) if site.kind == "ln2"}
        held = [any(some <= live for some in held_by[row[0]]) for row in tokens.tolist()]
        return torch.where(torch.tensor(held), 10, 8)

    monkeypatch.setattr(runaways, "runs_away_at", pretend)
    held = lf.thaw_runaways(model, text, progress=False)
    assert list(map(str, held)) == ["blocks.1.ln2", "blocks.2.ln2"]
    assert list(map(str, lf.live_sites(model))) == ["blocks.1.ln2", "blocks.2.ln2"]


def test_what_lets_other_tokens_run_away_is_not_chosen(monkeypatch):
    """The norms of blocks 0 and 1 hold a token alike; with that of block 0 another one runs away,
    which only the norm of block 2 would hold."""
    model, text = frozen_gpt2(), TEXT[:2].clone()
    text[:, 0] = torch.arange(2)

    def pretend(model, tokens):
        live = {site.layer for site in lf.live_sites(model) if site.kind == "ln2"}
        good = [bool(live & {0, 1}), 0 not in live or 2 in live]
        return torch.tensor([10 if good[row[0]] else 8 for row in tokens.tolist()])

    monkeypatch.setattr(runaways, "runs_away_at", pretend)
    assert list(map(str, lf.thaw_runaways(model, text, progress=False))) == ["blocks.1.ln2"]


def test_weights_that_are_broken_are_no_runaway():
    model = frozen_gpt2()
    with torch.no_grad():
        model.embed.W_E[WILD] = torch.nan
    text = with_the_wild_token()
    constants = [lf.get_norm(model, site).constant for site in lf.list_norm_sites(model)]
    with pytest.raises(TrainingError, match="1 of 6 sequences are not finite, with all norms"):
        lf.thaw_runaways(model, text, progress=False)
    assert not lf.live_sites(model)
    assert constants == [lf.get_norm(model, site).constant for site in lf.list_norm_sites(model)]


def test_texts_of_other_lengths_are_held_together(monkeypatch):
    """What holds one text lets the other run away: with both given, none does."""
    model = frozen_gpt2()
    short, long = TEXT[:2, :5].clone(), TEXT[2:5].clone()

    def pretend(model, tokens):
        live = {site.layer for site in lf.live_sites(model) if site.kind == "ln2"}
        good = live == {0} if tokens.shape[1] == 5 else 1 in live
        good = good or live >= {0, 1}
        return torch.full((len(tokens),), 10 if good else 8)

    monkeypatch.setattr(runaways, "runs_away_at", pretend)
    held = lf.thaw_runaways(model, short, long, short[:0], progress=False)
    assert sorted(map(str, held)) == ["blocks.0.ln2", "blocks.1.ln2"]
    assert all(pretend(model, text).min() == 10 for text in (short, long))


def test_a_removal_says_which_norms_are_live_again(gpt2_folder, tmp_path, monkeypatch):
    """And its model is written with them."""
    looked_at = []

    def hold(model, *texts, **more):
        looked_at.extend(texts)
        lf.get_norm(model, "blocks.1.ln2").thaw()
        return (lf.NormSite("ln2", 1),)

    monkeypatch.setattr(run_job_module, "thaw_runaways", hold)
    text, said = tmp_path / "text.txt", []
    text.write_text("def f(x):\n    return x + 1\n" * 300)
    job = RemovalJob(
        model=str(gpt2_folder), data=str(text), sequence_length=16, heldout=4, steps=30,
        recipe="at-once", batch=2, micro_batch=2, lr=1e-6,
    )  # fmt: skip
    run = run_job(job, tmp_path / "run", progress=False, say=said.append)
    assert torch.equal(looked_at[0], random_tokens(run.model))
    assert looked_at[1].shape == (4, 16)
    [line] = [line for line in said if "live again" in line]
    assert "blocks.1.ln2, since held-out text or random tokens run away" in line
    again = lf.load(tmp_path / "run" / "model")
    assert list(map(str, lf.live_sites(again))) == ["blocks.1.ln2"]
    lf.compare_logits(again, run.model).require("written", 1e-5)
