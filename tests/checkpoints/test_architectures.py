"""Every architecture: the logits of transformers, or a refusal that says why."""

from dataclasses import replace

import pytest
import torch
from support.architectures import (
    ALL,
    CONFIGS,
    is_norm,
    lnfree_model,
    make_model,
    transformers_in_float64,
)
from support.models import freeze_all, make_tokenizer
from transformers import AutoModelForCausalLM

import lnfree_interp as lf
from lnfree_interp.checkpoints.architectures import ARCHITECTURES
from lnfree_interp.errors import CheckpointError, LnfreeError, UnsupportedModelError
from lnfree_interp.numerics import measure_error


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tokenizer):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            make_model(kind).save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return folder


def compare_with_transformers(model, folder, tokens, dtype):
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return measure_error(model(tokens), hf_model(tokens).logits)


@ALL
def test_logits_in_float32(kind, folder_of, tokens):
    model = lf.load(folder_of(kind))
    assert compare_with_transformers(model, folder_of(kind), tokens, torch.float32).relative < 1e-5


@ALL
def test_logits_in_float64(kind, folder_of, tokens, monkeypatch):
    """Rotary angles of `llama3` are float32 in TransformerLens too."""
    model = lf.load(folder_of(kind), dtype=torch.float64)
    with transformers_in_float64(monkeypatch, kind):
        error = compare_with_transformers(model, folder_of(kind), tokens, torch.float64)
    assert error.relative < (1e-6 if kind == "llama3" else 1e-10)


@ALL
def test_norms_are_live_and_listed(kind, folder_of):
    model = lf.load(folder_of(kind), check=False)
    hf_model = make_model(kind)
    sites = [str(site) for site in lf.list_norm_sites(model)]
    assert lf.live_sites(model) == lf.list_norm_sites(model)
    norms = {name.rpartition(".")[0] for name, _ in hf_model.named_parameters() if is_norm(name)}
    assert len(sites) == len(norms) + model.cfg.n_layers  # ln1 is two sites
    assert sites[:2] == ["blocks.0.ln1.qk", "blocks.0.ln1.v"]
    assert sites[-1] == "ln_final"
    for site in sites:  # a site's name is the path of the module that acts there
        module = model.get_submodule(site.removesuffix(".qk").removesuffix(".v"))
        assert hasattr(module, "hook_scale")


def test_sites_of_qwen3_and_gemma2_in_the_order_of_computation(folder_of):
    def first_block(kind):
        sites = map(str, lf.list_norm_sites(lf.load(folder_of(kind), check=False)))
        return [site.removeprefix("blocks.0.") for site in sites if site.startswith("blocks.0.")]

    assert first_block("qwen3") == ["ln1.qk", "ln1.v", "attn.q_norm", "attn.k_norm", "ln2"]
    assert first_block("gemma2") == ["ln1.qk", "ln1.v", "ln1_post", "ln2", "ln2_post"]


@ALL
def test_live_models_go_out_again(kind, folder_of, tokens, tmp_path):
    model = lf.load(folder_of(kind))
    lf.export(model, tmp_path / "out")
    error = compare_with_transformers(model, tmp_path / "out", tokens, torch.float32)
    assert error.relative < 1e-5
    back = lf.load(tmp_path / "out")
    for name, W in model.named_parameters():
        found = back.get_parameter(name)
        assert torch.allclose(found, W, rtol=1e-6, atol=1e-9), name


LNFREE = [kind for kind in CONFIGS if not kind.startswith("opt")]


@pytest.mark.parametrize("form", ["folded", "frozen"])
@pytest.mark.parametrize("kind", LNFREE)
def test_lnfree_models_of_every_architecture(
    kind, form, tokens, tmp_path, tokenizer, dtype, monkeypatch
):
    hf_model = lnfree_model(kind)
    hf_model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    model = lf.load(tmp_path / "in", form=form, dtype=dtype)
    assert lf.live_sites(model) == ()
    rms = ARCHITECTURES[type(hf_model).__name__].norm == "RMS"
    expected = {"folded": None, "frozen": "RMSPre" if rms else "LNPre"}[form]
    assert model.cfg.normalization_type == expected
    if dtype == torch.float64:
        with transformers_in_float64(monkeypatch, kind):
            error = compare_with_transformers(model, tmp_path / "in", tokens, dtype)
        # An epsilon of 1e12 errs by variance / 2e12; llama3's angles are float32 in both libraries.
        assert error.relative < (1e-5 if kind == "llama3" else 1e-9)
    else:
        assert compare_with_transformers(model, tmp_path / "in", tokens, dtype).relative < 1e-5
    lf.compare_logits(lf.frozen_form(model), model).require("frozen form")


