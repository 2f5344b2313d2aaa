"""Sigma is what a brute-force computation says, follows as long as it should, then stays."""

import json
from dataclasses import replace

import pytest
import torch
from support.architectures import make_model
from support.loaded import live_model
from support.models import make_gpt2, make_tokenizer

import lnfree_interp as lf
from lnfree_interp.errors import NormSiteError
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import Event, all_at_once, published_order, taper
from lnfree_interp.removal.settings import Special, Statistics
from lnfree_interp.removal.statistics import TokenGroups, measure, measure_sigma
from lnfree_interp.removal.transition import Transition

EOT = 0


@pytest.fixture(scope="module")
def stock(tokenizer_module):
    return lf.load(make_gpt2(n_layer=2), tokenizer=tokenizer_module, device="cpu")


@pytest.fixture(scope="module")
def tokenizer_module():
    return make_tokenizer()


@pytest.fixture
def model(stock):
    return lf.with_norm_sites(stock)


@pytest.fixture(scope="module")
def text():
    tokens = torch.randint(1, 300, (6, 24), generator=torch.Generator().manual_seed(3))
    tokens[:, 7] = EOT
    tokens[2, 0] = EOT
    return tokens


def a_recipe(events, **changes):
    return Recipe(events=events, steps=60, batch=2, lr=1e-3, warmup=0, final_lr=1.0, **changes)


def deviations(model, tokens, name):
    """[batch, pos, ...]: what a live norm would divide by, from a plain forward pass."""
    _, cache = model.run_with_cache(tokens)
    x = cache[f"{name}.hook_in"]
    norm = lf.get_norm(model, name)
    squares = x.var(-1, correction=0) if norm.centred else x.pow(2).mean(-1)
    return (squares + norm.eps).sqrt()


def step(transition, tokens, number, metering=False):
    """One training step as far as the norms are concerned."""
    frozen = transition.before(number)
    transition.groups.mark(tokens)
    with transition.model.hooks(transition.hooks(metering)):
        transition.model(tokens)
    return frozen, transition.after()


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama-grouped", "qwen3", "gemma2"])
def test_averages_by_brute_force_at_every_site(kind, text):
    model = lf.with_norm_sites(live_model(kind, torch.float32))
    sites = lf.list_norm_sites(model)
    moments = measure(model, sites, text, groups=TokenGroups(EOT))
    ordinary = (text != EOT) & (torch.arange(text.shape[1]) > 0)
    for site in map(str, sites):
        r = deviations(model, text, site)
        flat = r.flatten(2) if r.ndim > 2 else r[..., None]
        for group, mask in (
            ("ordinary", ordinary),
            ("first", (torch.arange(text.shape[1]) == 0).expand_as(text)),
            ("end_of_text", (text == EOT) & (torch.arange(text.shape[1]) > 0)),
        ):
            found, expected = moments[site][group], flat[mask].double()
            assert found.count == expected.numel(), (site, group)
            assert found.average("mean") == pytest.approx(expected.mean().item(), rel=1e-5)
            rms = expected.pow(2).mean().sqrt().item()
            assert found.average("rms") == pytest.approx(rms, rel=1e-5)
            nearest = (expected.pow(2).mean() / expected.mean()).item()
            assert found.average("least_squares") == pytest.approx(nearest, rel=1e-5)
    everything = measure_sigma(model, sites, text)
    apart = measure_sigma(model, sites, text, statistics=Statistics(tokens="ordinary"))
    assert everything["ln_final"] == pytest.approx(
        deviations(model, text, "ln_final").mean().item(), rel=1e-5
    )
    if model.tokenizer is None:  # then nothing but position 0 is special
        assert apart["ln_final"] == pytest.approx(
            deviations(model, text, "ln_final")[:, 1:].mean().item(), rel=1e-5
        )


def test_least_squares_is_the_nearest_constant(model, text):
    """No other constant c makes c x nearer to x / r, summed over tokens. (2602.10408)"""
    r = deviations(model, text, "ln_final").double()
    statistics = Statistics(average="least_squares")
    sigma = measure_sigma(model, ["ln_final"], text, statistics=statistics)["ln_final"]

    def distance(constant):  # |x / r - x / constant|^2 with |x|^2 = d r^2
        return (r.pow(2) * (1 / r - 1 / constant).pow(2)).sum().item()

    assert distance(sigma) < min(distance(0.99 * sigma), distance(1.01 * sigma))


