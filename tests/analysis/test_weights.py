"""Weights alone, the lens, neurons and the gauge: against what the model does."""

import copy

import pytest
import torch
from support.loaded import folded_model, live_model
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.errors import DataError, InexactError, UnsupportedModelError


def close(found, expected, dtype=torch.float64):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def free_model(kind, form="folded"):
    folded = folded_model(kind)
    return folded if form == "folded" else lf.frozen_form(folded)


@pytest.mark.parametrize("which", ["Q", "K", "V"])
@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_virtual_weights_are_what_one_head_reads_of_another(form, which):
    """Taking the writer's output away changes the reader's query by z times them, exactly."""
    model, tokens = free_model("gpt2", form), torch.arange(7)[None]
    _, cache = model.run_with_cache(tokens)
    reading = f"blocks.2.attn.hook_{which.lower()}"
    gone = cache["blocks.0.attn.hook_z"][:, :, 3] @ model.W_O[0, 3]
    without = model.run_with_cache(
        cache["blocks.2.hook_resid_pre"] - gone, start_at_layer=2, names_filter=reading
    )[1][reading]
    effect = cache[reading][:, :, 1] - without[:, :, 1]
    weights = lf.virtual_weights(model, "L0H3", "L2H1", which)
    close(cache["blocks.0.attn.hook_z"][:, :, 3] @ weights.AB, effect)
    assert weights.AB.shape == (8, 8)


def test_virtual_weights_of_neurons_and_embeddings():
    model = free_model("gpt2")
    close(lf.virtual_weights(model, "embed", "L1N5").AB[:, 0], model.W_E @ model.W_in[1][:, 5])
    close(lf.virtual_weights(model, "0_mlp_out", "b_U").AB, model.W_out[0] @ model.W_U)
    close(lf.virtual_weights(model, "L0H1", "0_mlp_out").AB, model.W_O[0, 1] @ model.W_in[0])
    gated = free_model("llama")
    gate = gated.blocks[2].mlp.W_gate
    close(lf.virtual_weights(gated, "L0N3", "2_mlp_out").AB[0], gated.W_out[0][3] @ gate)


def test_virtual_weights_refuse_what_cannot_be():
    model, parallel = free_model("gpt2"), free_model("neox")
    with pytest.raises(DataError, match="does not come after"):
        lf.virtual_weights(model, "L1H0", "L1H1", "Q")
    with pytest.raises(DataError, match="does not come after"):
        lf.virtual_weights(parallel, "L0H1", "0_mlp_out")
    with pytest.raises(DataError, match="with which of Q, K and V"):
        lf.virtual_weights(model, "embed", "L1H1")
    with pytest.raises(DataError, match="no L2H9"):
        lf.virtual_weights(model, "L0H0", "L2H9", "Q")
    with pytest.raises(DataError, match="no component is called"):
        lf.virtual_weights(model, "head 3", "L2H1", "Q")
    live = live_model("gpt2", torch.float32)
    with pytest.raises(InexactError, match="freeze_for"):
        lf.bigram_table(live)


