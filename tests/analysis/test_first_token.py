"""Analyses on norms that divide the first token of a prompt by a constant of its own.

Nothing is held there, and everything is exact: at the first token, at the others, across both.
"""

from functools import cache

import pytest
import torch
from support.loaded import folded_model, frozen_model
from support.questions import QUESTIONS

import lnfree_interp as lf
from lnfree_interp.errors import InexactError

KINDS = ["gpt2", "neox", "llama-grouped", "qwen2"]
PROMPT = torch.tensor([7, 4, 9, 31, 2, 15])
ROWS = [[7, 4, 9, 31], [3, 8, 30, 40, 50, 60], [9]]


@cache
def made(kind, form):
    model = frozen_model(kind)
    for i, site in enumerate(lf.list_norm_sites(model)):
        sigma = lf.get_norm(model, site).constant
        ratio = 2.0 + (site.layer or 0) + (0.3 * i if not site.kind.startswith("ln1") else 0)
        lf.freeze_site(model, site, sigma, first=ratio * sigma)
    return model if form == "sites" else lf.frozen_form(model)


FORMS = [(kind, form) for kind in KINDS for form in ("sites", "frozen")]


@pytest.fixture(params=FORMS, ids="-".join)
def model(request):
    return made(*request.param)


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_is_exact_and_holds_nothing(model, name):
    if name == "residual" and model.cfg.parallel_attn_mlp:
        pytest.skip("a parallel block has no resid_mid")
    result = QUESTIONS[name](lf.trace(model, PROMPT)).verify()
    assert result.held == ()
    assert result.gap is None
    assert result.error.relative < 1e-10


def test_every_certificate_holds(model):
    found = lf.certify(model, PROMPT)
    assert all(c.holds and not c.held for c in found), [str(c) for c in found]
    assert max(c.error.relative for c in found) < 1e-9


@pytest.mark.parametrize("by", ["layer", "sublayer", "head", "source", "neuron"])
def test_the_first_position_itself_is_exact(model, by):
    logits = model(PROMPT[None])
    for pos in (0, 1, -1):
        target = lf.LogitDifference(3, 5, pos=pos)
        found = lf.attribute(lf.trace(model, PROMPT), target, by).verify()
        expected = logits[0, pos, 3] - logits[0, pos, 5]
        torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=1e-10)


def test_unequal_prompts_with_one_of_a_single_token(model):
    found = lf.attribute_logits(model, ROWS, 3, 5).verify()
    for i, row in enumerate(ROWS):
        alone = lf.attribute_logits(model, torch.tensor(row), 3, 5)
        torch.testing.assert_close(found.values[:, i], alone.values, rtol=1e-9, atol=1e-10)


def test_a_neuron_and_a_probe_at_the_first_position(model):
    lf.attribute_neuron(model, PROMPT, 1, 7, pos=0).verify()
    lf.flip_distances(model, PROMPT, 1, "L0H1", pos=0).verify()
    target = lf.Score(2, 1, query=-1, key=0, side="key")
    assert lf.attribute(lf.trace(model, PROMPT), target).verify().error.relative < 1e-10


def test_an_intervention_says_what_happens(model):
    effects = lf.ablate(lf.trace(model, PROMPT), ["L1H2", "0_mlp_out"]).compare(
        lf.LogitDifference(3, 5, pos=0)
    )
    assert effects.verify().error.relative < 1e-10
    hooked = model.run_with_hooks(PROMPT[None], fwd_hooks=[("blocks.1.attn.hook_z", without)])
    logits = model(PROMPT[None])
    lost = (logits - hooked)[0, 0, [3, 5]]
    torch.testing.assert_close(effects.total_effect[0, 0], lost[0] - lost[1], rtol=1e-9, atol=1e-10)


def without(z, hook):
    z = z.clone()
    z[:, :, 2] = 0
    return z


def test_a_head_by_hand():
    """gpt2 with sites: the share of a head is its output through the final norm's two constants."""
    model = made("gpt2", "sites")
    trace = lf.trace(model, PROMPT)
    found = {pos: trace.attribute(lf.Logit(3, pos=pos), by="head")["L1H2"] for pos in (0, 4)}
    z = model.run_with_cache(PROMPT[None])[1]["blocks.1.attn.hook_z"][0, :, 2]
    norm = lf.get_norm(model, "ln_final")
    direction = norm.w * model.W_U[:, 3]
    wrote = z @ model.W_O[1, 2]
    centred = wrote - wrote.mean(-1, keepdim=True)
    for pos, sigma in ((0, norm.first), (4, norm.constant)):
        expected = centred[pos] @ direction / sigma
        torch.testing.assert_close(found[pos].squeeze(), expected, rtol=1e-10, atol=1e-11)


def test_text_measures_are_exact(model):
    tokens = torch.tensor([[7, 4, 9, 31], [3, 8, 30, 40]])
    effects = lf.direct_effects(model, tokens)
    assert effects.nmae < 1e-10
    mean = lf.mean_next_token_attribution(model, tokens)
    assert "held" not in mean.to_frame()


def test_tables_say_that_they_are_not_about_the_first_token(model):
    for table in (lf.bigram_table(model), lf.ov_table(model, 1, 1)):
        assert "not of a prompt's first token" in repr(table)
    assert "first token" not in repr(lf.ov_table(folded_model("gpt2"), 1, 1))


def test_a_live_norm_beside_frozen_ones_is_still_refused():
    model = made("gpt2", "sites")
    sites = lf.with_norm_sites(model)
    lf.get_norm(sites, "ln_final").thaw()
    with pytest.raises(InexactError, match="ln_final"):
        lf.attribute_logits(sites, PROMPT, 3)
    lf.attribute_scores(sites, PROMPT, 2, 1).verify()