def test_fixed_at_the_event_or_before_the_start(model, text):
    late = (Event(3, NormSite("ln2", 1)),)
    for source in ("start", "event"):
        sites = lf.with_norm_sites(model)
        transition = Transition(sites, a_recipe(late, statistics=Statistics(source=source)), text)
        assert transition.before(0) == {}
        before = deviations(sites, text, "blocks.1.ln2").mean().item()
        with torch.no_grad():
            sites.blocks[0].mlp.W_out *= 3
        after = deviations(sites, text, "blocks.1.ln2").mean().item()
        assert after > 1.1 * before
        (sigma,) = transition.before(3).values()
        assert sigma == pytest.approx(before if source == "start" else after, rel=1e-5)
        assert transition.hooks() == []  # nothing is measured while training


@pytest.mark.parametrize("source", ["ema", "batch"])
def test_a_moving_sigma_follows_until_the_event(model, text, source):
    statistics = Statistics(source=source, momentum=0.75)
    recipe = a_recipe(all_at_once(model, step=3), statistics=statistics)
    transition = Transition(model, recipe, text)
    name = "blocks.1.ln2"
    expected = deviations(model, text, name).mean().item()
    for number in range(3):
        frozen, _ = step(transition, text[number : number + 2], number)
        assert frozen == {}
        new = deviations(model, text[number : number + 2], name).mean().item()
        expected = new if source == "batch" else 0.75 * expected + 0.25 * new
        with torch.no_grad():
            model.blocks[0].mlp.W_out *= 1.2
    frozen, _ = step(transition, text[:2], 3)
    assert frozen[name] == pytest.approx(expected, rel=1e-4)
    step(transition, text[:2], 4)
    assert lf.get_norm(model, name).constant == frozen[name]
    assert transition.before(5) == {}


def test_a_moving_sigma_of_all_tokens_has_each_kind_as_often_as_the_text_has_it(model, text):
    """End-of-text is in the first batches, and then no more: in the end it hardly counts."""
    statistics = Statistics(source="ema", momentum=0.5)
    with torch.no_grad():
        model.embed.W_E[EOT] *= 40
    recipe = a_recipe(all_at_once(model, step=30), statistics=statistics)
    transition = Transition(model, recipe, text)
    without = torch.where(text == EOT, 5, text)
    means = [deviations(model, each, "blocks.0.ln2").mean().item() for each in (text, without)]
    assert means[0] > 1.5 * means[1]
    for number in range(12):
        step(transition, without[:3], number)
        found = sum(m.first for m in transition.estimates["blocks.0.ln2"].values())
        count = sum(m.count for m in transition.estimates["blocks.0.ln2"].values())
        assert count == pytest.approx(text.numel(), rel=1e-9)
        kept = 0.5 ** (number + 1)
        expected = deviations(model, without[:3], "blocks.0.ln2").mean().item()
        assert found / count == pytest.approx(kept * means[0] + (1 - kept) * expected, rel=1e-4)


def test_following_goes_on_if_asked_for(model, text):
    events = (Event(1, NormSite("ln2", 0)), Event(4, NormSite("ln_final")))
    statistics = Statistics(source="batch", follow_frozen=True)
    transition = Transition(model, a_recipe(events, statistics=statistics), text)
    constants = []
    for number in range(7):
        step(transition, text[number % 5 : number % 5 + 1], number)
        constants.append(lf.get_norm(model, "blocks.0.ln2").constant)
    assert len(set(constants[1:5])) == 4
    assert len(set(constants[4:])) == 1


