"""Stretches of repeated and of random tokens in the training text."""

from dataclasses import replace

import pytest
import torch
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.data.stretches import SHORTEST, with_random_tokens, with_repeats
from lnfree_interp.errors import RecipeError
from lnfree_interp.removal.plan import plan

TEXT = torch.arange(6400).view(100, 64)


def test_a_share_of_the_sequences_has_one_stretch_of_tokens_from_the_text():
    found = with_repeats(TEXT, 0.3, "0, 7")
    changed = (found != TEXT).any(1)
    assert 15 < changed.sum() < 45
    assert torch.equal(found[:, 0], TEXT[:, 0])
    widths, periods = set(), set()
    for row, text in zip(found[changed], TEXT[changed], strict=True):
        at = (row != text).nonzero().flatten()
        stretch = row[at[0] : at[-1] + 1]
        widths.add(len(stretch))
        periods.add(len(stretch.unique()))
        assert torch.equal(stretch[2:], stretch[:-2])
    # A token that is its own copy does not show, hence one less now and then.
    assert {min(w for w in (8, 16, 32) if w >= width) for width in widths} == {8, 16, 32}
    assert periods == {1, 2}


def test_the_seed_decides_and_the_text_stays():
    before = TEXT.clone()
    once, again, other = (with_repeats(TEXT, 0.5, seed) for seed in ("a", "a", "b"))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(TEXT, before)
    assert torch.equal(with_repeats(TEXT, 0.0, "a"), TEXT)
    short = TEXT[:, :SHORTEST]
    assert torch.equal(with_repeats(short, 1.0, "a"), short)


def test_random_tokens_come_from_the_whole_vocabulary():
    found = with_random_tokens(TEXT, 0.5, "0, 7", d_vocab=20_000)
    changed = (found != TEXT).any(1)
    assert 30 < changed.sum() < 70
    assert torch.equal(found[:, 0], TEXT[:, 0])
    stretches = []
    for row, text in zip(found, TEXT, strict=True):
        if len(at := (row != text).nonzero().flatten()):
            stretches.append(row[at[0] : at[-1] + 1])
    assert {len(stretch) for stretch in stretches} == {8, 16, 32}
    fresh = [stretch for stretch in stretches if len(stretch.unique()) == len(stretch)]
    assert 0.3 < len(fresh) / len(stretches) < 0.7
    new = torch.cat(fresh)
    assert (new < 20_000).all()
    assert 0.5 < (new >= 10_000).sum() / (new < 10_000).sum() < 2
    for stretch in stretches:
        period = len(stretch.unique())
        assert period == len(stretch) or 4 <= period <= len(stretch) // 2
        assert torch.equal(stretch[period:], stretch[:-period])
    again = with_random_tokens(TEXT, 0.5, "0, 7", d_vocab=20_000)
    assert torch.equal(found, again)
    assert torch.equal(with_random_tokens(TEXT, 0.0, "a", 9), TEXT)


def test_a_run_trains_on_random_tokens_and_its_control_does_not():
    model = live_model("gpt2", torch.float32)
    text = torch.full((60, 16), 7)
    recipe = replace(lf.recipes.distilled(model, steps=20), batch=2, precision="float32")
    recipe, seen = replace(recipe, random_tokens=1.0), []

    def look(x, hook):
        if torch.is_grad_enabled():  # training, not measuring
            seen.append((x != x[:, :1]).any(-1).sum(-1))

    hook = ("hook_embed", look)
    lf.remove_norms(model, recipe, text, fwd_hooks=[hook], progress=False, log_every=0)
    assert torch.cat(seen).shape == (40,)
    assert torch.cat(seen).min() >= SHORTEST - 2
    assert "100% of the sequences have a stretch of the whole vocabulary's" in plan(recipe)
    assert recipe.vanilla().random_tokens == 0
    with pytest.raises(RecipeError, match="random_tokens is a share"):
        replace(recipe, random_tokens=-0.5)


def test_a_run_trains_on_repeats_and_its_control_does_not():
    model = live_model("gpt2", torch.float32)
    text = torch.randint(300, (60, 16), generator=torch.Generator().manual_seed(0))
    recipe = lf.recipes.distilled(model, steps=20)
    recipe = replace(recipe, batch=2, repeats=1.0, precision="float32")
    seen = []
    hook = ("hook_embed", lambda x, hook: seen.append((x[:, 1:] == x[:, :-1]).all(-1).sum(-1)))
    lf.remove_norms(model, recipe, text, fwd_hooks=[hook], progress=False, log_every=0)
    assert max(int(row.max()) for row in seen) >= SHORTEST - 2
    assert "100% of the sequences have a stretch" in plan(recipe)
    assert recipe.vanilla().repeats == 0
    with pytest.raises(RecipeError, match="repeats is a share"):
        replace(recipe, repeats=1.5)
