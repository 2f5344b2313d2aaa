"""The two finished forms. On the frozen one TransformerLens' own tools run, and are exact."""

import copy
import math
import warnings

import pytest
import torch
from support.architectures import lnfree_model
from support.models import freeze_all
from transformer_lens import (
    HookedTransformer,
    HookedTransformerConfig,
    patching,
)
from transformer_lens.components import TransformerBlock
from transformer_lens.head_detector import detect_head
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution
from transformer_lens.tools.analysis.direct_path_patching import get_act_patch_direct_path

import lnfree_interp as lf
from lnfree_interp.errors import InexactError, NormSiteError
from lnfree_interp.models.agreement import require_same_logits
from lnfree_interp.numerics import measure_error

TIGHT = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture
def tools(frozen):
    """The frozen form; q/k and v had constants of their own in the model it comes from."""
    assert (
        lf.get_norm(frozen, "blocks.0.ln1.qk").sigma != lf.get_norm(frozen, "blocks.0.ln1.v").sigma
    )
    return lf.frozen_form(frozen)


def require_close(found, expected, dtype):
    assert measure_error(found, expected).relative <= TIGHT[dtype]


def test_frozen_form_is_stock_but_for_its_norms(tools, frozen, tokens, dtype):
    assert type(tools) is HookedTransformer
    assert all(type(block) is TransformerBlock for block in tools.blocks)
    assert tools.cfg.normalization_type == "LNPre"
    assert lf.live_sites(tools) == ()
    assert [str(site) for site in lf.list_norm_sites(tools)][:3] == [
        "blocks.0.ln1",
        "blocks.0.ln2",
        "blocks.1.ln1",
    ]
    _, cache = tools.run_with_cache(tokens)
    _, before = frozen.run_with_cache(tokens)
    for layer in range(3):
        require_close(cache["resid_post", layer], before["resid_post", layer], dtype)
        scale = cache[f"blocks.{layer}.ln1.hook_scale"]
        assert scale.shape == (*tokens.shape, 1)
        assert (scale == scale[0, 0, 0]).all()
        constant = lf.get_norm(frozen, f"blocks.{layer}.ln1.v").sigma.to(scale)
        assert torch.equal(scale[0, 0, 0], constant)


def test_forms_turn_into_each_other(frozen, folded, tools, dtype):
    sigma = {"blocks.0.ln1": 3.0, "blocks.2.ln2": 0.25, "ln_final": 7.0}
    for model in (lf.fold(tools), lf.frozen_form(folded), lf.frozen_form(folded, sigma)):
        assert lf.compare_logits(model, frozen).relative <= TIGHT[dtype]
    shown = lf.frozen_form(folded, sigma)
    assert shown.ln_final.sigma.item() == 7.0
    assert shown.blocks[1].ln1.sigma.item() == 1.0
    back = lf.fold(lf.frozen_form(folded, sigma))
    for name, W in folded.named_parameters():
        require_close(back.get_parameter(name), W, dtype)


def test_forms_that_do_not_exist_are_refused(live, folded, tools):
    with pytest.raises(NormSiteError, match="nothing to fold"):
        lf.frozen_form(live)
    with pytest.raises(NormSiteError, match=r"blocks\.9\.ln1"):
        lf.frozen_form(folded, {"blocks.9.ln1": 1.0})
    with pytest.raises(NormSiteError, match="positive"):
        lf.frozen_form(folded, {"ln_final": 0.0})


def test_our_attribution_runs_on_both_forms(tools, folded, tokens):
    for model in (tools, folded):
        lf.attribute_next_tokens(model, tokens, by="neuron").verify()
    a = lf.attribute_logits(tools, tokens, answer=5)
    b = lf.attribute_logits(folded, tokens, answer=5)
    measure_error(a.values, b.values).require("attribution on the two forms")
    assert lf.direct_effects(tools, tokens).nmae < 1e-3


def direct_effect(model, tokens, cache, part, answer):
    """What is lost when a part is taken out of the last residual stream: brute force."""
    without = cache["resid_post", -1] - part
    logits = model.unembed(model.ln_final(without))[:, -1, answer]
    return model(tokens)[:, -1, answer] - logits


def test_logit_attrs_equals_taking_the_part_away(tools, tokens, dtype):
    logits, cache = tools.run_with_cache(tokens)
    stack = cache.decompose_resid()
    heads = cache.stack_head_results(layer=3, apply_ln=False)
    for parts in (stack, heads):
        found = cache.logit_attrs(parts, tokens=7)[:, :, -1]
        expected = [direct_effect(tools, tokens, cache, part, 7) for part in parts]
        require_close(found, torch.stack(expected), dtype)
    whole = cache.logit_attrs(stack, tokens=7).sum(0) + tools.b_U[7]
    require_close(whole, logits[..., 7], dtype)


