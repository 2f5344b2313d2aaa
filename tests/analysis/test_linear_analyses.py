"""Analyses of models with linear attention: what becomes exact, and what is refused."""

import itertools

import pytest
import torch
from support.loaded import live_model
from support.models import freeze_all
from support.mutations import mutated

import lnfree_interp as lf
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.errors import DataError, InexactError, UnsupportedModelError

PROMPT = [7, 4, 9, 31, 2, 15, 8]
KINDS = ["gpt2", "llama-grouped", "neox", "neo", "qwen3", "gemma2-no-caps"]
DIVISORS = ["sum", "count"]


def frozen(kind, layers=None, divide_by="count", **settings):
    variant = lf.to_linear_attention(live_model(kind), layers, divide_by=divide_by, **settings)
    return freeze_all(variant.model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divide_by", DIVISORS)
@pytest.mark.parametrize("layers", [None, [0, 2], [1]], ids=str)
def test_every_certificate_holds(kind, divide_by, layers):
    model = frozen(kind, layers, divide_by)
    certificates = lf.certify(model, PROMPT)
    for certificate in certificates:
        certificate.require(1e-10)
        assert not certificate.held
    scores = any("score" in certificate.identity for certificate in certificates)
    assert scores == (layers == [1])  # the last layer, about which scores are asked
    plain = len(lf.certify(frozen(kind, layers, "sum"), PROMPT))
    assert len(certificates) == plain + (divide_by == "count" and layers != [1])


def failing(model):
    return [one.identity for one in lf.certify(model, PROMPT) if not one.holds]


def test_value_biases_that_are_wrong_are_noticed(monkeypatch):
    model = frozen("gpt2")
    with mutated("drop b_V"):
        assert failing(model)
    # As if weights added up to one.
    monkeypatch.setattr(
        Trace, "value_bias", lambda self, layer, at=None: self.view.value_bias(layer)
    )
    wrong = " ".join(failing(model))
    assert failing(frozen("gpt2", divide_by="sum")) == []
    for of in ("sum over sources", "paths", "biases"):
        assert of in wrong, wrong


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_head_reads_of_a_token_is_what_is_lost_if_it_does_not_see_it(kind):
    model = frozen(kind)
    trace = lf.trace(model, PROMPT)
    target = lf.LogitDifference(3, 5)
    n_heads, last = model.cfg.n_heads, model.cfg.n_layers - 1
    for layer in range(last + 1):
        labels = [f"L{layer}H{h}@{s}" for h, s in itertools.product(range(n_heads), range(7))]
        effects = lf.ablate(trace, labels, "unseen").compare(target)
        effects.certificate.require(1e-10)
        assert effects.certificate.held == ()
        # Of all at once as of each alone: no weight depends on another token.
        alone, together = effects.direct[:-1].sum(0), effects.direct[-1]
        assert (alone - together).abs().max() < 1e-10 * effects.direct.abs().max()
        assert effects.direct[:-1].abs().min() > 0 or model.blocks[layer].attn.attn_type == "local"


def test_the_same_by_hand_in_the_last_block():
    """With nothing of the analyses: keys taken away in the model's own module."""
    model = frozen("gpt2", [2])
    tokens = torch.tensor([PROMPT])
    whole = model(tokens)[0, -1]
    trace = lf.trace(model, PROMPT)
    ablated = lf.ablate(trace, ["L2H1@3", "L2H1@4"], "unseen")

    def hide(scores, hook):
        scores[:, 1, :, 3:5] = 0
        return scores

    # The MLP behind reads what attention wrote; held, so that only the direct effect is left.
    mlp = trace["blocks.2.hook_mlp_out"]
    keep = ("blocks.2.hook_mlp_out", lambda x, hook: mlp)
    hooks = [("blocks.2.attn.hook_attn_scores", hide), keep]
    without = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
    effects = ablated.compare(lf.LogitDifference(3, 5))
    by_hand = (whole - without)[3] - (whole - without)[5]
    assert (effects.direct[-1, 0] - by_hand).abs() < 1e-12
    assert (effects.predicted[-1, 0] - by_hand).abs() < 1e-12
    anew = model.run_with_hooks(tokens, fwd_hooks=hooks[:1])[0, -1]
    in_all = (whole - anew)[3] - (whole - anew)[5]
    assert (effects.total_effect[-1, 0] - in_all).abs() < 1e-12
    assert (by_hand - in_all).abs() > 1e-6


@pytest.mark.parametrize("divide_by", ["softmax", "sum"])
def test_weights_that_are_divided_by_their_sum_are_held_and_measured(divide_by):
    model = frozen("gpt2", [1], divide_by="sum") if divide_by == "sum" else freeze_all(
        live_model("gpt2")
    )  # fmt: skip
    asked = lf.ablate(lf.trace(model, PROMPT), ["L1H2@3"], "unseen")
    with pytest.raises(InexactError, match="sum of weights of L1H2 depends on the tokens"):
        asked.compare(lf.LogitDifference(3, 5))
    held = lf.trace(model, PROMPT, hold=True)
    effects = lf.ablate(held, ["L1H2@3", "L1H2@4"], "unseen").compare(lf.LogitDifference(3, 5))
    assert effects.certificate.held == ("the sum of weights of L1H2",)
    assert effects.certificate.gap.relative > 1e-3
    # The others are divided by less: in closed form, from the weights alone.
    pattern, z = (
        held["blocks.1.attn.hook_pattern"][0, 2, -1],
        held["blocks.1.attn.hook_z"][0, -1, 2],
    )
    v = held["blocks.1.attn.hook_v"][0, :, 2]
    left = 1 - pattern[3] - pattern[4]
    closed = z - (z - pattern[3] * v[3] - pattern[4] * v[4]) / left
    moved = closed @ model.blocks[1].attn.W_O[2]
    assert (lf.ablate(held, ["L1H2@3", "L1H2@4"], "unseen").gone[0, -1] - moved).abs().max() < 1e-12


def test_a_first_token_that_does_not_see_itself_reads_nothing():
    for model in (frozen("gpt2", [1]), frozen("gpt2", [1], "sum"), freeze_all(live_model("gpt2"))):
        trace = lf.trace(model, PROMPT)
        gone = lf.ablate(trace, ["L1H2@0"], "unseen").gone
        read = trace["blocks.1.attn.hook_z"][0, 0, 2] @ model.blocks[1].attn.W_O[2]
        assert (gone[0, 0] - read).abs().max() < 1e-12


def test_questions_about_scores_of_linear_attention_are_refused():
    model = frozen("gpt2", [1])
    trace = lf.trace(model, PROMPT)
    for ask in (
        lambda: lf.attribute_scores(trace, 1, 0),
        lambda: trace.attribute(lf.Score(1, 0, side="key")),
        lambda: lf.counterfactual_pattern(trace, 1, 0, "embed"),
        lambda: lf.qk_table(model, 1, 0),
        lambda: lf.deletion_check(model, [PROMPT], ["L1H0"], progress=False),
    ):
        with pytest.raises(UnsupportedModelError, match="attention in block 1 is linear"):
            ask()
    lf.attribute_scores(trace, 2, 0).verify(1e-10)
    drawn = lf.deletion_check(model, [PROMPT], draws=1, k=[1], progress=False).to_frame()
    heads = drawn[drawn["kind"] == "pattern"]["head"]
    assert set(heads.str[:2]) == {"L2"}


def test_unseen_is_about_tokens_that_heads_see():
    trace = lf.trace(frozen("gpt2"), PROMPT)
    for label in ("L1H2", "embed", "1_mlp_out", "L1N3"):
        with pytest.raises(DataError, match="no token that a head sees"):
            lf.ablate(trace, label, "unseen")
    with pytest.raises(DataError, match="the model has no L1H2@9"):
        lf.ablate(trace, "L1H2@9", "unseen")


def test_a_model_with_live_norms_is_held_as_any_other():
    model = lf.to_linear_attention(live_model("gpt2"), divide_by="count").model
    with pytest.raises(InexactError, match="ln_final"):
        lf.attribute_logits(model, PROMPT, 3)
    result = lf.attribute_logits(lf.trace(model, PROMPT, hold=True), 3, by="source")
    assert result.held == ("ln_final",)
    assert [str(site) for site in lf.norms_read(model, PROMPT, lf.Logit(3))] == ["ln_final"]