def test_tables_by_brute_force(gpt2_folder):
    model = lf.fold(freeze_all(lf.load(gpt2_folder, dtype=torch.float64, check=False)))
    OV = model.W_V[1, 2] @ model.W_O[1, 2]
    full = model.W_E @ OV @ model.W_U
    table = lf.ov_table(model, 1, 2)
    assert table.shape == (300, 300)
    close(table.row(7), full[7])
    close(table.column(7), full[:, 7])
    assert table.entry(7, 9) == pytest.approx(full[7, 9].item())
    top = table.top(5, chunk=64)
    values, places = full.flatten().topk(5)
    assert top["value"].tolist() == pytest.approx(values.tolist())
    names = [model.tokenizer.decode([place // 300]) for place in places.tolist()]
    assert top["row"].tolist() == names
    lowest = table.top(3, row=7, smallest=True)
    assert lowest["value"].tolist() == pytest.approx(full[7].topk(3, largest=False).values.tolist())
    close(table.matrix.AB, full)
    scores = model.W_E @ model.W_Q[1, 2] @ (model.W_E @ model.W_K[1, 2]).T / 8**0.5
    close(lf.qk_table(model, 1, 2).row(5), scores[5])
    close(lf.bigram_table(model).row(5), model.W_E[5] @ model.W_U)
    close(lf.neuron_input_table(model, 1).column(4), model.W_E @ model.W_in[1][:, 4])
    close(lf.neuron_output_table(model, 1).row(4), model.W_out[1][4] @ model.W_U)
    with pytest.raises(DataError, match="a whole number, not"):
        lf.neuron_output_table(model, 1).row("self")
    with pytest.raises(DataError, match="outside the vocabulary"):
        table.row(300)


def test_rotary_scores_depend_on_the_distance():
    model = free_model("llama")
    with pytest.raises(DataError, match="how far behind"):
        lf.qk_table(model, 0, 1)
    tokens = torch.tensor([11, 12, 13, 14])
    scores = lf.attribute_scores(model, tokens, 0, 1, by="sublayer")
    for key in range(4):
        table = lf.qk_table(model, 0, 1, offset=3 - key)
        row = scores.query_components.index(lf.Component("embed"))
        found = table.entry(14, int(tokens[key]))
        assert found == pytest.approx(scores.values[row, row, key].item(), rel=1e-9)


def test_lens_steps_are_attributions(folded, live, tokens, dtype):
    lens = lf.logit_lens(folded, tokens).verify()
    logits = folded(tokens)
    close(lens.values[-1, :, :-1], logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0], dtype)
    close(lens.values[-1, :, -1], logits[:, -1].amax(-1), dtype)  # what the model predicts there
    assert torch.equal(lens.targets[:, -1], logits[:, -1].argmax(-1))
    assert torch.equal(lens.predicted[-1], logits.argmax(-1))
    assert lens.increments.shape == (3, 3, 20)
    with pytest.raises(InexactError):
        lf.logit_lens(live, tokens)
    held = lf.logit_lens(lf.trace(live, tokens, hold=True))
    assert held.certificate.holds
    assert held.gap.relative > 0.01  # with each layer's own scale, steps are no attribution


def test_a_relu_mlp_is_affine_up_to_the_flip_and_not_beyond():
    live = live_model("gpt2", activation_function="relu")
    model = lf.fold(freeze_all(live))
    prompt = torch.arange(7)
    direction = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flips = lf.flip_distances(model, prompt, 1, direction).verify()
    neuron, t = flips.nearest
    assert neuron.kind == "neuron"
    x = model.run_with_cache(prompt[None])[1]["blocks.1.hook_resid_mid"][0, -1]
    mlp = model.blocks[1].mlp

    def out(distance):
        return mlp((x + distance * direction)[None, None])[0, 0]

    slope = (out(0.5 * t) - out(0)) / (0.5 * t)
    close(out(0.99 * t), out(0) + 0.99 * t * slope)
    beyond = 1.5 * flips.distance.sort().values[1]
    assert (out(beyond) - out(0) - beyond * slope).abs().max() > 1e-6
    pre = x @ mlp.W_in + mlp.b_in
    signs = ((x + 1.001 * t * direction) @ mlp.W_in + mlp.b_in > 0) != (pre > 0)
    assert signs.nonzero()[:, 0].tolist() == [neuron.index]


def test_taking_a_component_away_flips_at_a_distance(folded):
    flips = lf.flip_distances(folded, torch.arange(7), 2, "L0H1").verify()
    without = lf.attribute_neuron(folded, torch.arange(7), 2, 4)
    torch.testing.assert_close(flips.pre[4], without.total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flips.slope[4], -without["L0H1"], rtol=1e-4, atol=1e-5)


def test_gauge():
    model, tokens = free_model("gpt2"), torch.arange(7)[None]

    def norms(model):
        return model.run_with_cache(tokens)[1]["resid_post", 1].norm(dim=-1)

    def cosine(model):
        stream = model.run_with_cache(tokens)[1]["resid_post", 1][0]
        return torch.cosine_similarity(stream[2], stream[5], dim=0)

    def attribution(model):
        return lf.attribute_logits(model, tokens[0], 3).values

    assert not lf.gauge_check(norms, model).invariant
    assert not lf.gauge_check(cosine, model).invariant
    assert lf.gauge_check(norms, model, kind="orthogonal").invariant
    assert lf.gauge_check(attribution, model).invariant
    assert "DEPENDS" in str(lf.gauge_check(cosine, model))
    for metric in (
        lambda m: lf.attribute_scores(m, tokens[0], 2, 1).values,
        lambda m: lf.expand_paths(m, tokens[0], 3).values,
        lambda m: lf.virtual_weights(m, "L0H3", "L2H1", "Q").AB,
        lambda m: lf.logit_lens(m, tokens).values,
    ):
        assert lf.gauge_check(metric, model).invariant
    # Composition scores are norms of matrices with ends in the stream; virtual weights have none.
    scores = lf.gauge_check(lambda model: model.all_composition_scores("Q"), model)
    assert not scores.invariant
    products = lf.gauge_check(lambda m: lf.virtual_weights(m, "L0H0", "L2H1", "Q").norm(), model)
    assert products.invariant
    # A large number does not hide a small one, in float32 either, and a count is right or wrong.
    single = copy.deepcopy(model)
    single.to(torch.float32, print_details=False)
    mixed = lf.gauge_check(
        lambda m: torch.stack([norms(m).new_tensor(3e6), norms(m)[0, 0]]), single
    )
    assert not mixed.invariant
    probe = torch.randn(single.cfg.d_model, generator=torch.Generator().manual_seed(0))
    assert not lf.gauge_check(lambda m: m.W_E[3] @ probe, single).invariant  # float32 of its own
    hidden = lf.gauge_check(
        lambda m: torch.stack([norms(m).new_tensor(5e6), norms(m)[0, 0]]), model
    )
    assert not hidden.invariant
    count = iter([50_001, 50_002])
    assert not lf.gauge_check(lambda m: next(count), model, bases=1).invariant
    nans = iter([1.0, float("nan")])
    with pytest.raises(DataError, match="nan"):
        lf.gauge_check(lambda m: next(nans), model, bases=1)
    hooks = [("hook_embed", lambda x, hook: 2 * x)]
    with model.hooks(hooks), pytest.raises(UnsupportedModelError, match="has hooks"):
        lf.random_gauge(model)
    turned = lf.random_gauge(model)
    assert (turned.W_E - model.W_E).abs().max() > 0.1
    assert lf.compare_logits(turned, model).relative <= 1e-10
    with pytest.raises(UnsupportedModelError, match="fold"):
        lf.random_gauge(lf.frozen_form(model))
    with pytest.raises(DataError, match="no numbers"):
        lf.gauge_check(lambda m: torch.empty(0), model)


def test_effects_add_up_without_norms_only(folded, live, tokens, dtype):
    free = lf.direct_effect_additivity(folded, tokens, ["L0H1", "2_mlp_out"], ["L2H3"])
    free.certificate.require()
    assert free.nmae <= {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    bearing = lf.direct_effect_additivity(live, tokens, ["L0H1", "2_mlp_out"], ["L2H3"])
    assert bearing.nmae > 1e-3
    assert bearing.attribution_error > 1e-3
    assert free.targets == tokens.numel() - len(tokens)
    with pytest.raises(DataError, match="in both groups"):
        lf.direct_effect_additivity(folded, tokens, ["L0H1"], ["L0H1"])
    with pytest.raises(DataError, match=r"did you mean .*L0H1"):
        lf.direct_effect_additivity(folded, tokens, ["LOH1"], ["L2H3"])


def test_rounding_is_no_dependence_on_the_basis(gpt2_folder):
    free = lf.fold(freeze_all(lf.load(gpt2_folder, dtype=torch.float32)))
    for seed in range(4):
        for metric in (
            lambda m: lf.attribute_logits(m, torch.arange(7), 3, by="neuron").values,
            lambda m: lf.virtual_weights(m, "L0H3", "L2H1", "Q").AB,
        ):
            assert lf.gauge_check(metric, free, bases=1, seed=seed).invariant


def test_a_direction_that_nothing_reads_flips_nothing(folded):
    flips = lf.flip_distances(folded, torch.arange(7), 1, torch.ones(folded.cfg.d_model)).verify()
    assert flips.distance.isinf().all()