def test_apply_ln_to_stack_equals_what_the_next_norm_gives(tools, tokens, dtype):
    _, cache = tools.run_with_cache(tokens)
    for layer, mlp_input, name in ((2, False, "blocks.2.ln1"), (2, True, "blocks.2.ln2")):
        parts = cache.decompose_resid(layer, mlp_input=mlp_input)
        scaled = cache.apply_ln_to_stack(parts, layer, mlp_input=mlp_input)
        require_close(scaled.sum(0), cache[f"{name}.hook_normalized"], dtype)
    scaled = cache.apply_ln_to_stack(cache.decompose_resid(), 3)
    require_close(scaled.sum(0), cache["ln_final.hook_normalized"], dtype)
    for part, own in zip(cache.decompose_resid(), scaled, strict=True):  # not only in the sum
        require_close(own, tools.ln_final(part), dtype)


@pytest.mark.parametrize("unit", ["component", "head"])
def test_direct_logit_attribution_sums_to_the_logit(unit, tools, tokens, dtype):
    result = direct_logit_attribution(tools, tokens, answer_tokens=7, unit=unit)
    logits = tools(tokens)[:, -1, 7]
    require_close(result.attribution.sum(0) + tools.b_U[7], logits, dtype)
    assert len(result.labels) == len(result.attribution)


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_path_patching_equals_brute_force(component, tools, tokens, dtype):
    clean, corrupted = tokens[:1], tokens[1:2]
    _, clean_cache = tools.run_with_cache(clean)
    _, corrupted_cache = tools.run_with_cache(corrupted)

    def metric(logits):
        return logits[0, -1, 3] - logits[0, -1, 4]

    found = get_act_patch_direct_path(
        tools, corrupted, clean_cache, corrupted_cache, metric, 0, 1, component, verbose=False
    )
    z = "blocks.0.attn.hook_z"
    delta = (clean_cache[z] - corrupted_cache[z])[:, :, 1] @ tools.blocks[0].attn.W_O[1]
    tools.set_use_split_qkv_input(True)
    expected = torch.zeros_like(found)
    for layer in (1, 2):
        for head in range(4):

            def add(activation, hook, head=head):
                activation[:, :, head] += delta
                return activation

            name = f"blocks.{layer}.hook_{component}_input"
            logits = tools.run_with_hooks(corrupted, fwd_hooks=[(name, add)])
            expected[layer, head] = metric(logits)
    require_close(found, expected, torch.float32)  # the tool's table is float32


def test_activation_patching_equals_brute_force(tools, folded, tokens, dtype):
    clean, corrupted = tokens[:1], tokens[1:2]
    _, cache = tools.run_with_cache(clean)

    def metric(logits):
        return logits[0, -1, 3] - logits[0, -1, 4]

    found = patching.get_act_patch_resid_pre(tools, corrupted, cache, metric)
    expected = torch.zeros_like(found)
    for layer in range(3):
        for pos in range(tokens.shape[1]):

            def put(activation, hook, pos=pos, layer=layer):
                activation[:, pos] = cache["resid_pre", layer][:, pos]
                return activation

            name = f"blocks.{layer}.hook_resid_pre"
            # On the other form, whose stream is the same.
            expected[layer, pos] = metric(folded.run_with_hooks(corrupted, fwd_hooks=[(name, put)]))
    require_close(found, expected, torch.float32)  # the tool's table is float32


def test_head_detector_equals_brute_force(tools, folded, dtype):
    text = "return self + other return self"
    found = detect_head(tools, text, "previous_token_head", error_measure="mul")
    _, cache = folded.run_with_cache(folded.to_tokens(text))
    patterns = torch.stack([cache["pattern", layer][0] for layer in range(3)])
    previous = patterns.diagonal(-1, dim1=-2, dim2=-1).sum(-1)
    require_close(found, previous / patterns.sum((-1, -2)), dtype)


# Where TransformerLens 3.9 goes wrong on the folded form; the documentation says so
# (docs/finished-forms.md). If one of these fails, that page has to change.


def test_logit_attrs_ignores_batch_slice_on_the_folded_form(folded, tools, tokens):
    def attributed(model):
        _, cache = model.run_with_cache(tokens)
        stack = cache.decompose_resid()
        return cache.logit_attrs(stack, tokens=7, batch_slice=slice(0, 2)).shape[1]

    assert attributed(folded) == 3
    assert attributed(tools) == 2