def test_one_sigma_for_queries_keys_and_values(model, text):
    """The published code's buffer: it moves until the value path is frozen too."""
    events = published_order(model, start=0, ln2_gap=1, qk_gap=1, v_gap=1)
    recipe = a_recipe(events, statistics=Statistics(source="batch", share_ln1=True))
    transition = Transition(model, recipe, text)
    seen = []
    for number in range(12):
        step(transition, text[number % 5 : number % 5 + 1], number)
        norms = [lf.get_norm(model, f"blocks.0.ln1.{path}") for path in ("qk", "v")]
        seen.append([norm.constant for norm in norms])
    steps = {str(event.site): event.step for event in events}
    qk, v = steps["blocks.0.ln1.qk"], steps["blocks.0.ln1.v"]
    assert len({pair[0] for pair in seen[qk : v + 1]}) == v - qk + 1
    assert len({pair[0] for pair in seen[v:]}) == 1
    for pair in seen[v:]:
        assert pair[0] == pair[1]


def test_one_sigma_measured_at_the_first_event_of_the_two(model, text):
    for first, second in (("ln1.qk", "ln1.v"), ("ln1.v", "ln1.qk")):
        sites = lf.with_norm_sites(model)
        events = (Event(0, NormSite(first, 1)), Event(2, NormSite(second, 1)))
        transition = Transition(
            sites, a_recipe(events, statistics=Statistics(share_ln1=True)), text
        )
        transition.before(0)
        with torch.no_grad():
            sites.blocks[0].mlp.W_out *= 3
        transition.before(2)
        constants = {lf.get_norm(sites, f"blocks.1.{kind}").constant for kind in (first, second)}
        assert len(constants) == 1


def test_a_gate_blends_live_and_frozen(model, text):
    transition = Transition(model, a_recipe(taper(model, start=0, over=10)), text)
    norm = lf.get_norm(model, "blocks.1.ln2")
    x = torch.randn(2, 5, 32)
    for number in (0, 3, 7):
        transition.before(number)
        gate = transition.events[0].gate(number)
        centred = x - x.mean(-1, keepdim=True)
        live = torch.nn.functional.layer_norm(x, (32,), norm.w, norm.b, norm.eps)
        constant = centred / norm.constant * norm.w + norm.b if number else live
        torch.testing.assert_close(norm(x), gate * live + (1 - gate) * constant)
    assert lf.live_sites(model) == lf.list_norm_sites(model)  # none is frozen yet
    frozen = transition.before(10)
    assert set(frozen) == set(map(str, lf.list_norm_sites(model)))
    assert lf.live_sites(model) == ()


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_special_tokens_have_their_own_sigma_until_it_is_taken_away(kind, text, tokenizer_module):
    stock = lf.load(make_model(kind), check=False, tokenizer=tokenizer_module)
    model = lf.with_norm_sites(stock)
    assert model.tokenizer.eos_token_id == EOT
    special = Special(
        first_until=5, end_of_text_until=3, end_of_text_kinds=("ln1.v", "attn.q_norm")
    )
    recipe = a_recipe(
        all_at_once(model, step=1), special=special, statistics=Statistics(tokens="ordinary")
    )
    transition = Transition(model, recipe, text)
    before = measure(model, lf.list_norm_sites(model), text, groups=TokenGroups(EOT))
    transition.before(1)

    def scales(number):
        transition.before(number)
        transition.groups.mark(text)
        found = {}

        def keep(scale, hook):
            found[hook.name.removesuffix(".hook_scale")] = scale.reshape(*text.shape, -1)[..., 0]

        sites = [(f"{site}.hook_scale", keep) for site in lf.list_norm_sites(model)]
        with model.hooks([*transition.hooks(), *sites]):
            model(text)
        return found

    first = torch.arange(text.shape[1]) == 0
    end = (text == EOT) & ~first
    for number in (1, 2, 3, 4, 5, 6):
        for name, scale in scales(number).items():
            own = {group: m.average("mean") for group, m in before[name].items() if m.count}
            kind_here = NormSite.parse(name).kind
            expected = torch.full(text.shape, own["ordinary"])
            if number < 5:
                expected[:, 0] = own["first"]
            if number < 3 and kind_here in special.end_of_text_kinds:
                expected[end] = own["end_of_text"]
            torch.testing.assert_close(scale, expected, rtol=1e-5, atol=0, msg=f"{name} {number}")
    assert transition.hooks() == []


