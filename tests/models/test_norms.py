"""Every norm says what it does, and what it says is what it computes."""

import pytest
import torch
from support.architectures import make_model
from torch import nn
from transformer_lens.components import LayerNorm, LayerNormPre, RMSNorm, RMSNormPre

import lnfree_interp as lf
from lnfree_interp.errors import NormSiteError, UnsupportedModelError
from lnfree_interp.models.norms import CRMSNormPre, FrozenNorm, Norm, describe
from lnfree_interp.models.sites import norm_at, norm_path


@pytest.fixture
def cfg(live):
    return live.cfg


def as_described(found, x, hook_scale):
    """The formula of `NormMap`, at the scale that a live norm had."""
    scale = hook_scale if found.scale is None else found.scale
    if found.centred:
        x = x - x.mean(-1, keepdim=True)
    y = x / scale * found.factor
    y = y if found.gain is None else y * found.gain
    return y if found.bias is None else y + found.bias


def random_norms(cfg):
    norms = {
        "LayerNorm": LayerNorm(cfg),
        "LayerNormPre": LayerNormPre(cfg),
        "RMSNorm": RMSNorm(cfg),
        "RMSNormPre": RMSNormPre(cfg),
        "CRMSNormPre": CRMSNormPre(cfg.d_model + 1, cfg.eps),
        "frozen, centred": FrozenNorm(1.7, True, cfg.eps),
        "frozen": FrozenNorm(0.3, False, cfg.eps),
    }
    for norm in list(norms.values())[:3:2]:
        for W in norm.parameters():
            nn.init.normal_(W)
    for kind in ("LayerNorm", "RMSNorm"):
        norms[f"site of {kind}"] = Norm.from_stock(norms[kind])
        norms[f"frozen site of {kind}"] = Norm.from_stock(norms[kind])
        norms[f"frozen site of {kind}"].freeze(2.5)
    return norms


def test_a_norm_computes_what_its_description_says(cfg):
    x = torch.randn(2, 5, cfg.d_model, dtype=cfg.dtype)
    for name, norm in random_norms(cfg).items():
        seen = []
        norm.hook_scale.add_hook(lambda scale, hook, seen=seen: seen.append(scale))
        y = norm(x)
        expected = as_described(describe(norm), x, seen[0])
        lf.numerics.measure_error(y, expected).require(name)


def test_what_is_affine_is_called_affine(cfg):
    x, y = torch.randn(2, 3, 7, cfg.d_model, dtype=cfg.dtype).unbind(0)
    for name, norm in random_norms(cfg).items():
        error = lf.numerics.measure_error(norm(0.3 * x + 0.7 * y), 0.3 * norm(x) + 0.7 * norm(y))
        assert describe(norm).affine == ("frozen" in name), name
        assert (error.relative < 1e-5) == ("frozen" in name), name


def test_where_there_is_no_norm_is_the_identity():
    found = describe(nn.Identity())
    assert (found.affine, found.centred, found.multiplier.item()) == (True, False, 1.0)


def test_a_norm_between_live_and_frozen_has_both_and_is_not_affine(cfg):
    norm = Norm.from_stock(LayerNorm(cfg))
    norm.freeze(2.0, gate=0.5)
    found = describe(norm)
    assert found.statistic == "standard deviation"
    assert found.scale == 2.0
    assert not found.affine


def test_another_constant_to_show_is_the_same_map(cfg):
    norm = random_norms(cfg)["frozen site of LayerNorm"]
    found = describe(norm)
    shown = found.showing(0.01)
    assert shown.scale == 0.01
    torch.testing.assert_close(shown.multiplier, found.multiplier, rtol=1e-14, atol=0)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(NormSiteError, match="positive and finite"):
            found.showing(wrong)


@pytest.mark.parametrize("other", [nn.Dropout(), nn.Linear(3, 3), nn.LayerNorm(4)])
def test_a_module_that_is_no_norm_is_refused_by_name(other):
    with pytest.raises(UnsupportedModelError, match=type(other).__name__):
        describe(other)


