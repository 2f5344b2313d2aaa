"""Folding is exact, gives a stock model, and its own check fails when the fold is wrong."""

from dataclasses import replace

import pytest
import torch
from transformer_lens import HookedTransformer
from transformer_lens.components import TransformerBlock

import lnfree_interp as lf
from lnfree_interp.errors import InexactError, NormSiteError
from lnfree_interp.models import folding


def test_folded_equals_frozen(frozen, dtype):
    error = lf.compare_logits(lf.fold(frozen), frozen)
    assert error.relative <= {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]


def test_untied_model_folds(live):
    with torch.no_grad():
        live.unembed.W_U.add_(torch.randn_like(live.W_U))
        live.unembed.b_U.add_(torch.randn_like(live.b_U))
    model = lf.with_norm_sites(live)
    for site in lf.list_norm_sites(model):
        lf.freeze_site(model, site, 0.7)
    lf.compare_logits(lf.fold(model), model).require("untied")


def test_folded_is_stock(folded, frozen, tokens):
    assert type(folded) is HookedTransformer
    assert all(type(block) is TransformerBlock for block in folded.blocks)
    assert folded.cfg.normalization_type is None
    assert not hasattr(folded, "ln_final")
    ours = [m for m in folded.modules() if type(m).__module__.startswith("lnfree_interp")]
    assert ours == []
    # What is written to the stream does not change, so neither does any activation of it.
    _, a = folded.run_with_cache(tokens)
    _, b = frozen.run_with_cache(tokens)
    lf.numerics.measure_error(a["resid_post", -1], b["resid_post", -1]).require("resid_post")


def test_live_sites_are_refused_by_name(frozen):
    lf.get_norm(frozen, "blocks.1.ln1.v").thaw()
    with pytest.raises(NormSiteError, match=r"1 norm sites are still live.*blocks\.1\.ln1\.v"):
        lf.fold(frozen)


def test_models_without_sites_are_refused(live, folded):
    for model in (live, folded):
        with pytest.raises(NormSiteError, match="nothing to fold"):
            lf.fold(model)


def no_centring(norm, scale, W, b):
    return RIGHT(replace(norm, centred=False), scale, W, b)


def no_bias(norm, scale, W, b):
    return RIGHT(norm, scale, W, b)[0], b


def no_gain(norm, scale, W, b):
    return RIGHT(replace(norm, gain=None), scale, W, b)


def wrong_sigma(norm, scale, W, b):
    folded, bias = RIGHT(norm, scale, W, b)
    return folded * 1.001, bias


RIGHT = folding._fold_reader


@pytest.mark.parametrize("mutation", [no_centring, no_bias, no_gain, wrong_sigma])
def test_every_mutation_of_the_fold_is_caught(frozen, monkeypatch, mutation):
    monkeypatch.setattr(folding, "_fold_reader", mutation)
    with pytest.raises(InexactError, match="folded against the given"):
        lf.fold(frozen)
