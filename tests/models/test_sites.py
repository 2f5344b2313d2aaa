"""Norm sites: the split model is the same model, and frozen sites are affine."""

import pytest
import torch
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.errors import InexactError, NormSiteError, UnsupportedModelError
from lnfree_interp.models.block import TiedUnembed


def test_sites_are_listed_in_order_of_computation(live):
    names = [str(site) for site in lf.list_norm_sites(live)]
    assert names[:4] == ["blocks.0.ln1.qk", "blocks.0.ln1.v", "blocks.0.ln2", "blocks.1.ln1.qk"]
    assert names[-1] == "ln_final"
    assert len(names) == 3 * live.cfg.n_layers + 1
    assert names == [str(site) for site in lf.list_norm_sites(lf.with_norm_sites(live))]
    assert lf.live_sites(live) == lf.list_norm_sites(live)


def test_split_model_computes_the_same(live):
    lf.compare_logits(lf.with_norm_sites(live), live).require("split against stock")


@pytest.mark.parametrize("setting", ["split_qkv_input", "attn_in", "hook_mlp_in", "attn_result"])
def test_split_model_computes_the_same_under_every_setting(live, setting):
    split = lf.with_norm_sites(live)
    for model in (split, live):
        getattr(model, f"set_use_{setting}")(True)
    lf.compare_logits(split, live).require(setting)


def test_looking_inside_changes_nothing(frozen, live, tokens):
    for model in (frozen, lf.with_norm_sites(live)):
        plain = model(tokens)
        seen, cache = model.run_with_cache(tokens)  # hooks everywhere: nothing runs fused
        lf.numerics.measure_error(seen, plain).require("hooked against fused")
        assert cache["blocks.1.attn.hook_pattern"].shape == (3, 4, 20, 20)


def test_activations_have_the_stock_names_and_values(live, tokens):
    _, ours = lf.with_norm_sites(live).run_with_cache(tokens)
    _, stock = live.run_with_cache(tokens)
    renamed = {name.replace(".ln1.", ".ln1.qk."): x for name, x in stock.items()}
    assert set(renamed) <= set(ours)
    for name, activation in renamed.items():
        # Masked scores are -inf, and equal.
        finite = activation.isfinite()
        assert torch.equal(finite, ours[name].isfinite())
        lf.numerics.measure_error(ours[name][finite], activation[finite]).require(name)


