"""Attributions add up, equal brute force and measured effects, and fail when they should."""

from dataclasses import replace

import pytest
import torch
from transformer_lens.utilities import get_act_name

import lnfree_interp as lf
from lnfree_interp.analysis import attribute as attribute_module
from lnfree_interp.analysis.hooked import HookedView
from lnfree_interp.errors import DataError, HeldWarning, InexactError

LEVELS = ["layer", "sublayer", "head", "source", "neuron"]
PROMPTS = ["def add(self, other", "for i in range(", "return"]
ANSWERS, FOILS = ["r", "i", "s"], ["e", "n", "d"]


@pytest.mark.parametrize("form", ["folded", "frozen"])
@pytest.mark.parametrize("level", LEVELS)
def test_parts_add_up(request, form, level, dtype):
    model = request.getfixturevalue(form)
    result = lf.attribute_logits(model, PROMPTS, ANSWERS, FOILS, by=level).verify()
    assert result.error.relative <= {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    for i, prompt in enumerate(PROMPTS):
        logits = model(prompt)[0, -1]
        answer, foil = (model.to_single_token(x[i]) for x in (ANSWERS, FOILS))
        torch.testing.assert_close(result.total[i], logits[answer] - logits[foil])


@pytest.mark.parametrize("level", LEVELS)
def test_next_token_parts_add_up_at_every_position(folded, tokens, level):
    result = lf.attribute_next_tokens(folded, tokens, by=level).verify()
    expected = folded(tokens)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(result.total, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_a_live_model_adds_up_with_its_norm_held_only(live, level):
    with pytest.raises(InexactError, match=r"ln_final is not affine.*hold=True"):
        lf.attribute_logits(live, PROMPTS[0], "r", by=level)
    result = lf.attribute_logits(lf.trace(live, PROMPTS[0], hold=True), "r", by=level)
    with pytest.warns(HeldWarning):
        result.verify()
    assert result.held == ("ln_final",)
    assert "ln_final.b" in result.labels


def test_levels_refine_one_another(folded, tokens):
    _, sublayer, head, _, neuron = (
        lf.attribute_next_tokens(folded, tokens, by=level) for level in LEVELS
    )
    layers = folded.cfg.n_layers
    heads = head.of_kind("head").unflatten(0, (layers, -1)).sum(1) + head.of_kind("b_O")
    torch.testing.assert_close(heads, sublayer.of_kind("attn_out"), rtol=1e-4, atol=1e-5)
    mlps = neuron.of_kind("neuron").unflatten(0, (layers, -1)).sum(1) + neuron.of_kind("b_out")
    torch.testing.assert_close(mlps, sublayer.of_kind("mlp_out"), rtol=1e-4, atol=1e-5)


def test_heads_and_neurons_equal_brute_force(folded, tokens):
    """Against TransformerLens' own stacks, which do materialise every part."""
    result = lf.attribute_next_tokens(folded, tokens, by="neuron")
    _, cache = folded.run_with_cache(tokens)
    directions = folded.W_U.T[tokens[:, 1:]]
    for kind, stack in (
        ("head", cache.stack_head_results()),
        ("neuron", cache.stack_neuron_results(-1)),
    ):
        expected = (stack[:, :, :-1] * directions).sum(-1)
        torch.testing.assert_close(result.of_kind(kind), expected, rtol=1e-4, atol=1e-5)


def test_attribution_is_the_measured_effect_without_norms_only(folded, live, tokens, dtype):
    free, bearing = lf.direct_effects(folded, tokens), lf.direct_effects(live, tokens)
    assert free.nmae <= {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    assert free.pooled_nmae <= {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    assert bearing.nmae > 0.02
    # Measured once more: ablate z in the last layer, hold what reads it, run the whole model.
    layer, head = folded.cfg.n_layers - 1, 2
    mlp_out = folded.run_with_cache(tokens)[1]["mlp_out", layer]

    def ablate(z, hook):
        z[:, :, head] = 0
        return z

    hooks = [
        (get_act_name("z", layer), ablate),
        (get_act_name("mlp_out", layer), lambda x, hook: mlp_out),
    ]
    ablated = folded.run_with_hooks(tokens, fwd_hooks=hooks)
    effect = (folded(tokens) - ablated)[:, :-1].gather(-1, tokens[:, 1:, None]).flatten()
    torch.testing.assert_close(free.measured[layer, head].to(dtype), effect, rtol=1e-3, atol=1e-4)


def test_a_dead_head_has_no_error():
    result = lf.DirectEffects(torch.zeros(1, 2, 3), torch.tensor([[[0.0] * 3, [1.0] * 3]]))
    assert result.nmae_per_head.tolist() == [[0.0, 1.0]]


def test_nmae_by_hand():
    attribution = torch.tensor([[[1.0, 2.0], [3.0, 3.0]]])
    measured = torch.tensor([[[1.0, 1.0], [-2.0, 4.0]]])
    result = lf.DirectEffects(attribution, measured)
    assert result.nmae_per_head.tolist() == [[0.5, 1.0]]
    assert result.nmae == 0.75
    assert result.pooled_nmae == pytest.approx(7 / 8)


@pytest.mark.parametrize("mutation", ["centring", "scale", "bias", "gain"])
def test_every_mutation_of_the_final_norm_is_caught(frozen, monkeypatch, mutation):
    right = HookedView.read

    def mutated(view, site, scale):
        norm = right(view, site, scale)
        change = {
            "centring": {"centred": False},
            "scale": {"scale": 1.001 * norm.scale},
            "bias": {"bias": 0 * norm.bias},
            "gain": {"gain": norm.gain.flip(0)},
        }
        return replace(norm, **change[mutation])

    monkeypatch.setattr(HookedView, "read", mutated)
    with pytest.raises(InexactError):
        lf.attribute_logits(frozen, PROMPTS, ANSWERS, by="head").verify()


def test_missing_b_U_is_caught(folded, monkeypatch):
    right = attribute_module.project

    def mutated(parts, direction, constants):
        return right(parts, direction, [(component, 0 * value) for component, value in constants])

    monkeypatch.setattr(attribute_module, "project", mutated)
    with pytest.raises(InexactError):
        lf.attribute_logits(folded, PROMPTS, ANSWERS).verify()


def test_one_prompt_has_no_batch_dimension(folded):
    one = lf.attribute_logits(folded, PROMPTS[0], "r", "e")
    batch = lf.attribute_logits(folded, PROMPTS, ["r", "i", "s"], ["e", "n", "d"])
    assert one.values.shape == (len(one.components),)
    torch.testing.assert_close(one.values, batch.select(0).values)
    assert one.of == ("'r' - 'e'",)
    frame = one.to_frame()
    assert list(frame["component"]) == one.labels
    assert frame["value"].sum() == pytest.approx(one.total.item(), rel=1e-4)
    assert batch.to_frame().shape == (len(one.components), 4 + 3)


def test_prompts_may_be_token_ids(folded):
    text = lf.attribute_logits(folded, PROMPTS[:2], ["r", "i"])
    for i, prompt in enumerate(PROMPTS[:2]):
        ids = lf.attribute_logits(folded, folded.to_tokens(prompt)[0], ["r", "i"][i])
        torch.testing.assert_close(ids.values, text.select(i).values)
        assert ids.prompts == text.select(i).prompts
    plain = lf.attribute_logits(lf.trace(folded, PROMPTS[0], prepend_bos=False), "r")
    assert plain.prompts[0] == text.prompts[0][1:]
    assert not torch.allclose(plain.values, text.select(0).values)


def test_a_small_difference_of_large_parts_is_not_an_error(folded):
    """Rounding goes with the parts: two nearly equal logits must not fail."""
    logits = folded("def add(")[0, -1]
    order = logits.argsort()
    gaps = logits[order].diff()
    closest = int(gaps.argmin())
    answer, foil = int(order[closest + 1]), int(order[closest])
    lf.attribute_logits(folded, "def add(", answer, foil, by="neuron").verify()


def test_long_prompts_are_refused_not_cut(folded):
    with pytest.raises(DataError, match="the model's context is 48"):
        lf.attribute_logits(folded, "return self + other " * 40, "r")
    with pytest.raises(DataError, match="tokens in a row"):
        lf.attribute_next_tokens(folded, torch.zeros(1, 60, dtype=torch.long))
    with pytest.raises(DataError, match="no next token"):
        lf.attribute_next_tokens(folded, torch.zeros(3, 1, dtype=torch.long))


def test_wrong_questions_are_refused(folded):
    with pytest.raises(DataError, match="an answer is one token"):
        lf.attribute_logits(folded, "return", "zzz qqq")
    with pytest.raises(DataError, match="3 prompts, but 2 answers"):
        lf.attribute_logits(folded, PROMPTS, ["r", "i"])
    with pytest.raises(DataError, match="answer and foil"):
        lf.attribute_logits(folded, "return", "r", "r")
    with pytest.raises(DataError, match="empty"):
        lf.attribute_logits(folded, [], "r")
    with pytest.raises(DataError, match="outside the vocabulary"):
        lf.attribute_logits(folded, "return", 300)
    folded.cfg.output_logits_soft_cap = 30.0
    with pytest.raises(InexactError, match="soft cap"):
        lf.attribute_logits(folded, "return", "r")
