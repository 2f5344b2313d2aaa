"""Norm sites on every architecture: the same function, the same gradients, frozen and folded."""

import pytest
import torch
from support.architectures import ALL, make_model
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.models.block import SiteBlock


@pytest.fixture(scope="module")
def stock_models():
    return {}


@pytest.fixture
def stock(stock_models, request):
    kind = request.getfixturevalue("kind")
    if kind not in stock_models:
        stock_models[kind] = lf.load(
            make_model(kind), dtype=torch.float64, device="cpu", check=False
        )
    return stock_models[kind]


@ALL
def test_the_split_model_is_the_same_model(kind, stock, tokens):
    """Logits, every activation that stock has, and every gradient; fused and looked at."""
    sites = lf.with_norm_sites(stock)
    assert all(isinstance(block, SiteBlock) for block in sites.blocks)
    assert lf.list_norm_sites(sites) == lf.live_sites(sites) == lf.list_norm_sites(stock)
    for site in lf.list_norm_sites(sites):
        lf.get_norm(sites, site)
    lf.compare_logits(sites, stock, tokens).require(kind, 1e-11)
    _, ours = sites.run_with_cache(tokens)
    _, theirs = stock.run_with_cache(tokens)
    for name, expected in theirs.items():
        found = ours[name.replace(".ln1.", ".ln1.qk.")]
        if "_norm." in name:  # stock flattens batch, position and head
            found = found.reshape(expected.shape)
        finite = expected.isfinite()
        assert torch.equal(finite, found.isfinite())
        lf.numerics.measure_error(found[finite], expected[finite]).require(name, 1e-11)


@ALL
def test_gradients_equal_stock(kind, stock, tokens):
    sites = lf.with_norm_sites(stock)
    stock.zero_grad()
    losses = [model(tokens, return_type="loss") for model in (sites, stock)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    if "unembed.W_U" not in dict(sites.named_parameters()):
        expected["embed.W_E"] = expected["embed.W_E"] + expected.pop("unembed.W_U").T
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in sites.named_parameters():
        if parameter.grad is not None:
            difference = parameter.grad - expected.pop(name.replace(".ln1.qk.", ".ln1."))
            assert difference.abs().max() <= 1e-10 * largest, name
    assert all(name.endswith(("b_U", "b_K")) for name in expected), expected.keys()


@ALL
def test_frozen_sites_fold_exactly(kind, stock, tokens):
    frozen = freeze_all(stock)
    assert lf.live_sites(frozen) == ()
    plain = frozen(tokens)
    looked_at, _ = frozen.run_with_cache(tokens)
    lf.numerics.measure_error(looked_at, plain).require("hooked against fused", 1e-11)
    folded = lf.fold(frozen)
    assert folded.cfg.normalization_type is None
    lf.compare_logits(folded, frozen, tokens).require(f"{kind} folded", 1e-10)
    # Freezing does something: without it the comparison above would be empty.
    assert lf.compare_logits(frozen, stock, tokens).relative > 1e-3


@pytest.mark.parametrize("kind", ["neox", "llama-grouped", "qwen3", "gemma2"])
@pytest.mark.parametrize("setting", ["split_qkv_input", "attn_in", "hook_mlp_in", "attn_result"])
def test_every_setting(kind, stock, setting, tokens):
    if setting == "attn_in" and stock.cfg.n_key_value_heads not in (None, stock.cfg.n_heads):
        pytest.skip("stock TransformerLens refuses it with grouped queries")
    sites = lf.with_norm_sites(stock)
    for model in (sites, stock):
        getattr(model, f"set_use_{setting}")(True)
    try:
        lf.compare_logits(sites, stock, tokens).require(setting, 1e-11)
    finally:
        getattr(stock, f"set_use_{setting}")(False)
