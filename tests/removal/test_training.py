"""Training and fine-tuning with norms left as they are, and models before training."""

from dataclasses import replace

import pytest
import torch
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.data.sequences import ShuffledSequences
from lnfree_interp.errors import RecipeError, UnsupportedModelError
from lnfree_interp.evaluation.text_pass import measure_text
from lnfree_interp.models.sites import split_norms


@pytest.fixture
def small(gpt2_folder):
    return lf.load(gpt2_folder)


@pytest.fixture
def data():
    """Sequences that count up from a random token, which two layers can learn."""
    starts = torch.randint(300, (64, 1), generator=torch.Generator().manual_seed(0))
    return (starts + torch.arange(24)) % 300


def test_a_model_learns_from_its_first_weights(small, data):
    new = lf.untrained(small, n_layers=1, d_model=32, n_heads=2, seed=3)
    recipe = lf.recipes.from_scratch(steps=80, batch=16)
    before = {name: W.clone() for name, W in new.named_parameters()}
    run = lf.train(new, recipe, data, heldout=data[:4], progress=False)
    assert run.history[0].loss == pytest.approx(torch.tensor(300.0).log().item(), abs=0.1)
    assert run.history[-1].loss < 0.75 * run.history[0].loss
    assert run.history[-1].heldout is not None
    assert len(lf.live_sites(run.model)) == 4
    assert all(torch.equal(W, before[name]) for name, W in new.named_parameters())


@pytest.mark.parametrize(
    "make",
    [lf.to_normformer, lf.to_sub_ln, lf.to_peri_ln, lf.to_layernorm_scaling, lf.to_dyt, lf.to_derf],
    ids=lambda make: make.__name__,
)
def test_every_variant_trains_saves_and_loads(make, small, data, tmp_path):
    new = make(lf.untrained(small, n_layers=2, d_model=16, n_heads=2)).model
    hooked = []
    run = lf.train(
        new, lf.recipes.from_scratch(steps=6, batch=8), data, progress=False,
        fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: hooked.append(hook.name))],
    )  # fmt: skip
    assert run.history[-1].loss < run.history[0].loss
    assert len(hooked) >= 6
    trained = dict(run.model.named_parameters())
    for name, W in new.named_parameters():  # what the variant adds learns too
        assert not torch.equal(W, trained[name]) or W.numel() == 0, name
    lf.export(run.model, tmp_path / "out", target="transformer_lens")
    again = lf.load(tmp_path / "out")
    lf.compare_logits(again, run.model).require("saved and loaded")


def test_a_resumed_training_is_the_one_that_was_not_interrupted(small, data, tmp_path):
    new = lf.to_normformer(lf.untrained(small, n_layers=1, d_model=16, n_heads=2)).model
    recipe = lf.recipes.from_scratch(steps=8, batch=8)
    options = {"progress": False, "checkpoint_every": 3}
    whole = lf.train(new, recipe, data, out=tmp_path / "whole", **options)
    with pytest.raises(lf.errors.PausedError):
        lf.train(new, recipe, data, out=tmp_path / "parts", minutes=1e-9, **options)
    run = lf.train(new, recipe, data, out=tmp_path / "parts", resume=True, **options)
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(W, expected[name]) for name, W in run.model.named_parameters())
    assert len(run.history) == 8


def test_a_training_is_resumed_though_a_parameter_never_has_a_gradient(small, data, tmp_path):
    """That of a map which a constant has replaced."""
    variant = lf.to_dyt(small, tokens=data[:4]).model
    lf.freeze_site(variant, "ln_final", 2.0)
    recipe, options = lf.recipes.from_scratch(steps=6, batch=8), {"progress": False}
    whole = lf.train(variant, recipe, data, **options)
    with pytest.raises(lf.errors.PausedError):
        lf.train(variant, recipe, data, out=tmp_path / "run", minutes=1e-9, **options)
    run = lf.train(variant, recipe, data, out=tmp_path / "run", resume=True, **options)
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(W, expected[name]) for name, W in run.model.named_parameters())


