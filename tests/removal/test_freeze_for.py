"""Which norms a question reads through, what each costs, and freezing them for a question."""

import dataclasses
import math

import pytest
import torch
from support.loaded import folded_model, live_model
from support.models import freeze_all
from support.questions import QUESTIONS
from support.typechecking import TypeCheckError

import lnfree_interp as lf
from lnfree_interp.errors import (
    DataError,
    InexactError,
    NormSiteError,
    RecipeError,
    UnsupportedModelError,
)
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.running import run
from lnfree_interp.models.site_names import name_sites
from lnfree_interp.removal.freezing import freeze_in_one_pass

TEXT = torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(2))
PROMPT = torch.tensor([7, 4, 9, 31, 2, 15])
TARGET = lf.LogitDifference(3, 5)
# Of eight sequences the first and the fifth measure constants, the others costs.
MEASURED, PRICED = TEXT[[0, 4]], TEXT[[1, 2, 3, 5, 6, 7]]


@pytest.fixture(scope="module", params=["gpt2", "neox", "llama-grouped"])
def model(request):
    return live_model(request.param)


def names(sites):
    return [str(site) for site in sites]


# Which norms are read


def test_each_target_reads_through_its_own_norm(model):
    def read(of):
        return names(lf.norms_read(model, PROMPT, of))

    assert read(lf.Logit(3)) == read(TARGET) == read(lf.NextTokens()) == ["ln_final"]
    assert read(lf.Score(2, 1)) == read(lf.LogOdds(2, 1, key=0, other=1)) == ["blocks.2.ln1.qk"]
    assert read(lf.Neuron(1, 7)) == ["blocks.1.ln2"]
    assert read(lf.Probe(torch.ones(32))) == []
    assert read(lf.Probe(torch.ones(32), "blocks.1.ln2")) == ["blocks.1.ln2"]
    values = [f"blocks.{layer}.ln1.v" for layer in range(3)]
    assert read(lambda trace: lf.expand_paths(trace, 3)) == [*values, "ln_final"]
    assert read(lambda trace: lf.ov_table(trace.view.model, 1, 0)) == ["blocks.1.ln1.v", "ln_final"]
    both = [f"blocks.{layer}.{kind}" for layer in range(3) for kind in ("ln1.v", "ln2")]
    assert read(lambda trace: lf.flow_graph(trace, 3)) == [*both, "ln_final"]


@pytest.mark.parametrize("name", QUESTIONS)
def test_freezing_what_a_question_reads_is_necessary_and_enough(model, name):
    if name == "residual" and model.cfg.parallel_attn_mlp:
        pytest.skip("a parallel block has no resid_mid")
    ask = QUESTIONS[name]
    sites = lf.norms_read(model, PROMPT, ask)
    enough = lf.freeze_for(model, sites, TEXT, progress=False).model
    result = ask(lf.trace(enough, PROMPT)).verify()
    assert result.held == ()
    assert result.error.relative < 1e-10
    for site in sites:
        less = lf.freeze_for(model, set(sites) - {site}, TEXT, progress=False).model
        with pytest.raises(InexactError, match=r"not affine|depends on the input") as error:
            ask(lf.trace(less, PROMPT))
        assert str(site) in str(error.value)


def test_a_refusal_names_all_that_is_live_and_nothing_else(model):
    with pytest.raises(InexactError) as error:
        lf.flow_graph(model, PROMPT, 3)
    said = str(error.value)
    assert "ln1.v in blocks 0 to 2, ln2 in blocks 0 to 2 and ln_final are not affine" in said
    assert "lf.freeze_for" in said
    partly = lf.freeze_for(model, ["ln_final", "blocks.1.ln2"], TEXT, progress=False).model
    with pytest.raises(InexactError) as error:
        lf.flow_graph(partly, PROMPT, 3)
    assert "ln1.v in blocks 0 to 2, blocks.0.ln2 and blocks.2.ln2 are not" in str(error.value)


def test_soft_caps_are_no_norms():
    model = live_model("gemma2-no-caps", torch.float32)
    free = lf.fold(freeze_all(model))
    assert lf.norms_read(free, PROMPT, lf.Logit(3)) == (lf.NormSite("ln_final"),)


def test_a_soft_cap_is_held_and_no_advice_is_given_to_freeze_it():
    capped = folded_model("gemma2", torch.float32)
    assert lf.norms_read(capped, PROMPT, lf.Logit(3)) == (lf.NormSite("ln_final"),)
    with pytest.raises(InexactError, match="the soft cap on the logits is not affine") as error:
        lf.attribute_logits(capped, PROMPT, 3)
    assert "freeze" not in str(error.value)
    assert "share of its own: hold it at the value it had" in str(error.value)
    lf.attribute_logits(lf.trace(capped, PROMPT, hold=True), 3)