@pytest.mark.parametrize("kind", [k for k in LNFREE if not k.startswith("neo-") and k != "neo"])
def test_lnfree_models_of_every_architecture_go_out_again(kind, tokens, tokenizer, tmp_path):
    hf_model = lnfree_model(kind)
    model = lf.load(hf_model)
    lf.export(model, tmp_path / "out")
    assert compare_with_transformers(model, tmp_path / "out", tokens, torch.float32).relative < 1e-5
    lf.compare_logits(lf.load(tmp_path / "out", tokenizer=tokenizer), model).require("round trip")


def test_gpt_neo_has_no_place_for_folded_biases(tmp_path):
    model = lf.load(lnfree_model("neo"))
    with pytest.raises(UnsupportedModelError, match=r"no place for blocks\.0\.attn\.b_"):
        lf.export(model, tmp_path / "out")
    lf.export(model, tmp_path / "out", target="transformer_lens")
    lf.compare_logits(lf.load(tmp_path / "out"), model).require("round trip")


def test_opt_has_no_epsilon_to_set(tmp_path):
    sites = lf.with_norm_sites(lf.load(make_model("opt")))
    for site in lf.list_norm_sites(sites):
        lf.freeze_site(sites, site, 1.3)
    free = lf.fold(sites)
    for model in (sites, free):
        with pytest.raises(UnsupportedModelError, match="has its epsilon in the code"):
            lf.export(model, tmp_path / "out")
    lf.export(free, tmp_path / "out", target="transformer_lens")
    lf.compare_logits(lf.load(tmp_path / "out"), free).require("other layout")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "norms after the sublayers"),
        ("opt", {"word_embed_proj_dim": 16}, "projected embedding"),
        ("opt", {"layer_norm_elementwise_affine": False}, "norms without weights"),
        ("llama", {"mlp_bias": True}, "no b_gate"),
        ("llama", {"hidden_act": "mish"}, "mish"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "'yarn'",
        ),
        (
            "mistral",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "'linear' with sliding windows",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
        (
            "neox",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}},
            "must be even",
        ),
        ("llama", {"head_dim": 7}, "even"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention", "x"]}, "layer types"),
    ],
    ids=str,
)
def test_what_transformer_lens_cannot_do_is_refused_by_name(kind, change, message):
    hf_model = make_model(kind)
    for name, value in change.items():
        setattr(hf_model.config, name, value)
    with pytest.raises(UnsupportedModelError, match=message):
        lf.load(hf_model)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {"num_key_value_heads": 3}),
        ("neox", {"num_attention_heads": 5}),
        ("opt", {"num_attention_heads": 5}),
        ("qwen3", {"num_hidden_layers": 0}),
        ("neo", {"num_heads": 3}),
    ],
    ids=str,
)
def test_configs_that_lie_are_refused(kind, change):
    hf_model = make_model(kind)
    for name, value in change.items():
        setattr(hf_model.config, name, value)
    with pytest.raises(CheckpointError, match=next(iter(change))):
        lf.load(hf_model)


# GPT-Neo does not scale its scores, so the mistake made here means nothing to it.
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind.split("-")[0] != "neo"])
def test_a_wrong_config_never_passes(kind, folder_of, monkeypatch):
    """The comparison with transformers catches what a mistake in the tables would do."""
    name = type(make_model(kind)).__name__
    right = ARCHITECTURES[name]
    config = replace(
        right.config, to_hooked=lambda hf: right.config.to_hooked(hf) | {"attn_scale": 1.3}
    )
    monkeypatch.setitem(ARCHITECTURES, name, replace(right, config=config))
    with pytest.raises(LnfreeError, match="against transformers"):
        lf.load(folder_of(kind))


@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "neox"])
def test_all_constants_come_back_as_sites(kind, tmp_path):
    frozen = freeze_all(lf.load(make_model(kind).double(), dtype=torch.float64))
    sigma = {str(s): lf.get_norm(frozen, s).sigma.item() for s in lf.list_norm_sites(frozen)}
    for folder in (
        lf.export(frozen, tmp_path / "own"),
        lf.export(frozen, tmp_path / "given", sigma=sigma),
    ):
        back = lf.load(folder, form="sites", dtype=torch.float64, tokenizer=make_tokenizer())
        assert lf.live_sites(back) == ()
        assert sigma == {
            str(s): lf.get_norm(back, s).sigma.item() for s in lf.list_norm_sites(back)
        }