def test_projected_decomposition_needs_the_frozen_form(folded, tools, tokens):
    def project(model):
        _, cache = model.run_with_cache(tokens)
        return cache.get_full_resid_decomposition(
            apply_ln=True, project_output_onto=model.W_U[:, 7]
        )

    with pytest.raises(KeyError, match=r"ln_final\.hook_scale"):
        project(folded)
    whole = project(tools).sum(0) + tools.b_U[7]
    # TransformerLens accumulates biases in float32 on the way.
    measure_error(whole, tools(tokens)[..., 7]).require("projected parts", 1e-5)


def test_direct_path_patching_needs_the_frozen_form(folded, tokens):
    _, cache = folded.run_with_cache(tokens)
    with pytest.raises(KeyError, match="hook_scale"):
        get_act_patch_direct_path(
            folded, tokens, cache, cache, lambda logits: logits.sum(), 0, 0, verbose=False
        )


def test_on_live_norms_the_same_tools_are_wrong(live, tokens):
    """The yardstick: what the equalities above would look like if they were not exact."""
    _, cache = live.run_with_cache(tokens)
    stack = cache.decompose_resid()
    found = cache.logit_attrs(stack, tokens=7)[:, :, -1]
    expected = torch.stack([direct_effect(live, tokens, cache, part, 7) for part in stack])
    assert measure_error(found, expected).relative > 1e-2


def test_models_freed_from_rms_norms_have_a_frozen_form_too(tokens):
    """A folded model whose readers see the mean must not be centred."""
    folded = lf.load(lnfree_model("llama"))
    frozen = lf.frozen_form(folded, {"ln_final": 2.0})
    assert frozen.cfg.normalization_type == "RMSPre"
    _, cache = frozen.run_with_cache(tokens)
    whole = cache.logit_attrs(cache.decompose_resid(), tokens=7).sum(0) + frozen.b_U[7]
    require_close(whole, frozen(tokens)[..., 7], torch.float32)


def test_freezing_again_keeps_the_function(live):
    model = freeze_all(live, seed=3)
    lf.compare_logits(lf.fold(lf.frozen_form(model)), lf.fold(model)).require("two ways")


def rebuilt(model, how):
    """What a client makes of the frozen form's config and weights, without its constants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = HookedTransformer(model.cfg)
    if how == "processed":
        other.load_and_process_state_dict(model.state_dict(), fold_ln=False)
    else:
        other.load_state_dict(model.state_dict(), strict=False)
    return other


@pytest.mark.parametrize("how", ["plain", "processed", "dictionary"])
@pytest.mark.parametrize("kind", ["LNPre", "RMSPre", "crms"])
def test_a_model_rebuilt_from_the_config_alone_gives_no_plausible_number(how, kind, tools, live):
    if kind == "RMSPre":
        tools = lf.frozen_form(lf.load(lnfree_model("llama")))
    elif kind == "crms":
        tools = lf.to_crms(live, "drop").model
    assert math.isnan(tools.cfg.eps)
    if how == "dictionary":
        tools = copy.deepcopy(tools)
        tools.cfg = HookedTransformerConfig.from_dict(tools.cfg.to_dict())
    logits = rebuilt(tools, how)(torch.tensor([[1, 2, 3]]))
    assert logits.isnan().all()
    with pytest.raises(InexactError, match=r"not finite.*blocks\.0\.ln1\.hook_scale"):
        require_same_logits(tools, rebuilt(tools, how), "rebuilt")


def test_a_folded_model_can_be_rebuilt_from_its_config(folded, tokens):
    assert torch.equal(rebuilt(folded, "plain")(tokens), folded(tokens))


def test_the_epsilon_is_not_lost(frozen, folded, tools, tmp_path):
    assert lf.fold(tools).cfg.eps == lf.frozen_form(folded).ln_final.eps == frozen.cfg.eps
    assert lf.frozen_form(tools, {"ln_final": 2.0}).blocks[0].ln1.eps == frozen.cfg.eps
    for target in ("transformers", "transformer_lens"):
        folder = lf.export(tools, tmp_path / target, target=target)
        assert "NaN" not in "".join(file.read_text() for file in folder.glob("*.json"))
        back = lf.load(folder, form="frozen", dtype=tools.cfg.dtype)
        assert math.isnan(back.cfg.eps)
        assert back.ln_final.eps == frozen.cfg.eps
