"""Exact where you ask, on a real model: the price of a question, and what each norm costs."""

from pydoc_data.topics import topics

import pytest
import torch

import lnfree_interp as lf
from lnfree_interp.errors import InexactError

pytestmark = pytest.mark.smollm2

PROMPT = "When Mary and John went to the store, John gave a drink to"
TARGET = lf.LogitDifference(" Mary", " John")


@pytest.fixture(scope="module")
def text(smollm2):
    """English that every Python brings: its own reference."""
    documents = [topics[name] for name in sorted(topics)]
    return lf.pack(documents, smollm2.tokenizer, 128)[:24]


@pytest.fixture(scope="module")
def frozen(smollm2, text):
    return lf.freeze_for(smollm2, TARGET, text, progress=False)


def test_direct_logit_attribution_is_exact_at_a_small_price(frozen):
    assert [str(site) for site in frozen.sites] == ["ln_final"]
    assert -0.05 < frozen.price.added < 0.1
    assert frozen.price.agreement > 0.97
    found = lf.trace(frozen.model, PROMPT, prepend_bos=False).attribute(TARGET).verify()
    assert found.held == ()
    assert found.error.relative < 1e-5
    assert found.top(1)["component"].tolist() == ["L23H3"]
    sigma, first = frozen.constants["ln_final"]
    assert first > 3 * sigma  # a massive activation


def test_effects_add_up_where_the_live_norm_makes_them_interact(smollm2, frozen, text):
    groups = (["L23H3"], ["L29H1"])
    exact = lf.direct_effect_additivity(frozen.model, text[-1:], *groups)
    live = lf.direct_effect_additivity(smollm2, text[-1:], *groups)
    assert exact.interaction < 1e-6
    assert live.interaction > 1e-4
    assert exact.certificate.holds


def test_scores_of_a_head_need_its_own_norm_alone(smollm2, text):
    one = lf.freeze_for(smollm2, lf.Score(23, 3), text, progress=False)
    assert [str(site) for site in one.sites] == ["blocks.23.ln1.qk"]
    assert abs(one.price.added) < 0.02
    trace = lf.trace(one.model, PROMPT, prepend_bos=False)
    assert lf.attribute_scores(trace, 23, 3).verify().held == ()
    with pytest.raises(InexactError, match="ln_final"):
        trace.attribute(TARGET)


def test_massive_activations_are_where_norms_cost_most(smollm2, text):
    sites = ["blocks.8.ln2", "blocks.15.ln1.v", "blocks.20.ln2", "ln_final"]
    found = lf.site_sensitivity(smollm2, text[:6], sites, progress=False)
    costs = {str(site): cost.loss for site, cost in found.first_apart.items()}
    assert max(costs, key=lambda site: costs[site]) == "blocks.8.ln2"
    assert costs["blocks.8.ln2"] > 1
    assert abs(costs["blocks.20.ln2"]) < 0.05
    # One constant for all would ruin what depends on the first token.
    alone = {str(site): cost.loss for site, cost in found.alone.items()}
    assert alone["blocks.15.ln1.v"] > 1 > 0.05 > abs(costs["blocks.15.ln1.v"])


def test_a_model_that_is_frozen_in_part_is_saved_and_loaded(frozen, tmp_path):
    folder = lf.export(frozen.model, tmp_path / "frozen", target="transformer_lens")
    back = lf.load(folder)
    assert len(lf.live_sites(back)) == 90
    assert "GGUF, quantised" in (folder / "README.md").read_text()
    tokens = torch.arange(100, 140)[None]
    assert lf.compare_logits(back, frozen.model, tokens).relative < 1e-5


def test_the_first_token_keeps_its_constant_while_text_is_generated(frozen):
    tokens = frozen.model.to_tokens("The Eiffel Tower is in", prepend_bos=False)
    settings = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "return_type": "tokens"}
    cached = frozen.model.generate(tokens, use_past_kv_cache=True, **settings)
    plain = frozen.model.generate(tokens, use_past_kv_cache=False, **settings)
    assert cached.tolist() == plain.tolist()
    assert " Paris" in frozen.model.tokenizer.decode(cached[0])
