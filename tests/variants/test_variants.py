"""Architectures that vary norms: what keeps the function, what folds, what is exact on them."""

import itertools
import json
import math

import pytest
import torch
from support.loaded import live_model
from support.models import freeze_all
from support.typechecking import TypeCheckError

import lnfree_interp as lf
from lnfree_interp.checkpoints.exporting import best_target
from lnfree_interp.checkpoints.loading import saved_live_sites
from lnfree_interp.errors import (
    CheckpointError,
    DataError,
    InexactError,
    NormSiteError,
    UnsupportedModelError,
)
from lnfree_interp.models import folding, forms
from lnfree_interp.models.inserting import set_map, set_scaler, varied
from lnfree_interp.models.maps import MAPS
from lnfree_interp.models.norms import describe
from lnfree_interp.removal.training_state import fingerprint

PROMPT = [7, 4, 9, 31, 2, 15]
KINDS = ["gpt2", "llama-grouped"]


def normformer_behind(model):
    return lf.to_normformer(model, head_scale="after W_O")


def scaled_by_heads(model):
    return lf.to_normformer(model, attn_norm=False, mlp_norm=False, resid_scale=False)


def crms(model):
    return lf.to_map(model, "CRMSNorm", bias=False)


EVERY = [
    lf.to_normformer, normformer_behind, scaled_by_heads, lf.to_sub_ln, lf.to_peri_ln,
    lf.to_layernorm_scaling, lf.to_dyt, lf.to_derf, crms,
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def stock(request):
    """LayerNorm and learned positions; RMSNorm, rotary, grouped queries and gated MLPs."""
    return live_model(request.param)


def random(model, seed=0):
    """Every gain, bias, alpha and factor of the norms away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    scalers = lf.list_scalers(model)
    for name in [*map(str, lf.list_norm_sites(model)), *scalers]:
        for W in model.get_submodule(name).parameters():
            noise = torch.randn(W.shape, generator=generator, dtype=W.dtype)
            W.data.add_(0.2 * noise if W.numel() > 1 else 0.05 * noise.abs())
    return model


@pytest.fixture(params=EVERY, ids=lambda make: make.__name__)
def variant(request, stock):
    return random(request.param(stock).model)


def test_a_variant_is_the_same_function_exactly_where_it_says_so(stock):
    for make in EVERY:
        found = make(stock)
        assert found.same_function == (found.error.relative < 1e-12), found
        before, after = found.parameters
        assert (after < before) == (make is crms and stock.cfg.normalization_type == "LN"), found
        assert found.name in repr(found)
        assert found.name in str(found)


def test_frozen_it_folds_to_a_stock_model(variant):
    frozen = freeze_all(variant)
    folded = lf.fold(frozen)
    assert type(folded).__module__.startswith("transformer_lens")
    assert all("lnfree" not in type(module).__module__ for module in folded.modules())
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(3))
    for made in (folded, lf.frozen_form(frozen)):
        assert lf.compare_logits(made, frozen, tokens).relative < 1e-12


@pytest.mark.parametrize("by", ["head", "neuron", "source"])
def test_the_sum_over_parts_is_exact_through_frozen_norms_inside(variant, by):
    frozen = freeze_all(variant)
    if any("resid_scale" in name for name in lf.list_scalers(frozen)):
        with pytest.raises(UnsupportedModelError, match="resid_scale in blocks 0 to 2"):
            lf.attribute_logits(frozen, PROMPT, 5)
        frozen = lf.fold(frozen)
    found = lf.attribute_logits(frozen, PROMPT, 5, 3, by=by).verify(1e-12)
    if frozen.cfg.normalization_type is not None:
        folded = lf.attribute_logits(lf.fold(frozen), PROMPT, 5, 3, by=by)
        same = dict(zip(folded.labels, folded.values, strict=True))
        for label, value in zip(found.labels, found.values, strict=True):
            if label not in ("ln_final.b", "b_U"):  # the fold moves the one into the other
                torch.testing.assert_close(value, same[label], rtol=1e-9, atol=1e-11)


def test_every_place_of_the_fold_counts(stock, monkeypatch):
    """Without one place in the table of what stands around a weight, the fold is wrong."""
    frozen = {
        make: freeze_all(random(make(stock).model))
        for make in (lf.to_normformer, normformer_behind, lf.to_sub_ln, lf.to_peri_ln)
    }
    uses = {
        "attn.head_scale": lf.to_normformer,
        "attn.chunk_scale": normformer_behind,
        "mlp.inner": lf.to_sub_ln,
        "attn.inner": lf.to_sub_ln,
        "ln1_post": lf.to_peri_ln,
        "ln2_post": lf.to_peri_ln,
    }
    for table in ("_BEFORE", "_AFTER"):
        right = getattr(folding, table)
        for leaf, kinds in right.items():
            for kind in kinds:
                if kind not in uses:
                    continue
                others = tuple(one for one in kinds if one != kind)
                monkeypatch.setattr(folding, table, right | {leaf: others})
                with pytest.raises(InexactError, match="folded against the given"):
                    lf.fold(frozen[uses[kind]])
                monkeypatch.setattr(folding, table, right)
    right = folding.residual_gauge
    for layer in range(3):

        def wrong(norms, n_layers, layer=layer):
            return right({n: m for n, m in norms.items() if f"{layer}.resid" not in n}, n_layers)

        monkeypatch.setattr(forms, "residual_gauge", wrong)
        with pytest.raises(InexactError, match="folded against the given"):
            lf.fold(frozen[lf.to_normformer])


# LayerNorm Scaling


def test_layernorm_scaling_is_pre_ln_with_smaller_gains_and_biases(stock):
    scaled = lf.to_layernorm_scaling(stock, keep_function=False)
    assert not scaled.same_function
    by_hand = lf.with_norm_sites(stock)
    for layer, block in enumerate(by_hand.blocks):
        for norm in (block.ln1.qk, block.ln2):
            for W in (norm.w, norm.b):
                if W is not None:
                    W.data.div_(math.sqrt(layer + 1))
    assert lf.compare_logits(scaled.model, by_hand).relative < 1e-12
    assert lf.compare_logits(scaled.model, stock).relative > 1e-3
    kept = lf.to_layernorm_scaling(stock).model
    found = describe(lf.get_norm(kept, "blocks.2.ln2"))
    torch.testing.assert_close(found.factor, 1 / math.sqrt(3))
    assert describe(lf.get_norm(kept, "ln_final")).factor == 1


# NormFormer


def test_both_places_of_head_factors_agree_at_first_and_differ_after_one_step(stock):
    before, behind = lf.to_normformer(stock).model, normformer_behind(stock).model
    assert lf.compare_logits(before, behind).relative < 1e-13
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))
    for model in (before, behind):
        factors = [model.get_submodule(name).w for name in lf.list_scalers(model) if "attn" in name]
        optimizer = torch.optim.SGD(factors, lr=0.1)
        model(tokens, return_type="loss").backward()
        optimizer.step()
    assert lf.compare_logits(before, behind).relative > 1e-4


def test_a_factor_of_a_head_multiplies_what_it_writes(stock):
    model = scaled_by_heads(stock).model
    head = lf.trace(model, PROMPT, hold=True).attribute(lf.Logit(5), by="head")
    model.blocks[2].attn.head_scale.w.data[1] = 3.0
    tripled = lf.trace(model, PROMPT, hold=True).attribute(lf.Logit(5), by="head")
    assert head.labels == tripled.labels
    at = head.labels.index("L2H1")
    # The final norm is held, so directions and not scales are compared.
    ratio = tripled.values[at] / head.values[at]
    others = [i for i, label in enumerate(head.labels) if label.startswith("L2H") and i != at]
    kept = tripled.values[others[0]] / head.values[others[0]]
    torch.testing.assert_close(ratio / kept, torch.full_like(ratio, 3.0), rtol=1e-9, atol=0)


def test_a_channel_that_ends_cannot_fold(stock):
    frozen = freeze_all(lf.to_normformer(stock).model)
    frozen.blocks[1].resid_scale.w.data[4] = 0
    with pytest.raises(NormSiteError, match=r"blocks\.1\.resid_scale multiplies 1 channels"):
        lf.fold(frozen)


# Magneto


def test_magneto_enlarges_exactly_its_tensors(stock):
    variant = lf.to_sub_ln(stock, initialise=True).model
    plain = dict(lf.to_sub_ln(stock).model.named_parameters())
    gain = math.sqrt(math.log(2 * stock.cfg.n_layers))
    grouped = stock.cfg.n_key_value_heads is not None
    enlarged = set()
    for name, W in variant.named_parameters():
        if torch.equal(W, plain[name]):
            continue
        torch.testing.assert_close(W, gain * plain[name])
        enlarged.add(name.split(".", 2)[2])
    value = "attn._W_V" if grouped else "attn.W_V"
    first = "mlp.W_gate" if stock.cfg.gated_mlp else "mlp.W_in"  # fc1: what the function reads
    assert enlarged == {value, "attn.W_O", first, "mlp.W_out"}


def test_magneto_starts_as_large_in_deep_models():
    """Without the shrinking of GPT-2: W_O and W_out as large as W_V, both times the gain."""
    like = live_model("gpt2", torch.float32)
    for n_layers in (2, 8):
        new = lf.untrained(like, n_layers=n_layers, scaled=False)
        lf.magneto_init(new)
        gain = math.sqrt(math.log(2 * n_layers))
        for W in (new.W_O, new.W_out, new.W_V, new.W_in):
            assert W.std().item() == pytest.approx(0.02 * gain, rel=0.05)
        assert new.W_Q.std().item() == pytest.approx(0.02, rel=0.05)
        shrunk = lf.untrained(like, n_layers=n_layers)
        assert shrunk.W_O.std().item() == pytest.approx(0.02 / math.sqrt(2 * n_layers), rel=0.05)


def test_norms_are_scaled_by_depth_once(stock):
    once = lf.to_layernorm_scaling(stock, keep_function=False).model
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.ln1\.qk is multiplied by 0.7071"):
        lf.to_layernorm_scaling(once, keep_function=False)


# Curves


@pytest.mark.parametrize("name", ["DyT", "Derf"])
def test_a_curve_goes_to_the_identity_with_the_square_of_alpha(stock, name):
    """(1/alpha) tanh(alpha x) = x - alpha^2 x^3 / 3 + ...; erf alike, with its own slope."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    slope = {"DyT": 1.0, "Derf": 2 / math.sqrt(math.pi)}[name]
    errors = []
    for alpha in (0.02, 0.01, 0.005):
        curve = MAPS[name](0.0).double()
        curve.alpha.data.fill_(alpha)
        errors.append((curve(x) / (slope * alpha) - x).abs().max().item())
        assert errors[-1] <= alpha**2 * 8 / 3 * 1.001
    for large, small in itertools.pairwise(errors):
        assert large / small == pytest.approx(4, rel=0.01)


def test_a_frozen_curve_divides_by_what_the_curve_divides_by_on_average(stock):
    model = lf.to_dyt(stock, alpha=0.01).model
    norm = lf.get_norm(model, "blocks.1.ln2")
    x = torch.randn(2, 5, stock.cfg.d_model, dtype=torch.float64)
    torch.testing.assert_close(norm.token_sigma(x), torch.full((2, 5, 1), 100.0).double(),
                               rtol=1e-3, atol=0)  # fmt: skip
    live = norm(x)
    norm.freeze(100.0)
    torch.testing.assert_close(norm(x), live, rtol=0.01, atol=1e-4)
    norm.freeze(100.0, gate=0.5)
    half = norm(x)
    found = describe(norm)
    assert found.pointwise
    assert not found.affine
    norm.freeze(100.0)
    torch.testing.assert_close(half, 0.5 * live + 0.5 * norm(x), rtol=1e-10, atol=1e-12)


def test_a_frozen_curve_has_the_slope_of_the_curve_not_its_height():
    """At a shift of 1 erf is 0.84 where x is 0, and nearly flat."""
    curve = MAPS["Derf"](0.0).double()
    curve.alpha.data.fill_(0.01)
    curve.shift.data.fill_(1.0)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = 0.01 * 2 / math.sqrt(math.pi) * math.exp(-1)
    torch.testing.assert_close(curve.scale(x), torch.full((3, 1), 1 / slope).double(),
                               rtol=0.05, atol=0)  # fmt: skip


def test_alpha_from_text_comes_nearer_to_the_model(stock):
    text = torch.randint(300, (4, 24), generator=torch.Generator().manual_seed(2))
    plain, measured = lf.to_dyt(stock), lf.to_dyt(stock, tokens=text)
    assert measured.error.absolute < plain.error.absolute
    assert "mean scales" in str(measured)
    by_kind = lf.to_dyt(stock, alpha={"ln1": 0.8, "ln2": 0.2, "ln_final": 0.3}).model
    assert lf.get_norm(by_kind, "blocks.1.ln1.v").map.alpha.item() == pytest.approx(0.8)
    for wrong in ({"ln1": 0.8}, -1.0, float("nan")):
        with pytest.raises(DataError, match="alpha"):
            lf.to_dyt(stock, alpha=wrong)


def test_a_live_curve_is_refused_by_name(stock):
    with pytest.raises(UnsupportedModelError, match="ln_final bends each entry by a curve"):
        lf.attribute_logits(lf.to_dyt(stock).model, PROMPT, 5)


@pytest.mark.parametrize("make", [lf.to_dyt, lf.to_derf])
def test_curves_are_frozen_for_a_question(stock, make):
    """Those that it reads through; the others stay live, and a trace of everything stands."""
    model = make(stock).model
    text = torch.randint(300, (8, 12), generator=torch.Generator().manual_seed(2))
    asked = lf.norms_read(model, PROMPT, lf.Neuron(1, 3))
    assert list(map(str, asked)) == ["blocks.1.ln2"]
    frozen = lf.freeze_for(model, lf.Logit(5), text, progress=False).model
    assert len(lf.live_sites(frozen)) == len(lf.list_norm_sites(frozen)) - 1
    for trace in (lf.trace(frozen, PROMPT), lf.trace(frozen, PROMPT, keep="asked")):
        lf.attribute(trace, lf.Logit(5), by="neuron").verify(1e-10)
        with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.ln2 bends each entry"):
            lf.attribute(trace, lf.Neuron(1, 3))
    held = lf.trace(frozen, PROMPT, hold=True)  # and so is what cannot be held
    for ask in (lambda: lf.attribute(held, lf.Neuron(1, 3)), lambda: lf.expand_paths(held, 5),
                lambda: lf.affine_map(held, lf.Logit(5))):  # fmt: skip
        with pytest.raises(UnsupportedModelError, match="bends each entry"):
            ask()
    for ask, still in ((lf.expand_paths, {"ln1.qk", "ln2"}), (lf.flow_graph, {"ln1.qk"})):
        exact = lf.freeze_for(model, lambda trace, ask=ask: ask(trace, 5), text, progress=False)
        assert {site.kind for site in lf.live_sites(exact.model)} == still
        ask(exact.model, PROMPT, 5).verify(1e-10)


# Every map at every site


@pytest.mark.parametrize("name", MAPS)
def test_every_map_freezes_at_every_site(stock, name):
    model = lf.to_map(stock, name).model
    for kind in folding.WITHIN:
        for layer in range(3):
            set_map(model, f"blocks.{layer}.{kind}", name)
    sites = lf.list_norm_sites(model)
    assert len(sites) == 3 * 7 + 1
    assert lf.live_sites(model) == sites
    frozen = freeze_all(random(model))
    assert lf.live_sites(frozen) == ()
    lf.attribute_logits(frozen, PROMPT, 5, by="neuron").verify(1e-10)
    assert lf.compare_logits(lf.fold(frozen), frozen).relative < 1e-12


def test_live_norms_inside_are_refused_by_name(stock):
    with pytest.raises(UnsupportedModelError, match=r"attn\.inner in blocks 0 to 2 and mlp\.inner"):
        lf.attribute_logits(lf.to_sub_ln(stock).model, PROMPT, 5)


def test_attention_by_torch_or_by_hand_is_the_same_with_norms_inside(variant):
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = variant(tokens)
    _, cache = variant.run_with_cache(tokens)
    watched = variant.run_with_hooks(
        tokens, fwd_hooks=[("blocks.0.attn.hook_pattern", lambda x, hook: x)]
    )
    torch.testing.assert_close(watched, logits)
    total = cache["blocks.2.hook_resid_mid"] - cache["blocks.2.hook_resid_pre"]
    torch.testing.assert_close(total, cache["blocks.2.hook_attn_out"])


# Wrong requests


def test_places_and_maps_that_do_not_exist_are_refused(stock):
    sited = lf.with_norm_sites(stock)
    for name in ("blocks.3.attn.inner", "blocks.0.attn.outer", "ln_first"):
        with pytest.raises(NormSiteError):
            set_map(sited, name, "LayerNorm")
    with pytest.raises(NormSiteError, match="'BatchNorm' is no norm"):
        set_map(sited, "ln_final", "BatchNorm")
    for name in ("blocks.3.resid_scale", "blocks.x.resid_scale", "blocks.0.ln2"):
        with pytest.raises(NormSiteError, match="no place for factors"):
            set_scaler(sited, name)
    with pytest.raises(NormSiteError, match="with_norm_sites"):
        set_map(stock, "ln_final", "RMSNorm")
    with pytest.raises((UnsupportedModelError, TypeCheckError), match="head_scale"):
        lf.to_normformer(stock, head_scale="nowhere")
    with pytest.raises(UnsupportedModelError, match="'BatchNorm'"):
        lf.to_map(stock, "BatchNorm")
    with pytest.raises(UnsupportedModelError, match="nothing of NormFormer"):
        lf.to_normformer(stock, attn_norm=False, mlp_norm=False, head_scale=None, resid_scale=False)


def test_parallel_blocks_have_no_normformer():
    model = live_model("neox")
    with pytest.raises(UnsupportedModelError, match="does not follow the attention"):
        lf.to_normformer(model)
    for make in (lf.to_sub_ln, lf.to_peri_ln, lf.to_dyt):
        frozen = freeze_all(random(make(model).model))
        lf.attribute_logits(frozen, PROMPT, 5, by="head").verify(1e-12)


# Files


def test_a_variant_survives_a_folder(variant, tmp_path):
    for i, model in enumerate((variant, freeze_all(variant))):
        folder = tmp_path / str(i)
        lf.export(model, folder, target="transformer_lens")
        again = lf.load(folder, dtype=torch.float64)
        assert lf.compare_logits(again, model).absolute == 0
        assert lf.list_norm_sites(again) == lf.list_norm_sites(model)
        assert lf.list_scalers(again) == lf.list_scalers(model)
        assert lf.live_sites(again) == lf.live_sites(model)


def test_transformers_classes_that_cannot_hold_it_are_refused(variant, tmp_path):
    with pytest.raises(UnsupportedModelError, match="transformers has no class for"):
        lf.export(variant, tmp_path / "out", target="transformers")
    assert best_target(variant) == "transformer_lens"


def test_a_damaged_layout_is_refused(stock, tmp_path):
    lf.export(lf.to_dyt(stock).model, tmp_path / "out", target="transformer_lens")
    file = tmp_path / "out" / "hooked_transformer.json"
    content = json.loads(file.read_text())
    wrong = {
        "BatchNorm": lambda layout: layout["ln_final"].update(map="BatchNorm"),
        "attn.outer": lambda layout: layout.update({"blocks.0.attn.outer": layout["ln_final"]}),
        "ln_final": lambda layout: layout.pop("ln_final"),
        "shift": lambda layout: layout["ln_final"].update(map="Derf"),
        "blocks.7": lambda layout: layout.update({"blocks.7.resid_scale": {"factors": 3}}),
    }
    for said, damage in wrong.items():
        changed = json.loads(json.dumps(content))
        damage(changed["layout"])
        file.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=said):
            lf.load(tmp_path / "out")


