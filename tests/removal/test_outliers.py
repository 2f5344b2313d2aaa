"""Tokens whose scale is far above all others: apart for a while, and named when they run away."""

import dataclasses
import math
import statistics
from itertools import pairwise

import pytest
import torch
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.errors import RecipeError, TrainingError
from lnfree_interp.removal.divergence import find_runaway
from lnfree_interp.removal.freezing import freeze_in_one_pass
from lnfree_interp.removal.settings import OUTLIER
from lnfree_interp.removal.statistics import TokenGroups, measure, measure_sigma
from lnfree_interp.removal.transition import Transition

TEXT = torch.randint(20, 300, (16, 24), generator=torch.Generator().manual_seed(2))
LARGE = 7
"""A token whose embedding is many times as long as any other."""


@pytest.fixture
def model():
    live = live_model("llama-grouped", torch.float32, tokenizer=True)
    with torch.no_grad():
        live.embed.W_E[LARGE] *= 200
    return live


def recipe_for(model, special, steps=20, **more):
    recipe = lf.recipes.at_once(model, steps=steps)
    plain = {"batch": 4, "micro_batch": 4, "special": special, "precision": "float32"}
    plain |= {"statistics": lf.Statistics(tokens="ordinary", source="start", sequences=8)}
    return dataclasses.replace(recipe, **plain | more)


def test_a_cap_holds_outliers_until_it_has_risen(model):
    """What is divided by is the constant, or the token's own scale over the cap if that is more."""
    sited = lf.with_norm_sites(model)
    text = TEXT.clone()
    text[1, 5] = LARGE
    special = lf.Special(outliers_from=6, outliers_until=12, keep_first=True)
    recipe = recipe_for(model, special)
    transition = Transition(sited, recipe, TEXT[:8])
    name = "blocks.0.ln2"
    for now in (4, 9, 12):
        transition.before(now)
        transition.groups.mark(text)
        norm = lf.get_norm(sited, name)
        with sited.hooks(fwd_hooks=transition.hooks()):
            _, cache = sited.run_with_cache(text)
        r = norm.token_sigma(cache[f"{name}.hook_in"])
        assert r[1, 5] > OUTLIER * norm.constant
        expected = torch.full_like(r, norm.constant)
        expected[:, 0] = norm.first
        cap = special.cap(now)
        expected = expected.maximum(r / cap)
        assert (r[1, 5].item() == pytest.approx(cap * expected[1, 5].item())) is (now < 12)
        scale = cache[f"{name}.hook_scale"]
        torch.testing.assert_close(scale, expected.to(scale), rtol=1e-5, atol=1e-6)
    assert transition._own == {}


def test_the_logarithm_of_the_cap_rises_geometrically():
    special = lf.Special(outliers_from=10, outliers_until=30, outlier_caps=(1.2, 3.0))
    caps = [special.cap(step) for step in range(31)]
    assert caps[:11] == [1.2] * 11
    logs = [math.log(cap) for cap in caps[10:30]]
    ratios = {round(later / now, 9) for now, later in pairwise(logs)}
    assert len(ratios) == 1
    assert logs[-1] * ratios.pop() == pytest.approx(math.log(3.0))
    assert caps[30] == math.inf
    stays = dataclasses.replace(special, outliers_stay=True)
    assert [stays.cap(step) for step in range(30)] == caps[:30]
    assert [stays.cap(step) for step in (30, 31, 500)] == pytest.approx([3.0] * 3)
    assert lf.Special(outliers_stay=True).cap(9) == math.inf
    assert lf.Special().cap(0) == lf.Special(outliers_from=9, outliers_until=0).cap(0) == math.inf
    for caps in ((1.0, 2.0), (3.0, 2.0), (2.0, math.inf), (math.nan, 2.0)):
        with pytest.raises(RecipeError, match="above 1, and the second is not the smaller one"):
            lf.Special(outlier_caps=caps)
    with pytest.raises(RecipeError, match="let it end later"):
        lf.Special(outliers_from=30, outliers_until=30)


@pytest.mark.parametrize("stays", [False, True])
def test_a_cap_that_stays_is_there_in_training_and_not_in_what_is_evaluated(model, stays):
    with torch.no_grad():
        model.embed.W_E[LARGE] /= 100  # so that it is borne without a cap too
    text = TEXT.clone()
    text[:, 5] = LARGE
    special = lf.Special(
        outliers_from=4, outliers_until=8, outlier_caps=(1.05, 1.1), outliers_stay=stays
    )
    settings = {"batch": 16, "micro_batch": 16, "lr": 1e-9, "evaluate_every": 4}
    settings["guard"] = lf.Guard(above_best=1e9, sigma_factor=1e9)
    recipe = recipe_for(model, special, scale_anchor=0.0, **settings)
    run = lf.remove_norms(model, recipe, text, heldout=text, progress=False)
    training = [record.losses["cross_entropy"] for record in run.history]
    heldout = {r.step: r.heldout for r in run.history if r.heldout is not None}
    with torch.no_grad():
        finished = run.model(text, return_type="loss").item()
    for step in (11, 15, 19):
        assert heldout[step] == pytest.approx(finished, rel=1e-5)
        assert training[step] == pytest.approx(training[8], rel=1e-5)
    assert (training[19] == pytest.approx(finished, rel=1e-4)) is not stays
    assert heldout[3] != pytest.approx(finished, rel=1e-4)


