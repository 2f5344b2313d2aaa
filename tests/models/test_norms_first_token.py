"""Norms that divide the first token of a prompt by a constant of its own.

The reference is TransformerLens' own model with live norms, whose `hook_scale` is replaced by the
constants, written out here.
"""

import copy
import re

import pytest
import torch
from support.architectures import make_model
from support.loaded import frozen_model
from support.models import make_gpt2, make_tokenizer
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

import lnfree_interp as lf
from lnfree_interp.errors import NormSiteError, UnsupportedModelError
from lnfree_interp.models.first_token import first_tokens, telling

KINDS = ["gpt2", "neox", "neo", "llama-grouped", "mistral", "qwen2"]
TOKENS = torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(3))


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def constants(model):
    """A constant for most tokens and one for the first, by norm of the stock model."""
    generator = torch.Generator().manual_seed(5)
    names = dict.fromkeys(re.sub(r"\.(qk|v)$", "", str(site)) for site in lf.list_norm_sites(model))
    return {name: (0.5 + 2 * torch.rand(2, generator=generator)).tolist() for name in names}


def made(kind, form="sites", **config):
    """The live model, and the one with two constants at every norm."""
    given = make_gpt2(**config) if kind == "gpt2" else make_model(kind, **config)
    live = lf.load(given, tokenizer=make_tokenizer(), dtype=torch.float64, check=False)
    sites = lf.with_norm_sites(live)
    for name, (sigma, first) in constants(live).items():
        for half in (f"{name}.qk", f"{name}.v") if name.endswith("ln1") else (name,):
            lf.freeze_site(sites, half, sigma, first=first)
    return live, sites if form == "sites" else lf.frozen_form(sites)