def test_the_state_of_a_transition_is_its_future(model, text):
    """Saved in the middle as JSON would keep it, a transition goes on as if nothing had been."""
    recipe = a_recipe(
        published_order(model, start=1, ln2_gap=1, qk_gap=1, v_gap=2),
        statistics=Statistics(source="ema", share_ln1=True, tokens="ordinary"),
        special=Special(first_until=9, end_of_text_until=7),
    )
    sites = lf.with_norm_sites(model)
    transition = Transition(sites, recipe, text)
    for number in range(5):
        step(transition, text[number : number + 1], number)
    other = lf.with_norm_sites(model)
    resumed = Transition(other, recipe, text)
    other.load_state_dict(sites.state_dict())
    resumed.load_state_dict(json.loads(json.dumps(transition.state_dict())))
    for number in range(5, 14):
        tokens = text[number % 6 : number % 6 + 1]
        assert step(transition, tokens, number) == step(resumed, tokens, number)
    for site in lf.list_norm_sites(sites):
        assert lf.get_norm(sites, site).constant == lf.get_norm(other, site).constant


def test_drift_compares_with_the_constant(model, text):
    recipe = a_recipe((Event(0, NormSite("ln2", 1)),))
    transition = Transition(model, recipe, text)
    step(transition, text, 0)
    with torch.no_grad():
        model.blocks[0].mlp.W_out *= 3
    _, measured = step(transition, text, 1, metering=True)
    drift = transition.drift(measured)
    now = deviations(model, text, "blocks.1.ln2").mean().item()
    constant = lf.get_norm(model, "blocks.1.ln2").constant
    assert drift == {"blocks.1.ln2": pytest.approx(now / constant, rel=1e-5)}
    assert drift["blocks.1.ln2"] > 1.1


def test_sites_of_an_earlier_stage_are_watched(model, text):
    lf.freeze_site(model, "blocks.0.ln1.v", 0.01)
    recipe = a_recipe((Event(2, NormSite("ln2", 1)),), statistics=Statistics(source="ema"))
    transition = Transition(model, recipe, text)
    frozen, measured = step(transition, text, 0, metering=True)
    now = deviations(model, text, "blocks.0.ln1.v").mean().item()
    assert transition.drift(measured) == {"blocks.0.ln1.v": pytest.approx(now / 0.01, rel=1e-5)}
    assert frozen == {}
    _, measured = step(transition, text, 1)
    assert set(measured) == {"blocks.1.ln2"}  # what sigma needs, and no more
    assert set(transition.estimates) == {"blocks.1.ln2"}
    step(transition, text, 3)
    assert lf.get_norm(model, "blocks.0.ln1.v").constant == pytest.approx(0.01)


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_the_other_half_of_ln1_takes_the_ratio_that_an_earlier_stage_gave(
    model, text, keep_first, apart
):
    """Else no finished form could hold them, which are one norm there."""
    for layer in (0, 1):
        lf.freeze_site(model, f"blocks.{layer}.ln1.v", 2.0)
        lf.get_norm(model, f"blocks.{layer}.ln1.v").freeze(2.0, first=14.0 if apart else None)
    recipe = a_recipe(
        all_at_once(lf.live_sites(model), step=1),
        special=Special(keep_first=keep_first),
    )
    transition = Transition(model, recipe, text)
    for number in range(3):
        step(transition, text, number)
    assert lf.live_sites(model) == ()
    for layer in (0, 1):
        norm = lf.get_norm(model, f"blocks.{layer}.ln1.qk")
        assert (norm.first is not None) is apart
        if apart:
            assert norm.first / norm.constant == pytest.approx(7.0)
    if not apart and not keep_first:
        lf.fold(model)
    finished = lf.frozen_form(model)
    torch.testing.assert_close(finished(text), model(text), rtol=1e-4, atol=1e-4)


def test_what_is_frozen_already_is_not_removed_again(model, text):
    recipe = a_recipe(all_at_once(model, step=1))
    lf.freeze_site(model, "blocks.1.ln2", 2.0)
    with pytest.raises(NormSiteError, match=r"blocks\.1\.ln2 is frozen already"):
        Transition(model, recipe, text)


def test_the_control_has_no_transition(model, text):
    recipe = a_recipe(all_at_once(model, step=1), statistics=Statistics(source="ema"))
    transition = Transition(model, replace(recipe, events=()), text)
    assert step(transition, text, 3) == ({}, {})
    assert lf.live_sites(model) == lf.list_norm_sites(model)
