"""The recipe that follows a measurement: its pace, its terms of the loss, and when it waits."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.architectures import make_model
from support.models import make_tokenizer

import lnfree_interp as lf
from lnfree_interp.errors import RecipeError, TooFewStepsError
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.removal import trainer
from lnfree_interp.removal.losses import Objective
from lnfree_interp.removal.plan import plan
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import Event, paced, sequential_sites
from lnfree_interp.removal.settings import OUTLIER, Statistics
from lnfree_interp.removal.statistics import TokenGroups
from lnfree_interp.removal.training_state import fingerprint

TEXT = torch.randint(20, 300, (16, 24), generator=torch.Generator().manual_seed(5))


def live(kind="llama-grouped", seed=0, **more):
    return lf.load(make_model(kind, seed=seed), tokenizer=make_tokenizer(), check=False, **more)


def site(layer):
    return NormSite("ln2", layer)


def test_cheap_sites_go_first_and_expensive_ones_have_the_more_time():
    costs = {site(0): 4.0, site(1): 0.0, site(2): 1.0, site(3): math.nan, site(4): 1e-9}
    events = paced(costs, start=10, over=100)
    assert [event.site.layer for event in events] == [1, 4, 2, 0, 3]
    # Roots: twice 0.02 (the floor), 1, 2, and the root of 8 for what is not finite.
    total = 0.04 + 1 + 2 + math.sqrt(8)
    ends = [10 + 100 * x / total for x in (0.02, 0.04, 1.04, 3.04, total)]
    assert [event.step for event in events] == [10, *(int(end) for end in ends[:-1])]
    assert [event.over for event in events] == [0, 0, 17, 34, 49]
    assert events[-1].end == 110
    assert {event.step for event in paced(dict.fromkeys(costs, 0.0), start=3, over=0)} == {3}
    slower = paced(costs, start=10, over=100, fade=20)
    assert [event.step for event in slower] == [event.step for event in events]
    assert [e.over for e in slower] == [20, 20, *(e.over + 20 for e in events[2:])]
    with pytest.raises(RecipeError, match="negative"):
        paced(costs, start=-1, over=3)
    with pytest.raises(RecipeError, match="no norm sites"):
        paced({}, start=0, over=3)


def slowly(steps=60, kinds=None, maker=3.0, **settings):
    """The recipe for a model whose first tokens are massive, as if an MLP made them so."""
    model = live()
    with torch.no_grad():
        model.embed.W_E[7] *= 200
    text = TEXT.clone()
    text[:, 0] = 7
    every = lf.list_norm_sites(lf.with_norm_sites(model))
    sites = [site for site in every if kinds is None or site.kind in kinds]
    costs = lf.site_sensitivity(model, text, sites, progress=False)
    made = {
        s: replace(cost, divergence=maker)
        for s, cost in costs.first_apart.items()
        if s.kind == "ln2"
    }
    costs = replace(costs, first_apart=costs.first_apart | made)
    return costs, replace(lf.recipes.measured(costs, steps=steps), **settings)


def in_order(costs):
    return sorted(costs.first_apart, key=lambda site: costs.first_apart[site].divergence)


def test_massive_activations_make_norms_go_slowly():
    costs, recipe = slowly(steps=100)
    assert costs.first_matters
    assert [event.site for event in recipe.events] == in_order(costs)
    assert min(event.over for event in recipe.events) == 16
    assert recipe.events[0].step == 30
    assert recipe.events[-1].end == 56 == recipe.special.outliers_from
    assert not recipe.special.keep_first  # first tokens come to the common scale, so that it folds
    assert (recipe.removed_at, recipe.removed_by) == (89, 99)
    assert not recipe.statistics.follow_frozen
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_where_mlps_keep_their_norms_first_tokens_may_stay_massive():
    costs, recipe = slowly(steps=100, kinds=("ln1.qk", "ln1.v", "ln_final"))
    assert len(recipe.events) == len(costs.alone) == 2 * live().cfg.n_layers + 1
    assert recipe.special.keep_first
    assert recipe.special.outlier_caps == (1.25, 10.0)
    assert (recipe.losses, recipe.repeats) == ({"stream": 1.0}, 0)
    assert (recipe.random_tokens, recipe.embedding_cap) == (0, 0)
    assert (recipe.events[0].step, recipe.removed_at, recipe.removed_by) == (3, 68, 88)
    for maker in (0.0, 0.3):
        assert slowly(steps=100, maker=maker)[1].special.keep_first
    for maker in (0.31, math.inf, math.nan):
        assert not slowly(steps=100, maker=maker)[1].special.keep_first
    _, everywhere = slowly(steps=100)
    assert everywhere.special.outlier_caps == (1.25, 1.6)
    assert [everywhere.special.cap(step) for step in (99, 1000)] == pytest.approx([1.6, 1.6])
    assert recipe.special.cap(68) == math.inf
    assert everywhere.losses == {"stream": 1.0, "scales": lf.Ramp(1.0, 30.0, 0, 15)}
    assert (everywhere.repeats, everywhere.random_tokens) == (0.15, 0.3)
    assert everywhere.embedding_cap == 1.3
    assert recipe.weight_average == everywhere.weight_average == 0.99


def test_ordinary_activations_let_norms_go_at_once():
    costs = lf.site_sensitivity(live(), TEXT, progress=False)
    assert not costs.first_matters
    recipe = lf.recipes.measured(costs, steps=100)
    smaller = {"batch": 2, "micro_batch": 2, "lr": 3e-4, "final_lr": 0.1, "evaluate_every": 200}
    as_distilled = lf.recipes.distilled(live(), steps=100)
    assert recipe == replace(as_distilled, name="measured", **smaller)
    assert recipe.removed_at == recipe.removed_by
    few = lf.recipes.measured(costs, steps=9)
    assert [event.site for event in few.events] == in_order(costs)
    assert few.removed_at == 1
    assert recipe.special == lf.Special()
    assert recipe.losses == {}


def test_without_a_measurement_every_site_costs_the_same():
    recipe = lf.recipes.measured(sequential_sites(3), steps=100)
    assert recipe.events == lf.recipes.distilled(sequential_sites(3), steps=100).events
    assert not recipe.special.keep_first
    with pytest.raises(TooFewStepsError, match="too few to let norms go one by one") as error:
        lf.recipes.measured(sequential_sites(3), steps=7)
    assert lf.recipes.measured(sequential_sites(3), steps=error.value.smallest).removed_at < 8
    with pytest.raises(RecipeError, match="no norm sites"):
        lf.recipes.measured((), steps=100)


def test_no_run_of_the_slow_recipe_is_too_short():
    costs, _ = slowly()
    for steps in range(8, 60):
        assert lf.recipes.measured(costs, steps=steps).removed_by < steps


def terms(student, teacher, tokens, first_apart=False, **weights):
    objective = Objective(student, teacher, torch.float64, TokenGroups(0), first_apart)
    return objective(tokens, {"distillation": 1.0} | weights)


@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
def test_the_distance_of_streams_by_brute_force(kind):
    """Outliers in the original's stream do not count, and first tokens by their direction."""
    student, teacher = (
        lf.with_norm_sites(live(kind, seed, dtype=torch.float64)) for seed in (0, 1)
    )
    with torch.no_grad():
        teacher.embed.W_E[7] *= 300
    tokens = TEXT[:3].clone()
    tokens[0, 0] = tokens[1, 4] = 7
    tokens[2, 6] = 0  # end-of-text
    streams = []
    for model in (student, teacher):
        _, cache = model.run_with_cache(tokens)
        streams.append([cache["resid_post", layer] for layer in range(model.cfg.n_layers)])
    expected, left_out = [], 0
    for ours, theirs in zip(*streams, strict=True):
        norms = {
            (i, j): theirs[i, j].norm().item()
            for i in range(3)
            for j in range(1, 24)
            if tokens[i, j] != 0
        }
        median = sorted(norms.values())[(len(norms) - 1) // 2]
        errors = {}
        for i in range(3):
            for j in range(24):
                if norms.get((i, j), 0) > OUTLIER * median:
                    left_out += 1
                    continue
                a, b = ours[i, j], theirs[i, j]
                if j == 0:
                    a, b = a / a.norm(), b / b.norm()
                errors[i, j] = ((a - b).square().sum() / b.square().sum()).item()
        first = [error for (_, j), error in errors.items() if j == 0]
        others = [error for (_, j), error in errors.items() if j > 0]
        expected.append(sum(others) / len(others) + sum(first) / 3)
    assert left_out >= 1
    found = terms(student, teacher, tokens, stream=1.0).terms["stream"].item()
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)


