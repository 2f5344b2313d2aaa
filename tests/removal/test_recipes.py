"""Schedules and recipes as data: the published numbers, on every architecture, in words."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.errors import NormSiteError, RecipeError
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.removal.plan import plan
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.recipes import BY_NAME
from lnfree_interp.removal.schedule import (
    Event,
    Ramp,
    all_at_once,
    last_step,
    published_order,
    sequential_sites,
    taper,
    weight_at,
    widened,
)
from lnfree_interp.removal.settings import Guard, Special, Statistics

# Steps of the first event of each phase and of ln_final, steps, sequences per step, peak and final
# learning rate, warm-up, auxiliary weight: config.py of submarat/removing-layer-norm, 2507.02559.
PUBLISHED = {
    "gpt2-small": (12, (20, 44, 68, 104), 300, 512, 6e-4, 3e-4, 25, 0.1),
    "gpt2-medium": (24, (20, 68, 116, 188), 500, 506, 6e-4, 3e-4, 10, 0.1),
    "gpt2-large": (36, (30, 174, 318, 534), 600, 504, 3e-4, 4e-5, 15, 0.03),
    "gpt2-xl": (48, (50, 242, 434, 722), 800, 504, 1e-4, 2e-5, 20, 0.01),
    "gpt2-small-2024": (12, (200, 440, 680, 1040), 1200, 480, 6e-4, 6e-5, 100, 0.0),
}
WITHOUT_ANCHOR = {  # first events, steps, sequences, warm-up
    "gpt2-small": ((20, 44, 68, 104), 300, 480, 20),
    "gpt2-medium": ((20, 68, 116, 188), 500, 506, 10),
    "gpt2-large": ((30, 174, 318, 534), 1200, 504, 15),
    "gpt2-xl": ((20, 116, 212, 356), 1200, 504, 20),
}
KINDS = ("ln2", "ln1.qk", "ln1.v", "ln_final")


def first_events(recipe):
    return tuple(min(e.step for e in recipe.events if e.site.kind == kind) for kind in KINDS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipes_are_what_was_published(name):
    layers, events, steps, batch, lr, final, warmup, anchor = PUBLISHED[name]
    recipe = BY_NAME[name]()
    assert {event.site for event in recipe.events} == set(sequential_sites(layers))
    assert first_events(recipe) == events
    assert (recipe.steps, recipe.batch, recipe.lr, recipe.warmup) == (steps, batch, lr, warmup)
    assert recipe.lr * recipe.final_lr == pytest.approx(final)
    assert recipe.scale_anchor == anchor
    assert recipe.sequence_length == 1024
    assert recipe.clip == 1.0
    # Every setting that a recipe makes names where it comes from.
    sourced = " ".join(recipe.sources)
    for field in ("events", "steps", "batch", "lr", "final_lr", "warmup", "statistics", "betas"):
        assert field in sourced, field


@pytest.mark.parametrize("name", WITHOUT_ANCHOR)
def test_the_variants_without_the_auxiliary_loss(name):
    events, steps, batch, warmup = WITHOUT_ANCHOR[name]
    recipe = BY_NAME[name](anchor=False)
    assert first_events(recipe) == events
    assert (recipe.steps, recipe.batch, recipe.warmup) == (steps, batch, warmup)
    assert recipe.scale_anchor == 0


def test_checkpoints_before_the_end_keep_the_long_decay():
    assert lf.recipes.gpt2_large().decay_steps == 1200
    assert lf.recipes.gpt2_xl().decay_steps == 1200
    assert lf.recipes.gpt2_small_2024().decay_steps == 2000
    special = lf.recipes.gpt2_small_2024().special
    assert (special.first_until, special.end_of_text_until) == (1160, 1060)
    assert lf.recipes.gpt2_small_2024().removed_at == 1160
    # Per micro-batch there, per step here.
    assert lf.recipes.gpt2_small().statistics.momentum == pytest.approx(0.9**16)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama-grouped", "qwen3", "gemma2"])
@pytest.mark.parametrize("name", ["distilled", "published-style", "taper", "at-once"])
def test_recipes_for_any_model_cover_each_of_its_sites_once(kind, name):
    model = live_model(kind, torch.float32)
    recipe = BY_NAME[name](model, steps=120)
    sites = [event.site for event in recipe.events]
    assert sorted(map(str, sites)) == sorted(map(str, lf.list_norm_sites(model)))
    assert recipe.removed_at <= 60
    if name in ("distilled", "published-style"):
        steps = {str(event.site): event.step for event in recipe.events}
        for layer in range(2):
            block, following = f"blocks.{layer}", f"blocks.{layer + 1}"
            assert steps[f"{block}.ln2"] < steps[f"{following}.ln2"] < steps[f"{block}.ln1.qk"]
            assert steps[f"{block}.ln1.qk"] < steps["blocks.0.ln1.v"]
        assert steps["ln_final"] == max(steps.values())
        if kind == "qwen3":
            assert steps["blocks.1.attn.q_norm"] == steps["blocks.1.attn.k_norm"]
            assert steps["blocks.1.attn.q_norm"] > steps["blocks.2.ln1.qk"]


def test_a_gate_falls_along_a_cosine():
    event = Event(10, NormSite("ln_final"), over=8)
    assert [event.gate(step) for step in (0, 9, 10)] == [1, 1, 1]
    assert event.gate(14) == pytest.approx(0.5)
    assert event.gate(12) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert event.gate(18) == event.gate(100) == 0
    assert Event(3, NormSite("ln_final")).gate(3) == 0
    assert Event(3, NormSite("ln_final")).gate(2) == 1


def test_tapers():
    sites = sequential_sites(2)
    together = taper(sites, start=5, over=20)
    assert {(event.step, event.end) for event in together} == {(5, 25)}
    one_by_one = taper(sites, start=5, over=20, gap=3)
    assert [event.step for event in one_by_one] == [5 + 3 * i for i in range(7)]
    assert [str(event.site) for event in one_by_one] == [
        str(event.site) for event in published_order(sites, start=0, ln2_gap=1, qk_gap=1, v_gap=1)
    ]
    with pytest.raises(RecipeError, match="negative"):
        taper(sites, start=0, over=-1)
    with pytest.raises(RecipeError, match="no norm sites"):
        all_at_once([], step=1)


def test_widening_spreads_what_is_left():
    events = (
        Event(2, NormSite("ln2", 0)),
        Event(10, NormSite("ln2", 1)),
        Event(14, NormSite("ln_final")),
        Event(4, NormSite("ln1.v", 0), over=8),
    )
    wider = widened(events, done=6, factor=2.0)
    assert [(e.step, e.end) for e in wider] == [(2, 2), (15, 15), (23, 23), (4, 19)]
    assert last_step(wider) == 23
    # What would fire first comes later too, or the run would only be repeated.
    assert widened(events, done=10, factor=2.0)[1].step == 11


def test_a_widened_recipe_stretches_everything_that_is_tied_to_the_events():
    recipe = Recipe(
        events=all_at_once(sequential_sites(1), step=10), steps=30, batch=1, lr=1.0, warmup=0,
        final_lr=1.0, special=Special(first_until=14, end_of_text_until=3),
        distillation=Ramp(1.0, 0.0, 2, 16), scale_anchor=0.3,
    )  # fmt: skip
    wider = recipe.widened(6, 2.0)
    assert {event.step for event in wider.events} == {15}
    assert wider.special == Special(first_until=23, end_of_text_until=3)
    assert wider.distillation == Ramp(1.0, 0.0, 2, 27)
    assert wider.scale_anchor == 0.3
    assert wider.removed_at == 23
    assert wider.steps == wider.decay_steps == 30 + 23 - 14  # as long to recover as before
    assert recipe.widened(15, 2.0) is recipe  # everything has happened
    assert recipe.vanilla().widened(0, 2.0) == recipe.vanilla()


def test_ramps():
    ramp = Ramp(1.0, 0.2, 10, 20)
    assert [weight_at(ramp, step) for step in (0, 10, 15, 20, 99)] == pytest.approx(
        [1.0, 1.0, 0.6, 0.2, 0.2]
    )
    assert weight_at(0.3, 5) == 0.3
    with pytest.raises(RecipeError, match="must end after it"):
        Ramp(1.0, 0.0, 5, 5)


@pytest.mark.parametrize("name", BY_NAME)
def test_recipes_survive_json(name):
    make = BY_NAME[name]
    recipe = make() if name.startswith("gpt2") else make(sequential_sites(3))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_odd_recipes_survive_json_and_broken_ones_do_not():
    recipe = Recipe(
        events=taper(sequential_sites(1), start=1, over=3, gap=1), steps=30, batch=2, lr=1e-3,
        warmup=0, final_lr=0.1, distillation=Ramp(1.0, 0.0, 0, 30),
        scale_anchor=Ramp(0.0, 1.0, 0, 9),
        statistics=Statistics(average="rms", source="batch", tokens="ordinary"),
        special=Special(first_until=9, end_of_text_until=8, end_of_text_kinds=("ln1.v",)),
        guard=Guard(action="rollback"), patience=3,
    )  # fmt: skip
    plain = json.loads(json.dumps(recipe.to_json()))
    assert Recipe.from_json(plain) == recipe
    for broken in ({}, plain | {"events": [[1, "blocks.0.ln7", 0]]}, plain | {"colour": 1}):
        with pytest.raises((RecipeError, NormSiteError)):
            Recipe.from_json(broken)


def control(**settings):
    plain = {"events": (), "steps": 9, "batch": 1, "lr": 1.0, "warmup": 0, "final_lr": 1.0}
    return Recipe(**(plain | settings))


@pytest.mark.parametrize(
    ("settings", "field", "word"),
    [
        (control(), "precision", "bf16"),
        (control(), "anchor_target", "frozne"),
        (Guard(), "action", "rolback"),
        (Statistics(), "average", "median"),
        (Statistics(), "source", "evnet"),
        (Statistics(), "tokens", "most"),
    ],
)
def test_a_word_that_is_no_choice_is_refused(settings, field, word):
    """It would act as another one. Set afterwards: the tests' own type checks refuse it before."""
    wrong = replace(settings)
    object.__setattr__(wrong, field, word)
    with pytest.raises(RecipeError, match=f"{field} is '{word}'; choices: "):
        wrong.__post_init__()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Statistics(sequences=0), "at least one sequence"),
        (lambda: Statistics(momentum=1.0), "momentum must lie"),
        (lambda: Guard(widen=1.0), "must become wider"),
        (lambda: Guard(sigma_factor=0.5), "every run would diverge"),
        (lambda: Guard(above_best=math.nan), "every run would diverge"),
        (lambda: Guard(rollbacks=-1), "rollbacks cannot be"),
        (lambda: Guard(slower=0.0), "a factor on the learning rate"),
        (lambda: Special(first_until=-4), "cannot be special until"),
        (lambda: control(lr=math.inf), "lr must be positive"),
        (lambda: control(patience=0), "patience must be positive"),
        (lambda: control(decay_steps=-5), "decay_steps must be positive"),
        (lambda: control(weight_decay=-1.0), "weight_decay must be 0 or more"),
        (lambda: control(betas=(0.9, 1.5)), "betas must lie"),
        (lambda: control(distillation=Ramp(0.0, 2.0, 50, 60)), "distillation must lie"),
        (lambda: control(scale_anchor=Ramp(0.0, -1.0, 50, 60)), "scale_anchor cannot be"),
        (lambda: BY_NAME["taper"](sequential_sites(2), steps=9), "too few for a taper"),
        (lambda: control(losses={"stream": 1.0}), "the term stream compares with the original"),
        (
            lambda: control(losses={"stream": 1.0}, distillation=Ramp(1.0, 0.0, 50, 60)),
            "give a distillation above 0 at every step",
        ),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_site_names_are_read_back():
    for site in [*sequential_sites(3), NormSite("attn.q_norm", 2), NormSite("ln1_post", 0)]:
        assert NormSite.parse(str(site)) == site
    for name in ("ln2", "blocks.1.ln_final", "blocks.x.ln2", "blocks.1.ln9", ""):
        with pytest.raises(NormSiteError, match="not the name"):
            NormSite.parse(name)


def test_a_plan_says_what_will_happen():
    text = plan(lf.recipes.gpt2_small())
    assert "300 of 512 sequences x 1024 tokens: 524,288 a step, 157,286,400 in all" in text
    assert "37 sites; all gone at step 104" in text
    assert "blocks 0 to 11: step 20 to 42, every 2" in text
    assert "blocks 0 to 11: step 68 to 101, every 3" in text
    assert "removing-layer-norm" in text
    older = plan(lf.recipes.gpt2_small_2024())
    assert "has a sigma of its own until step 1160" in older
    assert "at ln1.v until step 1060" in older
    fading = plan(lf.recipes.tapered(sequential_sites(4)), 256)
    assert "each fading over 100 steps" in fading
    assert "1,024,000 in all" in fading
    control = plan(lf.recipes.distilled(sequential_sites(4)).vanilla(), 256)
    assert "stay live: this is a control" in control
    assert "sigma" not in control
    ramped = Recipe(
        events=(),
        steps=5,
        batch=1,
        lr=1.0,
        warmup=0,
        final_lr=1.0,
        distillation=Ramp(1.0, 0.0, 0, 5),
    )
    assert "(1 to 0 (steps 0 to 5)) x KL divergence" in plan(ramped)