def test_norms_that_are_constants_from_the_start_stay_so(small, data):
    sited = lf.with_norm_sites(lf.untrained(small, n_layers=1, d_model=16, n_heads=2))
    for site in lf.list_norm_sites(sited):
        lf.freeze_site(sited, site, 0.5)
    run = lf.train(sited, lf.recipes.from_scratch(steps=4, batch=8), data, progress=False)
    assert not lf.live_sites(run.model)
    assert lf.get_norm(run.model, "ln_final").constant == 0.5
    lf.compare_logits(lf.fold(run.model), run.model).require("folded")


def test_finetuning_is_the_control_of_a_removal(small, data):
    recipe = lf.recipes.distilled(small, steps=12).vanilla()
    ours = lf.finetune(small, recipe, data, progress=False)
    theirs = lf.remove_norms(small, recipe, data, progress=False)
    expected = dict(theirs.model.named_parameters())
    assert all(torch.equal(W, expected[name]) for name, W in ours.model.named_parameters())


def test_finetuning_may_hold_to_the_model_before(small, data):
    recipe = replace(lf.recipes.finetuning(steps=10, distillation=1.0), lr=5e-3, warmup=0)
    run = lf.finetune(small, recipe, data, progress=False)
    assert run.history[0].losses["distillation"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(RecipeError, match=r"call lf\.finetune"):
        lf.train(small, recipe, data, progress=False)


def test_recipes_that_freeze_are_refused(small, data):
    recipe = lf.recipes.distilled(small, steps=30)
    for call, name in ((lf.train, "lf.train"), (lf.finetune, "lf.finetune")):
        with pytest.raises(RecipeError, match=rf"{name} leaves norms .* freezes blocks\.0\.ln2"):
            call(small, recipe, data, progress=False)


def test_untrained_weights_are_gpt2s(small):
    model = lf.untrained(small, n_layers=8, d_model=64, n_heads=4, seed=1)
    assert (model.cfg.n_layers, model.cfg.d_head, model.cfg.d_mlp) == (8, 16, 256)
    for name, W in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("W_O", "W_out"):
            assert W.std().item() == pytest.approx(0.02 / 4, rel=0.05), name
        elif leaf.startswith("W_"):
            assert W.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert ((1 if leaf == "w" else 0) == W).all(), name
    assert torch.equal(model.W_U, model.W_E.T)
    again, other = (
        lf.untrained(small, n_layers=8, d_model=64, n_heads=4, seed=seed) for seed in (1, 2)
    )
    assert torch.equal(again.W_E, model.W_E)
    assert not torch.equal(other.W_E, model.W_E)
    assert model.to_tokens("def add", prepend_bos=False).shape[1] > 0


@pytest.mark.parametrize("kind", ["llama-grouped", "neox", "gemma2"])
def test_other_architectures_can_be_resized(kind):
    like = live_model(kind, torch.float32)
    deeper = lf.untrained(like, n_layers=like.cfg.n_layers + 1)
    wider = lf.untrained(like, d_model=2 * like.cfg.d_model)
    tokens = torch.arange(12)[None]
    for model in (deeper, wider):
        assert model(tokens).isfinite().all()
        lf.with_norm_sites(model)
    assert wider.cfg.d_head == 2 * like.cfg.d_head  # not always d_model over n_heads
    assert wider.cfg.d_mlp == 2 * like.cfg.d_mlp


def test_sizes_that_do_not_fit_are_refused(small, frozen, folded):
    with pytest.raises(
        UnsupportedModelError, match="n_heads=5 and d_model=32 give no whole d_head"
    ):
        lf.untrained(small, n_heads=5)
    with pytest.raises(UnsupportedModelError, match="n_layers=0 was given"):
        lf.untrained(small, n_layers=0)
    grouped = live_model("llama-grouped", torch.float32)
    with pytest.raises(UnsupportedModelError, match="share keys and values"):
        lf.untrained(grouped, n_heads=1)
    rotary = live_model("llama", torch.float32)
    with pytest.raises(UnsupportedModelError, match="5 of a d_head of 5"):
        lf.untrained(rotary, d_model=20)
    for model in (frozen, folded):
        with pytest.raises(UnsupportedModelError, match="stock model with live norms"):
            lf.untrained(model)


def test_a_variant_may_learn_from_the_model_that_it_was_made_of(small, data):
    variant = lf.to_dyt(small, tokens=data[:4]).model
    recipe = replace(lf.recipes.finetuning(steps=12, distillation=1.0), precision="float32")
    run = lf.finetune(variant, recipe, data, teacher=small, progress=False)
    own = lf.finetune(variant, recipe, data, progress=False)
    assert own.history[0].losses["distillation"] == pytest.approx(0, abs=1e-5)
    batch = ShuffledSequences(data, 0).take(8)
    found = measure_text({"small": small, "variant": variant}, batch, "small")["variant"]
    assert run.history[0].losses["distillation"] == pytest.approx(found.kl.mean().item(), rel=1e-4)
    assert run.history[-1].losses["distillation"] < run.history[0].losses["distillation"]
    assert all(W.requires_grad and W.grad is None for W in small.parameters())


def test_a_teacher_must_fit_and_stay_the_same(small, data, tmp_path):
    recipe = lf.recipes.finetuning(steps=2, distillation=1.0)
    other = live_model("gpt2", torch.float32, vocab_size=280)
    with pytest.raises(RecipeError, match="the teacher has 280 tokens and the model 300"):
        lf.finetune(small, recipe, data, teacher=other, progress=False)
    deeper = lf.untrained(small, n_layers=4)
    lf.finetune(small, recipe, data, teacher=deeper, progress=False)
    stream = replace(recipe, losses={"stream": 1.0})
    with pytest.raises(RecipeError, match=r"residual streams \(stream\), .* 4 layers of width 32"):
        lf.finetune(small, stream, data, teacher=deeper, progress=False)
    options = {"out": tmp_path / "run", "progress": False}
    with pytest.raises(lf.errors.PausedError):
        lf.finetune(small, recipe, data, teacher=deeper, minutes=1e-9, **options)
    with pytest.raises(RecipeError, match="a run with another teacher"):
        lf.finetune(small, recipe, data, resume=True, **options)
    lf.finetune(small, recipe, data, teacher=deeper, resume=True, **options)


def test_a_teacher_that_cannot_teach_is_refused(small, folded, data):
    recipe = lf.recipes.finetuning(steps=2, distillation=1.0)
    silent = lf.recipes.finetuning(steps=2)
    for call in (lf.train, lf.finetune):
        with pytest.raises(RecipeError, match="does not distil: set distillation above 0"):
            call(small, silent, data, teacher=small, progress=False)
    short = lf.untrained(small, n_ctx=8)
    with pytest.raises(RecipeError, match="24 tokens, and the teacher's context 8"):
        lf.finetune(small, recipe, data, teacher=short, progress=False)
    with pytest.raises(RecipeError, match="the teacher has no norms any more"):
        lf.finetune(small, recipe, data, teacher=folded, progress=False)


def test_recipes_are_for_the_norms_that_are_live(small, data):
    sited = lf.with_norm_sites(small)
    lf.freeze_site(sited, "blocks.0.ln1.v", 1.0)
    for recipe in (lf.recipes.distilled(sited, steps=20), lf.recipes.at_once(sited, steps=20)):
        assert {event.site for event in recipe.events} == set(lf.live_sites(sited))
    lf.remove_norms(sited, lf.recipes.distilled(sited, steps=20), data, progress=False)
    for site in lf.live_sites(sited):
        lf.freeze_site(sited, site, 1.0)
    with pytest.raises(RecipeError, match="no norm sites that are live"):
        lf.recipes.distilled(sited)


def test_blocks_that_are_not_trained_have_no_gradient_and_break_nothing(small, data):
    for block in (small.blocks[0], small.blocks[2]):
        block.requires_grad_(False)
    run = lf.train(small, lf.recipes.from_scratch(steps=2, batch=4), data, progress=False)
    sizes = lf.GradientBalance.of_run(run).by_kind["attn.W_Q"]
    assert sizes.tolist() == [0.0, pytest.approx(sizes[1].item()), 0.0]
    assert sizes[1] > 0
    alone = lf.gradient_balance(small, data[:4]).by_kind["attn.W_Q"]
    assert (alone > 0).all()


def test_a_copy_with_sites_can_be_copied_again(small):
    """As several processes do when they put a spread model together."""
    variant = lf.to_peri_ln(small).model
    again = split_norms(variant)
    assert lf.list_norm_sites(again) == lf.list_norm_sites(variant)
    lf.compare_logits(again, variant).require("the copy")