def test_gradients_equal_stock(live, tokens):
    """Training the split model is training the stock model; tied embeddings collect both uses."""
    split = lf.with_norm_sites(live)
    losses = [model(tokens, return_type="loss") for model in (split, live)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    stock = {name: p.grad for name, p in live.named_parameters() if p.grad is not None}
    stock["embed.W_E"] = stock["embed.W_E"] + stock.pop("unembed.W_U").T
    largest = max(grad.abs().max() for grad in stock.values())
    for name, parameter in split.named_parameters():
        if parameter.grad is not None:
            expected = stock.pop(name.replace(".ln1.qk.", ".ln1."))
            # b_K's true gradient is zero: softmax does not see it. Hence one scale for all.
            assert (parameter.grad - expected).abs().max() <= 1e-5 * largest, name
    assert set(stock) <= {"unembed.b_U"}


def test_what_is_not_trained_stays_so_and_hooks_stay_behind(live, tokens):
    live.requires_grad_(False)
    live.blocks[0].mlp.requires_grad_(True)
    split = lf.with_norm_sites(live)
    trained = {name for name, p in split.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.0.mlp.{name}" for name in ("W_in", "b_in", "W_out", "b_out")}
    live.add_perma_hook("blocks.1.mlp.hook_post", lambda x, hook: None)
    assert not any(point.has_hooks() for point in lf.with_norm_sites(live).hook_points())
    live.add_perma_hook("blocks.1.mlp.hook_post", lambda x, hook: x * 0)
    with pytest.raises(InexactError, match="norm sites against stock"):
        lf.with_norm_sites(live)


@pytest.mark.parametrize(
    "setting",
    [{"attention_dir": "bidirectional"}, {"final_rms": True},
     {"normalization_type": "LNPre"}, {"post_embedding_ln": True}, {"use_attention_sinks": True},
     {"positional_embedding_type": "alibi"}, {"original_architecture": "Olmo2ForCausalLM"}],
    ids=str,
)  # fmt: skip
def test_models_that_would_be_computed_differently_are_refused(live, setting):
    for name, value in setting.items():
        setattr(live.cfg, name, value)
    with pytest.raises(UnsupportedModelError):
        lf.with_norm_sites(live)


def test_looking_at_a_half_precision_norm_does_not_change_it(live):
    norm = lf.get_norm(lf.with_norm_sites(live), "ln_final").half()
    x = 400 * torch.randn(2, 5, live.cfg.d_model).half()
    plain = norm(x)
    norm.hook_scale.add_hook(lambda scale, hook: scale)
    torch.testing.assert_close(norm(x), plain, rtol=1e-2, atol=1e-2)


def test_the_original_is_left_alone(live, tokens):
    before = live(tokens)
    frozen = freeze_all(live)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.zero_()
    assert torch.equal(live(tokens), before)


def test_only_equal_embeddings_are_tied(live):
    assert isinstance(lf.with_norm_sites(live).unembed, TiedUnembed)
    with torch.no_grad():
        live.unembed.W_U[0, 0] += 1
    assert not isinstance(lf.with_norm_sites(live).unembed, TiedUnembed)


@pytest.mark.parametrize("site", ["blocks.1.ln1.qk", "blocks.0.ln1.v", "blocks.2.ln2", "ln_final"])
@pytest.mark.parametrize("hooked", [False, True])
def test_frozen_site_is_affine_and_live_is_not(live, site, hooked):
    model = lf.with_norm_sites(live)
    norm = lf.get_norm(model, site)
    if hooked:
        norm.hook_scale.add_hook(lambda scale, hook: scale)
    x, y = torch.randn(2, 5, 7, live.cfg.d_model, dtype=live.cfg.dtype).unbind(0)

    def nonaffinity():
        mixed = norm(0.3 * x + 0.7 * y)
        return lf.numerics.measure_error(mixed, 0.3 * norm(x) + 0.7 * norm(y))

    assert nonaffinity().relative > 0.01
    lf.freeze_site(model, site, 1.3)
    nonaffinity().require(site, 1e-6 if live.cfg.dtype == torch.float32 else 1e-14)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(x), centred / 1.3 * norm.w + norm.b)


def test_frozen_site_shows_its_constant(frozen, tokens):
    _, cache = frozen.run_with_cache(tokens)
    sigma = lf.get_norm(frozen, "blocks.1.ln1.v").sigma
    scale = cache["blocks.1.ln1.v.hook_scale"]
    assert scale.shape == (3, 20, 1)
    assert (scale == sigma.to(scale)).all()
    assert lf.live_sites(frozen) == ()


def test_frozen_state_survives_a_state_dict(live, frozen, tokens):
    other = lf.with_norm_sites(live)
    assert len(lf.live_sites(other)) == 10
    other.load_state_dict(frozen.state_dict())
    assert lf.live_sites(other) == ()
    assert torch.equal(other(tokens), frozen(tokens))


def test_a_thawed_site_is_live_again(live, tokens):
    model = lf.with_norm_sites(live)
    before = model(tokens)
    lf.freeze_site(model, "blocks.0.ln2", 2.0)
    assert not torch.allclose(model(tokens), before)
    lf.get_norm(model, "blocks.0.ln2").thaw()
    assert torch.equal(model(tokens), before)


def test_errors(live, folded):
    model = lf.with_norm_sites(live)
    with pytest.raises(NormSiteError, match=r"no norm site 'blocks\.9\.ln2'"):
        lf.get_norm(model, "blocks.9.ln2")
    with pytest.raises(NormSiteError, match="with_norm_sites"):
        lf.get_norm(live, "blocks.0.ln2")
    for sigma in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(NormSiteError, match="positive and finite"):
            lf.freeze_site(model, "ln_final", sigma)
    assert lf.list_norm_sites(folded) == ()
    with pytest.raises(UnsupportedModelError, match="normalization_type=None"):
        lf.with_norm_sites(folded)