# Removal


def test_norms_of_variants_can_be_removed(variant):
    data = torch.randint(2, 300, (16, 16), generator=torch.Generator().manual_seed(5))
    n = len(lf.list_norm_sites(variant))
    events = lf.recipes.at_once(variant, steps=4).events
    assert len(events) == n
    recipe = lf.Recipe(
        events=tuple(lf.Event(1, event.site) for event in events), steps=3, batch=2, micro_batch=2,
        lr=1e-6, warmup=0, final_lr=1.0, distillation=1.0, precision="float32",
        guard=lf.Guard(above_best=1e3, sigma_factor=1e9),
    )  # fmt: skip
    run = lf.remove_norms(variant, recipe, data, progress=False, log_every=0)
    assert lf.live_sites(run.model) == ()
    lf.fold(run.model)


def test_what_could_not_be_folded_is_refused_before_it_is_removed():
    """The gate of a gated MLP has no bias to hold that of the norm before it."""
    gated = live_model("llama-grouped", torch.float32)
    biased = lf.to_map(gated, "LayerNorm", bias=True).model
    data = torch.randint(2, 300, (16, 16), generator=torch.Generator().manual_seed(5))
    recipe = lf.recipes.at_once(biased, steps=4)
    with pytest.raises(NormSiteError, match=r"blocks\.0\.ln2 has a bias and stands before a gated"):
        lf.remove_norms(biased, recipe, data, progress=False)
    for site in lf.list_norm_sites(biased):
        lf.freeze_site(biased, site, 2.0)
    for finish in (lf.fold, lf.frozen_form):
        with pytest.raises(NormSiteError, match=r"blocks\.0\.ln2 has a bias and stands before"):
            finish(biased)
    plain = lf.to_map(gated, "LayerNorm", bias=False).model
    for site in lf.list_norm_sites(plain):
        lf.freeze_site(plain, site, 2.0)
    lf.compare_logits(lf.fold(plain), plain).require("folded")