def sub_ln():
    return lf.to_sub_ln(live_model("gpt2")).model


def gemma2():
    return live_model("gemma2-no-caps")


def normformer():
    model = live_model("gpt2")
    return lf.to_normformer(model, resid_scale=False).model


@pytest.mark.parametrize("make", [sub_ln, normformer, gemma2, lambda: lf.with_norm_sites(gemma2())])
@pytest.mark.parametrize("name", ["logits by head", "scores", "neuron", "residual", "flow"])
def test_norms_inside_and_behind_sublayers_are_read_by_every_question(make, name):
    model, ask = make(), QUESTIONS[name]
    inner = {site for site in names(lf.list_norm_sites(model)) if "inner" in site or "post" in site}
    sites = set(names(lf.norms_read(model, PROMPT, ask)))
    assert sites == inner | set(names(lf.norms_read(without_inner(model, inner), PROMPT, ask)))
    with pytest.raises(UnsupportedModelError, match=r"lf\.freeze_for\(model, question, text\)"):
        ask(lf.trace(model, PROMPT))
    frozen = lf.freeze_for(model, ask, TEXT, progress=False)
    assert set(names(frozen.sites)) == sites
    result = ask(lf.trace(frozen.model, PROMPT)).verify()
    assert result.held == ()
    assert result.error.relative < 1e-10
    assert lf.norms_read(frozen.model, PROMPT, ask) == lf.norms_read(model, PROMPT, ask)


def without_inner(model, inner):
    sited = lf.with_norm_sites(model)
    for site in inner:
        lf.freeze_site(sited, site, 1.0)
    return sited


@pytest.mark.parametrize("of", [3, "ln_final", None])
def test_what_is_no_question_is_refused(model, of):
    with pytest.raises((DataError, TypeCheckError), match=r"is no question|parameter"):
        lf.norms_read(model, PROMPT, of)


def test_sites_in_words():
    assert name_sites(["ln_final"]) == "ln_final"
    assert name_sites([]) == ""
    sites = ["blocks.0.ln2", "blocks.1.ln2", "blocks.3.ln2", "blocks.3.ln1.v", "ln_final"]
    assert name_sites(sites) == "ln2 in blocks 0 to 1, blocks.3.ln2, blocks.3.ln1.v and ln_final"


# What each norm costs


def losses(model, tokens):
    return next_token_loss(run(model, tokens), tokens).item()


def frozen_by_hand(model, site, tokens, measured, apart):
    """The loss with one site frozen, by hooks of TransformerLens and its own norms."""
    sited = lf.with_norm_sites(model)
    norm = lf.get_norm(sited, site)
    _, cache = sited.run_with_cache(measured, names_filter=f"{site}.hook_scale")
    r = cache[f"{site}.hook_scale"]
    others = r[:, 1:]

    def replace(scale, hook):
        if apart == "none":
            return torch.full_like(scale, r.mean().item())
        kept = others if apart == "first" else others[others <= 5 * others.median()]
        far = scale > (5 if apart == "outliers" else math.inf) * scale[:, 1:].median()
        new = torch.where(far, scale, kept.mean())
        new[:, 0] = r[:, 0].mean()
        return new

    assert norm.live
    with sited.hooks(fwd_hooks=[(f"{site}.hook_scale", replace)]):
        return losses(sited, tokens)


def test_costs_are_those_of_sites_frozen_by_hand(model):
    with_outliers(model)
    found = lf.site_sensitivity(model, TEXT, progress=False)
    measured, tokens = MEASURED, PRICED
    live = losses(model, tokens)
    assert found.loss == pytest.approx(live, abs=1e-12)
    assert found.n_tokens == 6 * 23
    kinds = {"none": found.alone, "first": found.first_apart, "outliers": found.outliers_apart}
    assert any(found.outliers.values())
    for site in lf.live_sites(model):
        for apart, costs in kinds.items():
            expected = frozen_by_hand(model, str(site), tokens, measured, apart) - live
            assert costs[site].loss == pytest.approx(expected, abs=1e-10), (site, apart)


def with_outliers(model):
    """Token 5 gets an embedding 30 times as long, so that it is far above the others."""
    with torch.no_grad():
        model.embed.W_E[5] *= 30 * model.embed.W_E.norm() / model.embed.W_E[5].norm() / 17


def test_together_every_constant_is_measured_behind_the_freezes_before_it(model):
    found = lf.site_sensitivity(model, TEXT, progress=False, stop_above=math.inf)
    assert list(found.together) == list(found.order)
    by_cost = [found.first_apart[site].loss for site in found.order]
    assert by_cost == sorted(by_cost)
    live = losses(model, PRICED)
    for n in (1, 4, len(found.order)):
        sited = lf.with_norm_sites(model)
        freeze_in_one_pass(sited, found.order[:n], MEASURED)
        expected = losses(sited, PRICED) - live
        assert found.together[found.order[n - 1]].loss == pytest.approx(expected, abs=1e-10)


