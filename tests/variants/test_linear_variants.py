"""Models with linear attention: trained, freed of their norms, saved and loaded."""

from dataclasses import replace

import pytest
import torch
from support.loaded import live_model
from support.models import freeze_all

import lnfree_interp as lf
from lnfree_interp.errors import LnfreeError, NormSiteError, UnsupportedModelError
from lnfree_interp.models.inserting import layout_of


def hybrid(kind="gpt2", dtype=torch.float64, **settings):
    return lf.to_linear_attention(live_model(kind, dtype), [0, 2], **settings).model


def text(model, sequences=12, pos=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(model.cfg.d_vocab, (sequences, pos), generator=generator)


def test_a_variant_says_what_it_is():
    variant = lf.to_linear_attention(live_model("gpt2"), [0, 2], divide_by="count")
    assert not variant.same_function
    assert variant.error.relative > 1e-3
    assert variant.parameters[0] == variant.parameters[1]
    assert "linear attention in blocks 0, 2: elu features, divided by their count" in str(variant)


@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
@pytest.mark.parametrize("state", ["live", "partial", "frozen"])
def test_a_folder_gives_back_the_model_bit_for_bit(kind, state, tmp_path):
    model = hybrid(kind, divide_by="count", feature_map="softmax")
    if state == "frozen":
        model = freeze_all(model)
    elif state == "partial":
        lf.freeze_site(model, "blocks.1.ln2", 1.3)
    lf.export(model, tmp_path / "saved", target="transformer_lens")
    again = lf.load(tmp_path / "saved", dtype=torch.float64)
    assert layout_of(again) == layout_of(model)
    tokens = text(model, 2)
    assert torch.equal(again(tokens), model(tokens))
    with pytest.raises(
        UnsupportedModelError, match=r"in which blocks\.0\.attn is linear: .*lens'$"
    ):
        lf.export(model, tmp_path / "other", target="transformers")


def test_it_trains_and_resumes_to_the_same_bits(tmp_path):
    model = hybrid(dtype=torch.float32)
    tokens = text(model)
    recipe = replace(lf.recipes.finetuning(steps=6, batch=2), seed=2)
    whole = lf.finetune(model, recipe, tokens, progress=False)
    assert not torch.equal(whole.model.blocks[0].attn.W_Q, model.blocks[0].attn.W_Q)

    passes = iter(range(100))

    def cut(x, hook):
        if torch.is_grad_enabled() and next(passes) == 4:
            raise KeyboardInterrupt

    settings = {"out": tmp_path / "run", "checkpoint_every": 2, "progress": False}
    hooks = [("blocks.0.hook_mlp_out", cut)]
    with pytest.raises(KeyboardInterrupt):
        lf.finetune(model, recipe, tokens, fwd_hooks=hooks, **settings)
    again = lf.finetune(model, recipe, tokens, resume=True, **settings)
    assert torch.equal(again.model(tokens[:2]), whole.model(tokens[:2]))


@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
def test_norms_are_removed_and_what_is_left_is_exact(kind):
    model = hybrid(kind, torch.float32, divide_by="count")
    tokens = text(model, 24)
    recipe = lf.recipes.distilled(model, steps=12)
    free = lf.remove_norms(model, recipe, tokens, progress=False).model
    assert layout_of(free) == layout_of(model)
    for finish in (lf.fold, lf.frozen_form):
        with pytest.raises(
            NormSiteError, match="attention in 2 blocks, from block 0 on, is linear"
        ):
            finish(free)
    for certificate in lf.certify(free, tokens[0, :7]):
        certificate.require()
        assert not certificate.held
    trace = lf.trace(free, tokens[0, :7])
    lf.ablate(trace, ["L0H1@2", "L2H0@3"], "unseen").compare(lf.Logit(3)).verify()


def test_an_adapter_of_it_is_put_back_on_it(tmp_path):
    model = hybrid(dtype=torch.float32)
    lf.export(model, tmp_path / "base", target="transformer_lens")
    recipe = replace(lf.recipes.finetuning(steps=3, batch=2), trainable="heads:L0")
    tuned = lf.finetune(lf.load(tmp_path / "base"), recipe, text(model), progress=False).model
    lf.export_adapter(tuned, tmp_path / "adapter", tmp_path / "base")
    again = lf.load(tmp_path / "adapter")
    tokens = text(model, 2)
    assert layout_of(again) == layout_of(model)
    assert torch.equal(again(tokens), tuned(tokens))
    plain = lf.with_norm_sites(live_model("gpt2", torch.float32))
    with pytest.raises(LnfreeError):
        lf.export_adapter(plain, tmp_path / "other", tmp_path / "base")


def test_other_calls_take_it_as_any_model():
    model = hybrid(dtype=torch.float32)
    tokens = text(model, 4)
    assert lf.depth_report(model, tokens).to_frame().shape[0] == 3
    fisher = lf.fisher_information(model, tokens, trainable="heads:L0", progress=False)
    assert fisher.top(2)["component"].str.startswith("L0H").all()
    assert lf.evaluate_loss(model, tokens).mean > 0
    assert len(lf.list_weight_components(model)) == len(
        lf.list_weight_components(live_model("gpt2"))
    )
    assert "blocks.0.attn.W_Q" in lf.select_parameters(model, "heads:L0H1").chosen


@pytest.mark.parametrize("kind", ["gpt2", "llama-grouped"])
def test_W_O_is_divided_by_the_mean_sum_of_weights(kind):
    source = live_model(kind)
    tokens = text(source, 6)
    plain = lf.to_linear_attention(source, [0, 2], divide_by="count").model
    scaled = lf.to_linear_attention(source, [0, 2], divide_by="count", tokens=tokens).model
    _, cache = scaled.run_with_cache(tokens)
    for layer in (0, 2):
        sums = cache["pattern", layer].sum(-1).mean((0, 2))
        by_hand = plain.blocks[layer].attn.W_O / sums[:, None, None]
        assert (scaled.blocks[layer].attn.W_O - by_hand).abs().max() < 1e-12 * by_hand.abs().max()
    assert torch.equal(scaled.blocks[1].attn.W_O, source.blocks[1].attn.W_O)
    with pytest.raises(UnsupportedModelError, match="divide_by='sum' needs none"):
        lf.to_linear_attention(source, tokens=tokens)
    with pytest.raises(UnsupportedModelError, match="block 0 has a norm before W_O"):
        lf.to_linear_attention(lf.to_sub_ln(source).model, divide_by="count", tokens=tokens)