def test_curves_are_not_fitted_to_tokens_of_another_model(stock):
    with pytest.raises(DataError, match="tokenized for another model"):
        lf.to_dyt(stock, tokens=torch.full((2, 8), 10**6))


def test_all_that_a_variant_adds_is_trained(variant):
    data = torch.randint(2, 300, (16, 16), generator=torch.Generator().manual_seed(5))
    recipe = lf.Recipe(
        events=(), steps=2, batch=4, micro_batch=4, lr=1e-2, warmup=0, final_lr=1.0,
        distillation=0.0, precision="float32",
    )  # fmt: skip
    run = lf.remove_norms(variant, recipe, data, progress=False, log_every=0)
    after = dict(run.model.named_parameters())
    own = (*map(str, lf.list_norm_sites(variant)), *lf.list_scalers(variant))
    still = [
        name
        for name, W in variant.named_parameters()
        if name.startswith(own) and torch.equal(W, after[name])
    ]
    assert still == []


def test_first_tokens_are_not_apart_where_no_form_could_keep_them(stock):
    model = lf.to_sub_ln(stock).model
    text = torch.randint(2, 300, (4, 16), generator=torch.Generator().manual_seed(5))
    frozen = lf.freeze_for(model, lf.list_norm_sites(model), text, progress=False).model
    apart = {
        name for name in map(str, lf.list_norm_sites(frozen)) if lf.get_norm(frozen, name).first
    }
    assert apart == {name for name in map(str, lf.list_norm_sites(frozen)) if "inner" not in name}
    lf.attribute_next_tokens(frozen, text[:1], by="head").verify(1e-10)
    lf.frozen_form(frozen)
    lf.freeze_site(frozen, "blocks.1.attn.inner", 1.0, first=2.0)
    with pytest.raises(UnsupportedModelError, match=r"first tokens at blocks\.1\.attn\.inner"):
        lf.attribute_logits(frozen, PROMPT, 5)
    with pytest.raises(NormSiteError, match=r"blocks\.1\.attn\.inner divides first tokens"):
        lf.fold(frozen)