def reference(live, tokens, firsts=None):
    """The logits of the live model with its scales replaced."""
    first = torch.zeros(*tokens.shape, 1, dtype=torch.bool)
    rows = torch.arange(len(tokens))
    first[rows, torch.zeros_like(rows) if firsts is None else firsts] = True

    def replacing(sigma, own):
        return lambda scale, hook: torch.where(first, own, sigma).to(scale).expand_as(scale)

    hooks = [(f"{n}.hook_scale", replacing(*both)) for n, both in constants(live).items()]
    return live.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("form", ["sites", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_the_live_model_with_its_scales_replaced(kind, form):
    live, model = made(kind, form)
    close(model(TOKENS), reference(live, TOKENS))
    one = lf.compare_logits(model, live, TOKENS).relative
    assert one > 1e-3  # it is another function


@pytest.mark.parametrize("form", ["sites", "frozen"])
def test_hook_scale_says_what_each_token_is_divided_by(form):
    live, model = made("gpt2", form)
    sigma, first = constants(live)["blocks.1.ln2"]
    scale = model.run_with_cache(TOKENS)[1]["blocks.1.ln2.hook_scale"]
    assert scale.shape == (3, 12, 1)
    close(scale[:, 0], torch.full((3, 1), first, dtype=torch.float64))
    close(scale[:, 1:], torch.full((3, 11, 1), sigma, dtype=torch.float64))


@pytest.mark.parametrize("form", ["sites", "frozen"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
def test_the_first_token_is_the_first_that_is_not_masked(kind, form):
    _, model = made(kind, form)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = mask[2, :1] = 0
    found = model(TOKENS, attention_mask=mask)
    for row, start in enumerate([4, 0, 1]):
        close(found[row, start:], model(TOKENS[[row], start:])[0])
    close(model(TOKENS), found.new_tensor(model(TOKENS).tolist()))  # nothing stays behind


@pytest.mark.parametrize("form", ["sites", "frozen"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
def test_a_pass_that_continues_another_has_no_first_token(kind, form):
    _, model = made(kind, form)
    whole = model(TOKENS[:1])
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)
    pieces = [model(part, past_kv_cache=cache) for part in TOKENS[:1].split([5, 1, 6], dim=1)]
    close(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("form", ["sites", "frozen"])
def test_text_is_generated_alike_with_and_without_a_cache(form):
    _, model = made("gpt2", form)
    settings = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False}
    settings |= {"return_type": "tokens", "prepend_bos": False}
    with_cache = model.generate(TOKENS[:1, :4], use_past_kv_cache=True, **settings)
    without = model.generate(TOKENS[:1, :4], use_past_kv_cache=False, **settings)
    assert with_cache.tolist() == without.tolist()
    assert with_cache.shape == (1, 12)


def test_an_error_inside_a_block_leaves_no_first_token_behind():
    _, model = made("gpt2")
    mask = torch.ones_like(TOKENS)
    mask[:, :4] = 0
    expected = model(TOKENS)

    def fail(x, hook):
        raise RuntimeError("stop")

    hooks = [("blocks.1.ln2.hook_scale", fail)]
    with pytest.raises(RuntimeError, match="stop"):
        model.run_with_hooks(TOKENS, attention_mask=mask, fwd_hooks=hooks)
    close(model(TOKENS), expected)


@pytest.mark.parametrize("setting", ["use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"])
def test_inputs_with_a_dimension_of_heads(setting):
    live, model = made("gpt2")
    getattr(model, f"set_{setting}")(True)
    close(model(TOKENS), reference(live, TOKENS))


def test_transformerlens_tools_are_exact_on_the_frozen_form():
    _, model = made("gpt2", "frozen")
    logits, cache = model.run_with_cache(TOKENS)
    for pos in (0, 1, -1):
        resid = cache.decompose_resid(pos_slice=pos, apply_ln=True)
        attrs = cache.logit_attrs(cache.decompose_resid(pos_slice=pos), 7, pos_slice=pos)
        close(attrs.sum(0) + model.b_U[7], logits[:, pos, 7])
        close(resid.sum(0) @ model.W_U + model.b_U, logits[:, pos])
    last = cache.accumulated_resid(apply_ln=True)[-1]
    close(last @ model.W_U + model.b_U, logits)


@pytest.mark.parametrize("form", ["sites", "frozen"])
def test_a_model_is_saved_and_loaded_with_both_constants(form, tmp_path):
    _, model = made("gpt2", form)
    folder = lf.export(model, tmp_path / "model", target="transformer_lens")
    back = lf.load(folder, dtype=torch.float64)
    close(back(TOKENS), model(TOKENS))
    assert lf.list_norm_sites(back) == lf.list_norm_sites(model)
    sidecar = lf.formats.read_sidecar(folder)
    assert sidecar.sigma_first.keys() == sidecar.sigma.keys()
    assert sidecar.sigma_first["ln_final"] == constants(model)["ln_final"][1]
    assert "first token" in (folder / "README.md").read_text()


def test_some_norms_frozen_and_some_live_are_saved_and_loaded(tmp_path):
    live, _ = made("llama-grouped")
    model = lf.with_norm_sites(live)
    lf.freeze_site(model, "ln_final", 1.5, first=3.0)
    lf.freeze_site(model, "blocks.1.ln1.qk", 0.7)
    with pytest.raises(NormSiteError, match="norm sites are live"):
        lf.export(model, tmp_path / "no")
    folder = lf.export(model, tmp_path / "model", target="transformer_lens")
    back = lf.load(folder, dtype=torch.float64)
    close(back(TOKENS), model(TOKENS))
    assert lf.live_sites(back) == lf.live_sites(model)
    assert lf.formats.read_sidecar(folder).form == "partial"
    with pytest.raises(NormSiteError, match="still live"):
        lf.load(folder, form="frozen")


def test_what_cannot_hold_two_constants_refuses_by_name(tmp_path):
    _, model = made("gpt2")
    with pytest.raises(NormSiteError, match=r"blocks\.0\.ln1\.qk.*frozen_form"):
        lf.fold(model)
    with pytest.raises(NormSiteError, match="frozen_form"):
        lf.fold(lf.frozen_form(model))
    for form in (model, lf.frozen_form(model)):
        with pytest.raises(UnsupportedModelError, match="first token"):
            lf.export(form, tmp_path / "hf")
    lf.freeze_site(model, "blocks.0.ln1.qk", 1.0, first=5.0)
    with pytest.raises(NormSiteError, match=r"halves of blocks\.0\.ln1"):
        lf.frozen_form(model)


def test_norms_behind_a_weight_keep_one_constant_in_the_frozen_form():
    model = frozen_model("qwen3")
    lf.freeze_site(model, "blocks.1.attn.k_norm", 1.0, first=2.0)
    with pytest.raises(NormSiteError, match=r"blocks\.1\.attn\.k_norm.*stands behind a weight"):
        lf.frozen_form(model)


def test_frozen_form_with_other_constants_is_the_same_function():
    _, model = made("neox")
    shown = lf.frozen_form(model, sigma={"ln_final": 9.0, "blocks.1.ln1": 3.0})
    close(shown(TOKENS), model(TOKENS))
    assert lf.list_norm_sites(shown)
    assert isinstance(shown, HookedTransformer)


@pytest.mark.parametrize("form", ["sites", "frozen"])
def test_copies_and_casts_keep_both_constants(form):
    live, model = made("gpt2", form)
    copied = copy.deepcopy(model)
    close(copied(TOKENS), model(TOKENS))
    half = copy.deepcopy(model).to(torch.float32)
    close(half(TOKENS).double(), model(TOKENS), 1e-4)
    sigma, first = constants(live)["ln_final"]
    assert (half.ln_final.constant, half.ln_final.first) == (sigma, first)


def test_a_constant_that_is_not_positive_is_refused():
    _, model = made("gpt2")
    for first in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(NormSiteError, match="positive and finite"):
            lf.freeze_site(model, "ln_final", 1.0, first=first)
    assert lf.get_norm(model, "ln_final").first == constants(model)["ln_final"][1]


def test_a_stream_without_positions_is_refused():
    with pytest.raises(NormSiteError, match="does not say where"):
        first_tokens(torch.zeros(4, 8))
    told = torch.tensor([[False, True]])
    with telling(told):
        assert first_tokens(torch.zeros(1, 2, 3, 8)).flatten().tolist() == [False, True]
    assert first_tokens(torch.zeros(1, 2, 8)).flatten().tolist() == [True, False]