def test_a_site_means_its_own_module_or_the_whole_norm(live, frozen, folded):
    for site in ("blocks.1.ln2", "ln_final"):
        assert norm_path(live, site) == norm_path(frozen, site) == site
    for half in ("qk", "v"):
        assert norm_path(frozen, f"blocks.1.ln1.{half}") == f"blocks.1.ln1.{half}"
        for model in (live, folded, lf.frozen_form(folded)):
            assert norm_path(model, f"blocks.1.ln1.{half}") == "blocks.1.ln1"
    with pytest.raises(NormSiteError, match="3 layers"):
        norm_path(live, "blocks.3.ln1.qk")
    assert norm_at(live, "blocks.1.ln1.qk").gain is live.blocks[1].ln1.w


def output_norms(kind):
    """A model whose norms behind the sublayers centre and have biases, all frozen."""
    model = lf.load(make_model(kind).double(), dtype=torch.float64)
    sites = [s for s in lf.list_norm_sites(model) if "post" in s.kind or "attn" in s.kind]
    assert sites
    for site in sites:
        norm = LayerNorm(model.cfg, model.get_submodule(str(site)).w.numel())
        for W in norm.parameters():
            nn.init.normal_(W)
        model.set_submodule(str(site), norm)
    model.setup()
    sited = lf.with_norm_sites(model)
    for i, site in enumerate(lf.list_norm_sites(sited)):
        lf.freeze_site(sited, site, 1.0 + 0.1 * i)
    return sited


@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "qwen3-bias"])
def test_norms_behind_a_weight_fold_with_centring_and_bias(kind, tokens):
    sited = output_norms(kind)
    for made in (lf.fold(sited), lf.frozen_form(sited), lf.fold(lf.frozen_form(sited))):
        assert lf.compare_logits(made, sited, tokens).relative < 1e-10


def test_a_class_whose_norms_do_not_centre_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.ln1_post is LayerNorm"):
        lf.formats.to_transformers(output_norms("gemma2"))


@pytest.mark.parametrize("kind", ["gemma2", "qwen3"])
def test_a_bias_that_the_weights_lack_is_made(kind):
    from lnfree_interp.models.folding import fold_weights
    from lnfree_interp.models.forms import constant_norms, weights_around_norms

    sited = output_norms(kind)
    weights = weights_around_norms(sited)
    biases = [name for name in weights if name.rpartition(".")[2].lstrip("_").startswith("b_")]
    for name in biases:
        weights[name].zero_()
    given = dict(fold_weights(dict(weights), constant_norms(sited), "folded"))
    without = {name: W for name, W in weights.items() if name not in biases}
    made = dict(fold_weights(without, constant_norms(sited), "folded"))
    for name, W in made.items():
        assert torch.equal(W, given[name]), name
    written = "b_O" if kind == "gemma2" else "b_Q"
    assert made[f"blocks.0.attn.{written}"].any()


@pytest.mark.parametrize("cast", ["to", "double", "half", "bfloat16"])
def test_the_frozen_form_can_be_cast(folded, tokens, cast):
    frozen = lf.frozen_form(folded, {"ln_final": 1 / 3})
    dtype = (
        torch.float64 if cast == "to" else getattr(torch, cast if cast != "double" else "float64")
    )
    moved = (
        frozen.to(torch.float64, print_details=False) if cast == "to" else getattr(frozen, cast)()
    )
    assert moved.ln_final.sigma.item() == 1 / 3
    assert moved.ln_final(torch.ones(1, 2, 32, dtype=dtype)).dtype == dtype
    if dtype == torch.float64:
        assert moved(tokens).dtype == dtype
        assert lf.compare_logits(moved, folded, tokens).relative < 1e-5


def test_the_narrow_norm_can_be_cast(live):
    narrow = lf.to_crms(live, "drop").model.to(torch.float64, print_details=False)
    assert lf.compare_logits(narrow, live).relative < 1e-5
    assert narrow(torch.tensor([[1, 2]])).dtype == torch.float64


def test_constants_of_a_site_stay_exact_when_it_is_cast(frozen):
    before = lf.get_norm(frozen, "ln_final").sigma.item()
    cast = frozen.half()
    assert lf.get_norm(cast, "ln_final").sigma.item() == before
    assert describe(lf.get_norm(cast, "ln_final")).scale == before