def test_the_command_line_removes_the_norms_that_a_folder_has(variant, tmp_path):
    lf.export(variant, tmp_path / "out", target="transformer_lens")
    assert saved_live_sites(tmp_path / "out") == lf.list_norm_sites(variant)
    lf.freeze_site(variant, "blocks.1.ln2", 2.0)
    lf.export(variant, tmp_path / "partly", target="transformer_lens")
    assert saved_live_sites(tmp_path / "partly") == lf.live_sites(variant)


@pytest.mark.parametrize("change", [{"name": "DyT"}, {"factor": 0.5}, {"bias": None}])
def test_another_final_norm_is_another_architecture(stock, tmp_path, change):
    model = lf.with_norm_sites(stock)
    kind = "LayerNorm" if stock.cfg.normalization_type == "LN" else "RMSNorm"
    set_map(model, "ln_final", **({"name": kind} | change))
    expected = None if change == {"bias": None} else "ln_final is "
    assert (varied(model) or "").startswith(expected or "")
    assert bool(varied(model)) == bool(expected)
    lf.export(model, tmp_path / "out", target="transformer_lens")
    assert lf.compare_logits(lf.load(tmp_path / "out", dtype=torch.float64), model).absolute == 0


def test_a_run_of_another_architecture_is_another_run(stock):
    plain = lf.with_norm_sites(stock)
    for make in (lf.to_layernorm_scaling, lf.to_dyt, crms):
        other = make(stock).model
        other.load_state_dict(plain.state_dict(), strict=False)
        assert fingerprint(other) != fingerprint(plain)