@pytest.mark.parametrize("first_apart", [False, True])
def test_the_term_on_scales_by_brute_force_and_where_it_pulls(first_apart):
    """At every site, beside its constant, or at a live one beside the median."""
    model = lf.with_norm_sites(live(dtype=torch.float64))
    with torch.no_grad():
        model.embed.W_E[7] *= 50
    tokens = TEXT[:3].clone()
    tokens[:, 0] = tokens[1, 4] = 7
    lf.freeze_site(model, "blocks.1.ln2", 0.5)
    _, cache = model.run_with_cache(tokens)
    expected = []
    for site in lf.list_norm_sites(model):
        square = cache[f"{site}.hook_in"].square().mean(-1)
        scale = (square + model.cfg.eps).sqrt()
        others = scale[:, 1:].flatten()
        median = others.sort().values[(len(others) - 1) // 2].item()
        sigma = 0.5 if str(site) == "blocks.1.ln2" else median
        squares = [[math.log(x / sigma) ** 2 for x in row] for row in scale.tolist()]
        apart = [[q * (1 + 10 * min(q, 1)) for q in row] for row in squares]
        first = 0.0 if first_apart else sum(row[0] for row in apart) / len(apart) / 32
        expected.append(sum(sum(row[1:]) for row in apart) / len(others) + first)
    loss = terms(model, model, tokens, first_apart, distillation=0.0, scales=1e6)
    assert loss.terms["scales"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    loss.total.backward()
    gradient = model.embed.W_E.grad
    # A longer embedding raises it.
    assert torch.linalg.vecdot(gradient[7], model.W_E[7].detach()) > 0
    alike, same = lf.with_norm_sites(live()), torch.full((1, 24), 9)  # one stream at all positions
    assert terms(alike, alike, same, distillation=0.0, scales=1.0).terms["scales"] < 1e-9


def waiting(model, above, steps, **more):
    recipe = lf.recipes.measured(model, steps=60)
    plain = {
        "batch": 4,
        "lr": 4e-4,
        "precision": "float32",
        "wait": lf.Wait(above=above, steps=steps),
    }
    return replace(recipe, **plain | more)


def test_the_schedule_waits_until_what_was_frozen_is_absorbed(tmp_path):
    model = live()
    started = {}
    for above, steps in ((1e9, 8), (1e-12, 8)):
        run = lf.remove_norms(model, waiting(model, above, steps), TEXT, progress=False)
        started[above] = [r.step for r in run.history for _ in r.frozen]
        assert all(lf.get_norm(run.model, s).frozen for s in lf.list_norm_sites(run.model))
    # Nothing is above the first threshold; everything is above the second, until 8 steps are up.
    # It waits from the first event on.
    assert len(started[1e9]) == len(started[1e-12])
    assert min(started[1e-12]) == min(started[1e9])
    assert max(started[1e-12]) == max(started[1e9]) + 8
    recipe = waiting(model, 1e-12, 8)
    assert recipe.removed_by == recipe.removed_at + 8
    assert "up to 8 steps" in plan(recipe)
    assert recipe.vanilla().wait is None
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    with pytest.raises(TooFewStepsError):
        waiting(model, 1.0, 50)
    with pytest.raises(RecipeError, match="distillation above 0 at every step"):
        waiting(model, 1.0, 8, distillation=0.0)
    with pytest.raises(RecipeError, match="must be positive"):
        lf.Wait(above=0.0, steps=3)


@pytest.mark.parametrize("source", ["ema", "batch"])
def test_a_constant_stays_while_the_schedule_waits(source):
    """The step at which a site is frozen comes once more at every step of waiting."""
    events = tuple(Event(step, site(layer)) for layer, step in ((0, 2), (1, 3), (2, 3)))
    recipe = waiting(live(), 1e-12, 8, events=events, statistics=Statistics(source=source))
    run = lf.remove_norms(live(), recipe, TEXT, progress=False)
    frozen = {site: sigma for record in run.history for site, sigma in record.frozen.items()}
    assert len(frozen) == 3
    assert frozen == {site: lf.get_norm(run.model, site).constant for site in frozen}


def test_a_run_of_the_slow_recipe_resumes_bit_for_bit(tmp_path):
    """With all that it has: terms, a cap, waiting, stretches, an unembedding of its own."""
    _, recipe = slowly(steps=40, batch=4, guard=lf.Guard(above_best=99.0, in_a_row=3, spike=5.0))
    assert recipe.embedding_cap
    assert recipe.wait is not None
    whole = lf.remove_norms(live(), recipe, TEXT, out=tmp_path / "whole", progress=False)
    call = {"out": tmp_path / "parts", "checkpoint_every": 7, "progress": False, "minutes": 0.0}
    for n in range(recipe.steps - 1):
        with pytest.raises(lf.errors.PausedError):
            lf.remove_norms(live(), recipe, TEXT, **call, resume=n > 0)
    parts = lf.remove_norms(live(), recipe, TEXT, **call, resume=True)
    assert [r.losses for r in parts.history] == [r.losses for r in whole.history]
    assert fingerprint(parts.model) == fingerprint(whole.model)


def test_a_run_that_waited_resumes_bit_for_bit(tmp_path):
    model = live()
    recipe = waiting(model, 1e-12, 8)
    whole = lf.remove_norms(model, recipe, TEXT, progress=False)

    class StopError(Exception):
        pass

    def stop(x, hook):
        stop.calls += 1
        if stop.calls > 20:
            raise StopError

    stop.calls = 0
    call = {"out": tmp_path / "run", "checkpoint_every": 5, "progress": False}
    with pytest.raises(StopError):
        lf.remove_norms(model, recipe, TEXT, **call, fwd_hooks=[("hook_embed", stop)])
    resumed = lf.remove_norms(model, recipe, TEXT, **call, resume=True)
    assert [r.losses for r in resumed.history] == [r.losses for r in whole.history]
    for (name, ours), theirs in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs) or ours.isnan().all(), name


@pytest.mark.parametrize("follow", [False, True])
def test_sigma_stays_when_frozen_or_follows_until_no_token_is_special(follow):
    """A constant, and that of first tokens; on request they move until the last cap is gone."""
    _, recipe = slowly(
        batch=4, wait=None, guard=lf.Guard(above_best=99.0), random_tokens=0.0,
        embedding_cap=0.0,
    )  # fmt: skip
    recipe = replace(
        recipe,
        special=replace(recipe.special, keep_first=True),
        statistics=replace(recipe.statistics, follow_frozen=follow),
    )
    seen = {}

    class Noted(trainer.Transition):
        def before(self, step, forward=None):
            found = super().before(step, forward)
            norm = self.norms["blocks.1.ln2"]
            seen[step] = (norm.constant, norm.first) if norm.frozen else None
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Transition", Noted)
        lf.remove_norms(live(), recipe, TEXT, progress=False)
    frozen = {step: pair for step, pair in seen.items() if pair is not None}
    moving = [frozen[step] for step in sorted(frozen) if step <= recipe.removed_at]
    assert len(set(moving)) == (len(moving) if follow else 1)
    assert len(moving) > 10
    assert all(first is not None for _, first in moving)
    still = {frozen[step] for step in frozen if step > recipe.removed_at}
    assert len(still) == 1
