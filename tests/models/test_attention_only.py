"""Models without MLPs go all the way: sites, frozen, folded, the frozen form, a folder and back."""

import pytest
import torch
from support.models import freeze_all
from transformer_lens import HookedTransformer, HookedTransformerConfig

import lnfree_interp as lf


@pytest.fixture(params=["LN", "RMS"])
def attention_only(request):
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=24, n_ctx=40, d_head=6, n_heads=4, d_vocab=50, attn_only=True,
        normalization_type=request.param, dtype=torch.float64, device="cpu",
    )  # fmt: skip
    model = HookedTransformer(cfg)
    with torch.no_grad():
        for name, W in model.named_parameters():
            W.copy_(0.2 * torch.randn_like(W) + (name.endswith(".w")))
    return model


def test_every_form_is_the_same_function(attention_only):
    sited = freeze_all(lf.with_norm_sites(attention_only))
    folded = lf.fold(sited)
    tools = lf.frozen_form(sited)
    again = lf.frozen_form(folded, {"blocks.1.ln1": 3.0, "ln_final": 0.5})
    for made in (folded, tools, again, lf.fold(tools)):
        assert lf.compare_logits(made, sited).relative < 1e-10
    assert [str(site) for site in lf.list_norm_sites(tools)] == [
        "blocks.0.ln1",
        "blocks.1.ln1",
        "ln_final",
    ]


def test_a_folder_in_our_layout_comes_back(attention_only, tmp_path):
    sited = freeze_all(lf.with_norm_sites(attention_only))
    made = {"live": attention_only, "folded": lf.fold(sited), "frozen": lf.frozen_form(sited)}
    for name, model in made.items():
        folder = lf.export(model, tmp_path / name, target="transformer_lens")
        back = lf.load(folder, dtype=torch.float64, device="cpu")
        assert lf.compare_logits(back, model).relative < 1e-10
        assert back.cfg.attn_only


def test_norm_conversions_know_attention_alone(attention_only):
    if attention_only.cfg.normalization_type == "LN":
        for basis in ("orthonormal", "drop"):
            assert lf.to_crms(attention_only, basis).error.relative < 1e-10