def test_sensitivity_leaves_the_model_as_it_was(model):
    before = run(model, TEXT)
    lf.site_sensitivity(model, TEXT, progress=False)
    assert torch.equal(run(model, TEXT), before)
    sited = lf.with_norm_sites(model)
    lf.freeze_site(sited, "blocks.1.ln2", 1.5, first=3.0)
    before = run(sited, TEXT)
    found = lf.site_sensitivity(sited, TEXT, progress=False)
    assert torch.equal(run(sited, TEXT), before)
    assert lf.NormSite.parse("blocks.1.ln2") not in found.alone


def test_a_refusal_says_the_price_that_was_measured():
    model = live_model("gpt2")
    found = lf.site_sensitivity(model, TEXT, progress=False)
    with pytest.raises(InexactError) as error:
        lf.attribute_logits(model, PROMPT, 3)
    cost = found.first_apart[lf.NormSite("ln_final")].loss
    assert f"it adds {cost:+.3f} nats per token" in str(error.value)


def test_a_price_is_said_of_the_model_that_it_was_measured_on():
    model = live_model("gpt2", torch.float32)
    lf.site_sensitivity(model, TEXT, progress=False)
    recipe = lf.recipes.finetuning(steps=1, batch=2)
    for other in (
        lf.finetune(model, recipe, TEXT, progress=False).model,
        lf.to_map(model, "RMSNorm").model,
    ):
        with pytest.raises(InexactError) as error:
            lf.attribute_logits(other, PROMPT, 3)
        assert "nats per token" not in str(error.value)


def test_a_run_that_overflows_is_shown_as_it_is():
    model = live_model("llama-grouped")
    found = lf.site_sensitivity(model, TEXT, progress=False)
    nan = dataclasses.replace(next(iter(found.first_apart.values())), loss=float("nan"))
    worst = lf.NormSite.parse("blocks.1.ln2")
    broken = dataclasses.replace(found, first_apart=found.first_apart | {worst: nan})
    assert broken.order[-1] == worst
    assert broken.top(1)["site"].tolist() == ["blocks.1.ln2"]
    assert "blocks.1.ln2 most with +nan" in repr(broken)
    figure = lf.plots.site_sensitivity(broken)
    assert "x" in [symbol for line in figure.data for symbol in line.marker.symbol]
    assert all(math.isfinite(y) for line in figure.data for y in line.y)


def test_the_cheapest_sites_fit_a_budget(model):
    found = lf.site_sensitivity(model, TEXT, progress=False, stop_above=math.inf)
    budget = sorted(cost.loss for cost in found.together.values())[5]
    chosen = found.cheapest(budget)
    assert chosen == found.order[: len(chosen)]
    assert all(found.together[site].loss <= budget for site in chosen)
    assert found.cheapest(-math.inf) == ()


def test_sensitivity_refuses_what_it_cannot_measure(model):
    with pytest.raises(DataError, match="at least two"):
        lf.site_sensitivity(model, TEXT[:1], progress=False)
    with pytest.raises(NormSiteError, match=r"blocks\.9\.ln2 is not a live"):
        lf.site_sensitivity(model, TEXT, ["blocks.9.ln2"], progress=False)
    one = lf.site_sensitivity(model, TEXT, ["blocks.1.ln2"], progress=False)
    assert names(one.alone) == ["blocks.1.ln2"]


# Freezing for a question


def test_the_price_is_measured_on_text_that_nothing_else_saw(model):
    frozen = lf.freeze_for(model, TARGET, TEXT, progress=False)
    assert names(frozen.sites) == ["ln_final"]
    held_out = TEXT[6:]
    assert frozen.price.before == pytest.approx(losses(model, held_out), abs=1e-5)
    assert frozen.price.after == pytest.approx(losses(frozen.model, held_out), abs=1e-5)
    assert frozen.price.n_tokens == 2 * 23
    p, q = (run(one, held_out)[:, :-1].log_softmax(-1) for one in (model, frozen.model))
    assert frozen.price.divergence == pytest.approx(
        (p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-5
    )
    assert frozen.price.agreement == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    )
    other = lf.freeze_for(model, TARGET, TEXT[:6], heldout=held_out, progress=False)
    assert other.price == frozen.price
    assert "top-1 agreement" in repr(frozen)
    assert "without training" in repr(frozen)