def test_both_halves_of_ln1_share_a_new_bias(stock):
    model = lf.with_norm_sites(stock)
    kind = "LayerNorm" if stock.cfg.normalization_type == "LN" else "RMSNorm"
    for name in (kind, "DyT", "DyT"):
        set_map(model, "blocks.0.ln1.qk", name, bias=True)
        ln1 = model.blocks[0].ln1
        assert ln1.qk.b is not None
        assert ln1.qk.b is ln1.v.b
        set_map(model, "blocks.0.ln1.v", name, bias=False)
        assert ln1.qk.b is None
        assert ln1.v.b is None


def test_what_a_map_has_learned_stays(stock):
    curved = lf.to_dyt(stock, alpha=0.8).model
    assert lf.to_layernorm_scaling(curved).same_function
    frozen = freeze_all(stock)
    scaled = lf.to_layernorm_scaling(frozen)
    assert scaled.same_function
    assert lf.live_sites(scaled.model) == ()
    for make in (lf.to_normformer, lf.to_sub_ln, lf.to_peri_ln, scaled_by_heads):
        with pytest.raises(UnsupportedModelError, match="already"):
            make(make(stock).model)
    with pytest.raises(DataError, match="ln3"):
        lf.to_dyt(stock, alpha={"ln1": 0.8, "ln2": 0.2, "ln_final": 0.3, "ln3": 1.0})