def test_outliers_do_not_count_in_the_constant_of_ordinary_tokens(model):
    """By brute force: the median of what is left without first and end-of-text tokens."""
    sited = lf.with_norm_sites(model)
    text = TEXT.clone()
    text[1, 5] = text[2, 9] = LARGE
    text[3, 4] = 0  # end-of-text
    found = measure(sited, ["blocks.0.ln2"], text, groups=TokenGroups(0))["blocks.0.ln2"]
    _, cache = sited.run_with_cache(text)
    r = lf.get_norm(sited, "blocks.0.ln2").token_sigma(cache["blocks.0.ln2.hook_in"])[..., 0]
    candidates = [r[i, j].item() for i in range(16) for j in range(1, 24) if text[i, j] != 0]
    limit = OUTLIER * statistics.median_low(candidates)
    far = [x for x in candidates if x > limit]
    assert len(far) >= 2
    assert found["outlier"].count == len(far)
    assert found["outlier"].first == pytest.approx(sum(far), rel=1e-6)
    kept = [x for x in candidates if x <= limit]
    assert found["ordinary"].count == len(kept)
    assert found["ordinary"].average("mean") == pytest.approx(statistics.mean(kept), rel=1e-6)
    sigma = measure_sigma(
        sited, ["blocks.0.ln2"], text, statistics=lf.Statistics(tokens="ordinary")
    )
    assert sigma["blocks.0.ln2"] < statistics.mean(candidates)


def test_the_guard_names_the_site_and_the_token_where_activations_ran_away(model):
    text = TEXT.clone()
    text[:, 1] = LARGE
    recipe = recipe_for(model, lf.Special(), guard=lf.Guard(above_best=1.0, sigma_factor=30.0))
    measured = dataclasses.replace(recipe.statistics, average="least_squares", sequences=16)
    recipe = dataclasses.replace(recipe, statistics=measured)
    # Constants of a text without the large token: the run then meets it.
    both = torch.cat([TEXT, text])
    with pytest.raises(TrainingError) as error:
        lf.remove_norms(
            model, dataclasses.replace(recipe, lr=1e-3), FirstOrdinary(both, 16), progress=False,
            log_every=1,
        )  # fmt: skip
    said = str(error.value)
    token = repr(model.tokenizer.decode([LARGE]))
    assert f"where {token} at position 1 of sequence" in said
    assert "it began at blocks.0." in said
    assert "outliers_until" in said
    assert "lower lr" not in said


class FirstOrdinary:
    """A text whose first sequences, on which sigma is measured, are ordinary."""

    def __init__(self, tokens, n):
        self.tokens, self.n, self.at = tokens, n, 0

    sequence_length, epoch = 24, 0

    def take(self, n):
        if self.at == 0 and n == self.n:
            return self.tokens[:n]
        self.at += n
        rows = torch.arange(self.at, self.at + n) % self.n + self.n
        return self.tokens[rows]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def fingerprint(self):
        return "a text of two halves"


def test_a_first_token_with_a_constant_of_its_own_is_no_runaway(model):
    text = TEXT.clone()
    text[:, 0] = LARGE
    sited = lf.with_norm_sites(model)
    freeze_in_one_pass(sited, lf.list_norm_sites(sited), text)
    norms = {str(site): lf.get_norm(sited, site) for site in lf.list_norm_sites(sited)}
    ratio = max(norm.first / norm.constant for norm in norms.values())
    assert ratio > 50
    assert find_runaway(sited, norms, text, (), 50.0, sited, len(text)) is None
    elsewhere = TEXT.clone()
    elsewhere[3, 5] = LARGE
    said = find_runaway(sited, norms, elsewhere, (), 50.0, sited, 1)
    assert "at position 5 of sequence 3" in str(said)


def test_a_run_without_runaways_says_what_it_said(model):
    recipe = recipe_for(model, lf.Special(), guard=lf.Guard(above_best=1e-9, sigma_factor=1e9))
    with pytest.raises(TrainingError, match="lower lr, or widen the gaps"):
        lf.remove_norms(model, dataclasses.replace(recipe, lr=1e-4), TEXT, progress=False)


def test_settings_and_words(model):
    with pytest.raises(RecipeError, match="negative"):
        lf.Special(outliers_until=-1)
    recipe = recipe_for(model, lf.Special(outliers_until=15))
    assert recipe.removed_at == 15
    assert lf.Recipe.from_json(recipe.to_json()) == recipe
    widened = recipe.widened(5, 2.0)
    assert widened.special.outliers_until == widened.removed_at > 15
    from lnfree_interp.removal.plan import plan

    assert "rises from step 0 and is gone at step 15" in plan(recipe)