def test_constants_are_the_means_of_the_tokens_scales(model):
    frozen = lf.freeze_for(model, ["ln_final"], TEXT, progress=False)
    scale = model.run_with_cache(TEXT[:6])[1]["ln_final.hook_scale"]
    sigma, first = frozen.constants["ln_final"]
    assert sigma == pytest.approx(scale[:, 1:].mean().item(), rel=1e-9)
    assert first == pytest.approx(scale[:, 0].mean().item(), rel=1e-9)
    same = lf.freeze_for(model, ["ln_final"], TEXT, first=False, progress=False)
    assert same.constants["ln_final"] == (pytest.approx(sigma, rel=1e-9),) * 2


def test_another_question_is_still_refused_or_held_by_name(model):
    frozen = lf.freeze_for(model, lf.Score(2, 1), TEXT, progress=False).model
    lf.attribute_scores(frozen, PROMPT, 2, 1).verify()
    with pytest.raises(InexactError, match="ln_final"):
        lf.attribute_logits(frozen, PROMPT, 3)
    held = lf.attribute_logits(lf.trace(frozen, PROMPT, hold=True), 3)
    assert held.held == ("ln_final",)


def test_several_questions_one_after_the_other(model):
    one = lf.freeze_for(model, TARGET, TEXT, progress=False)
    both = lf.freeze_for(one.model, lf.Neuron(1, 7), TEXT, progress=False)
    assert names(both.sites) == ["blocks.1.ln2"]
    lf.attribute_logits(both.model, PROMPT, 3).verify()
    lf.attribute_neuron(both.model, PROMPT, 1, 7).verify()
    again = lf.freeze_for(both.model, TARGET, TEXT, progress=False)
    assert again.sites == ()
    assert again.price.added == 0
    assert "nothing" in repr(again)


def test_training_lowers_the_price_and_the_question_stays_exact():
    model = live_model("gpt2", torch.float32)

    def flow(trace):
        return lf.flow_graph(trace, 3)

    bare = lf.freeze_for(model, flow, TEXT, progress=False)
    text = torch.cat([TEXT[:6]] * 4)
    trained = lf.freeze_for(
        model, flow, text, steps=30, heldout=TEXT[:6], lr=2e-3, batch=4, progress=False
    )
    same = lf.freeze_for(model, flow, text, heldout=TEXT[:6], progress=False)
    assert trained.price.divergence < 0.8 * same.price.divergence
    assert trained.sites == bare.sites
    assert all(first != sigma for sigma, first in trained.constants.values())
    flow(lf.trace(trained.model, PROMPT)).verify()
    assert trained.run is not None
    assert "after 30 steps" in repr(trained)


def test_direct_effects_add_up_with_nothing_held(model):
    frozen = lf.freeze_for(model, TARGET, TEXT, progress=False).model
    found = lf.direct_effect_additivity(frozen, TEXT[:2], ["L1H1"], ["L2H0"])
    assert found.certificate.held == ()
    assert found.certificate.error.relative < 1e-10
    assert lf.direct_effects(frozen, TEXT[:2]).nmae < 1e-10


def test_what_cannot_be_frozen_is_refused(model):
    with pytest.raises(NormSiteError, match=r"blocks\.7\.ln2 is not a norm site"):
        lf.freeze_for(model, "blocks.7.ln2", TEXT, progress=False)
    with pytest.raises(DataError, match="at least two"):
        lf.freeze_for(model, TARGET, TEXT[:1], progress=False)
    with pytest.raises(RecipeError, match="at least 2"):
        lf.freeze_for(model, TARGET, TEXT, steps=1, progress=False)


def test_the_model_given_does_not_change(model):
    before = run(model, TEXT)
    lf.freeze_for(model, TARGET, TEXT, progress=False)
    assert torch.equal(run(model, TEXT), before)


def test_a_recipe_keeps_the_first_token_apart_to_the_end():
    model = live_model("gpt2", torch.float32)
    recipe = lf.recipes.distilled(model, steps=20)
    kept = dataclasses.replace(recipe, special=lf.Special(keep_first=True), batch=2, micro_batch=2)
    finished = lf.remove_norms(model, kept, TEXT, progress=False).model
    assert lf.live_sites(finished) == ()
    norm = lf.get_norm(finished, "blocks.1.ln2")
    assert norm.first is not None
    assert norm.first != norm.constant
    with pytest.raises(NormSiteError, match="frozen_form"):
        lf.fold(finished)
    lf.attribute_logits(lf.frozen_form(finished), PROMPT, 3).verify()
    assert lf.Recipe.from_json(kept.to_json()) == kept
    with pytest.raises(RecipeError, match="keep_first or first_until"):
        lf.Special(keep_first=True, first_until=3)


@pytest.mark.parametrize("more", [{"out": "somewhere"}, {"resume": True}])
def test_options_of_a_training_need_one(more):
    model = live_model("gpt2", torch.float32)
    with pytest.raises(RecipeError, match="steps=0 trains nothing"):
        lf.freeze_for(model, lf.Logit(3), TEXT, progress=False, **more)
