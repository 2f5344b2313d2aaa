"""The fine-tuning: events fire when they should, sigma is what was measured, hooks stay active."""

import gc
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from support.loaded import live_model
from support.models import make_gpt2

import lnfree_interp as lf
from lnfree_interp.data.sequences import ShuffledSequences
from lnfree_interp.errors import (
    DataError,
    NormSiteError,
    RecipeError,
    TrainingError,
    UnsupportedModelError,
)
from lnfree_interp.models import sites
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.removal import remove, trainer
from lnfree_interp.removal.losses import (
    distillation_loss,
)
from lnfree_interp.removal.plan import plan
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import (
    Event,
    published_order,
    sequential_sites,
)
from lnfree_interp.removal.settings import Guard, Statistics
from lnfree_interp.removal.statistics import measure_sigma


@pytest.fixture(scope="module")
def model():
    return live_model("gpt2", torch.float32, n_layer=2)


@pytest.fixture(scope="module")
def data():
    return torch.randint(300, (40, 24), generator=torch.Generator().manual_seed(3))


def small_recipe(**changes):
    settings = {
        "events": published_order(sequential_sites(2), start=2, ln2_gap=1, qk_gap=1, v_gap=2),
        "steps": 16,
        "batch": 4,
        "lr": 1e-3,
        "warmup": 2,
        "final_lr": 0.1,
    }
    return Recipe(**(settings | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 6}, "the last of 6 steps is 5: give at least"),
        ({"events": (Event(-1, NormSite("ln_final")),)}, "would be frozen from step -1"),
        ({"events": (Event(1, NormSite("ln_final")),) * 2}, "ln_final would be frozen twice"),
        ({"micro_batch": 0}, "micro_batch must be positive"),
        ({"distillation": 1.5}, "distillation must lie"),
        ({"batch": 0}, "batch must be positive"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"warmup": -1}, "warmup must be 0 or more"),
        ({"warmup": 16}, "rises over 16 steps, and there are 16: give at least 17 steps"),
    ],
)
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        small_recipe(**changes)
    with pytest.raises(RecipeError, match="negative"):
        published_order(sequential_sites(2), start=-1, ln2_gap=1, qk_gap=1, v_gap=1)


def test_all_norms_are_gone_and_the_model_learned(model, data):
    run = lf.remove_norms(model, small_recipe(steps=60, lr=3e-3), data, progress=False)
    assert lf.live_sites(run.model) == ()
    assert lf.fold(run.model).cfg.normalization_type is None
    assert run.history[-1].loss < run.history[0].loss - 0.1
    assert [r.step for r in run.history] == list(range(60))


def test_without_a_copy_the_given_weights_are_trained(model, data):
    """Same run, one model less in memory; a teacher is still a copy."""
    recipe = small_recipe(steps=12, distillation=0.5, precision="float32")
    expected = lf.remove_norms(model, recipe, data, progress=False)
    spent = live_model("gpt2", torch.float32, n_layer=2)
    run = lf.remove_norms(spent, recipe, data, progress=False, copy_weights=False)
    assert [r.loss for r in run.history] == [r.loss for r in expected.history]
    assert run.model.W_E is spent.W_E
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(run.model.get_parameter(name), parameter, rtol=0, atol=0)
    assert lf.list_norm_sites(spent) == lf.list_norm_sites(model)


def test_events_fire_before_their_step_with_measured_sigma(model, data, monkeypatch):
    recipe = small_recipe(statistics=Statistics(sequences=len(data)))
    in_training = []

    def keep(stock, copy_weights):
        in_training.append(lf.with_norm_sites(stock, copy_weights))
        return in_training[0]

    monkeypatch.setattr(trainer, "with_norm_sites", keep)
    live = []

    def watch(embed, hook):
        if torch.is_grad_enabled():  # not the engine's own measuring passes
            live.append({str(site) for site in lf.live_sites(in_training[0])})

    run = lf.remove_norms(model, recipe, data, fwd_hooks=[("hook_embed", watch)], progress=False)
    for event in recipe.events:
        name = str(event.site)
        assert name in live[event.step - 1]
        assert name not in live[event.step]
        sigma = run.history[event.step].frozen[name]
        assert lf.get_norm(run.model, name).sigma.item() == pytest.approx(sigma)


def test_sigma_is_that_of_the_model_at_the_event_under_the_users_hooks(model, data):
    recipe = small_recipe(
        events=(Event(0, NormSite("ln2", 1)),), statistics=Statistics(sequences=len(data)), steps=3
    )

    def tenfold(resid, hook):
        return 10 * resid

    for factor, hooks in ((1, []), (10, [("blocks.1.hook_resid_mid", tenfold)])):
        run = lf.remove_norms(model, recipe, data, fwd_hooks=hooks, progress=False)
        resid = factor * model.run_with_cache(data)[1]["resid_mid", 1]
        expected = (resid.var(-1, correction=0) + model.cfg.eps).sqrt().mean().item()
        assert run.history[0].frozen["blocks.1.ln2"] == pytest.approx(expected, rel=1e-4)


def test_sigma_is_the_mean_standard_deviation(model, data):
    split = lf.with_norm_sites(model)
    sites = ["blocks.1.ln2", "blocks.0.ln1.qk", "ln_final"]
    sigmas = measure_sigma(split, sites, data)
    _, cache = model.run_with_cache(data)
    inputs = [cache["resid_mid", 1], cache["resid_pre", 0], cache["resid_post", 1]]
    for site, resid in zip(sites, inputs, strict=True):
        expected = (resid.var(-1, correction=0) + model.cfg.eps).sqrt().mean().item()
        assert sigmas[site] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(NormSiteError):
        measure_sigma(split, ["blocks.7.ln2"], data)


def test_distillation_keeps_the_model_closer_to_its_original(model, data):
    def distance(distillation):
        recipe = small_recipe(steps=40, distillation=distillation)
        run = lf.remove_norms(model, recipe, data, progress=False)
        with torch.no_grad():
            return distillation_loss(run.model(data), model(data)).item()

    assert distance(1.0) < 0.8 * distance(0.0)
    assert small_recipe(distillation=1.0).vanilla().distillation == 0


def test_learning_rate_reaches_the_optimizer_and_gradients_are_clipped(model, data, monkeypatch):
    clipped = []
    right = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm, **settings):
        norm = right(parameters, max_norm, **settings)
        clipped.append(max_norm)
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    recipe = small_recipe(events=(), steps=4, warmup=2, clip=0.25, scale_anchor=0.0)
    one_step = replace(recipe, steps=3)
    moved = []

    def stop(embed, hook):  # the second step's forward: one update has been made
        moved.append(1)

    run = lf.remove_norms(model, one_step, data, fwd_hooks=[("hook_embed", stop)], progress=False)
    assert clipped == [0.25] * 3
    assert [record.lr for record in run.history][:2] == [5e-4, 1e-3]
    # AdamW moves a parameter with a steady gradient by at most about its learning rate a step.
    moved = (run.model.blocks[0].mlp.b_in - model.blocks[0].mlp.b_in).abs()
    total = sum(record.lr for record in run.history)
    assert 0.5 * total < moved.max() < 1.1 * total


def test_the_anchor_holds_the_scale_together(model, data):
    def last(weight):
        recipe = small_recipe(steps=40, scale_anchor=weight)
        return (
            lf.remove_norms(model, recipe, data, progress=False).history[-1].losses["scale_anchor"]
        )

    assert last(5.0) < 0.7 * last(0.0)


def test_micro_batches_add_up(model, data):
    """The same gradient in one forward or four; only the anchor's target is per forward."""
    whole = small_recipe(events=(), scale_anchor=0.0, steps=2, warmup=0)
    runs = [
        lf.remove_norms(model, replace(whole, micro_batch=n), data, progress=False)
        for n in (4, 1, 3)
    ]
    for run in runs[1:]:
        assert run.history[0].loss == pytest.approx(runs[0].history[0].loss, rel=1e-3)
        assert run.history[1].loss == pytest.approx(runs[0].history[1].loss, rel=1e-3)


def batches_of(recipe, model, data):
    """The first token of each sequence tells which one it is: no two begin alike."""
    data = data.clone()
    data[:, 0] = torch.arange(len(data))
    start = model.W_E[: len(data)].detach().clone()
    seen = []

    def keep(embed, hook):
        if torch.is_grad_enabled():
            seen.append(torch.cdist(embed[:, 0].detach(), start).argmin(-1).tolist())

    run = lf.remove_norms(model, recipe, data, fwd_hooks=[("hook_embed", keep)], progress=False)
    return run, seen


def test_control_sees_the_same_data_and_rates_but_keeps_its_norms(model, data):
    recipe = small_recipe(lr=1e-5)
    run, run_seen = batches_of(recipe, model, data)
    control, control_seen = batches_of(recipe.vanilla(), model, data)
    assert run_seen == control_seen
    assert len(run_seen) == recipe.steps
    assert [r.lr for r in run.history] == [r.lr for r in control.history]
    # Before the first event the two differ by the scale anchor alone.
    assert run.history[0].loss == control.history[0].loss
    assert len(lf.live_sites(control.model)) == 7
    again, again_seen = batches_of(recipe, model, data)
    assert again_seen == run_seen
    assert [r.loss for r in again.history] == [r.loss for r in run.history]
    assert batches_of(replace(recipe, seed=1), model, data)[1] != run_seen


def test_every_sequence_is_seen_once_an_epoch(model, data):
    _, seen = batches_of(small_recipe(steps=10, events=(), lr=1e-5), model, data)
    assert sorted(sequence for batch in seen for sequence in batch) == list(range(40))


def test_hooks_fire_on_every_forward_and_backward_and_may_change_activations(model, data):
    forward, backward = [], []

    def is_mlp_out(name):
        return name.endswith("0.hook_mlp_out")

    hooks = {
        "fwd_hooks": [("blocks.0.attn.hook_pattern", lambda x, hook: forward.append(x.shape))],
        "bwd_hooks": [(is_mlp_out, lambda gradient, hook: backward.append(1))],
    }
    recipe = small_recipe(events=())
    run = lf.remove_norms(model, recipe, data, progress=False, **hooks)
    assert forward == [(4, 4, 24, 24)] * recipe.steps
    assert len(backward) == recipe.steps

    def silence(mlp_out, hook):
        return mlp_out * 0

    silenced = lf.remove_norms(
        model, recipe, data, fwd_hooks=[("blocks.0.hook_mlp_out", silence)], progress=False
    )
    assert silenced.history[0].loss != run.history[0].loss
    # Nothing is left behind on either model.
    assert not any(point.has_hooks() for point in silenced.model.hook_points())
    assert not any(point.has_hooks() for point in model.hook_points())


def test_weight_decay_spares_biases_and_gains(model, data):
    """Per head, TransformerLens' b_Q is a matrix: shape must not decide."""
    recipe = small_recipe(events=(), weight_decay=50.0, lr=1e-2, steps=5, warmup=0)
    plain = small_recipe(events=(), weight_decay=0.0, lr=1e-2, steps=5, warmup=0)
    decayed, kept = (lf.remove_norms(model, r, data, progress=False).model for r in (recipe, plain))
    assert decayed.blocks[0].attn.W_Q.norm() < 0.5 * kept.blocks[0].attn.W_Q.norm()
    assert decayed.W_E.norm() < 0.5 * kept.W_E.norm()
    for name in ("blocks.0.attn.b_Q", "blocks.1.mlp.b_in", "blocks.0.ln2.w", "ln_final.b"):
        ours, theirs = (m.get_parameter(name) for m in (decayed, kept))
        assert (ours - theirs).norm() < 0.2 * theirs.norm(), name


def test_refusals(model, data):
    with pytest.raises(RecipeError, match="40 sequences, one batch takes 64"):
        lf.remove_norms(model, small_recipe(batch=64), data, progress=False)
    with pytest.raises(DataError, match="100 tokens in a row; the model's context is 48"):
        lf.remove_norms(model, small_recipe(), data.new_zeros(40, 100), progress=False)
    with pytest.raises(DataError, match="tokenized for another model"):
        lf.remove_norms(model, small_recipe(), data + 300, progress=False)
    for wrong in (data.float(), data[0], data[None]):
        with pytest.raises(DataError, match="must be token ids"):
            remove._require_sound(model, small_recipe(), wrong, None)
        with pytest.raises(DataError, match="heldout must be token ids"):
            remove._require_sound(model, small_recipe(), data, wrong)
    source = ShuffledSequences(data, 0)
    with pytest.raises(DataError, match="heldout is a ShuffledSequences: give packed"):
        remove._require_sound(model, small_recipe(), data, source)
    with pytest.raises(RecipeError, match="needs held-out text"):
        lf.remove_norms(model, small_recipe(patience=2), data, progress=False)
    for hooks in ("blocks.0.ln1.hook_scale", lambda name: False):
        with pytest.raises(RecipeError, match="no hook point"):
            lf.remove_norms(
                model, small_recipe(), data, fwd_hooks=[(hooks, lambda x, hook: None)],
                progress=False,
            )  # fmt: skip
    half = lf.load(make_gpt2(n_layer=2), device="cpu", dtype=torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="training needs float32"):
        lf.remove_norms(half, small_recipe(), data, progress=False)
    frozen = live_model("gpt2", torch.float32, n_layer=2).requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="requires a gradient"):
        lf.remove_norms(frozen, small_recipe(), data, progress=False)
    with pytest.raises(RecipeError, match="no next token"):
        lf.remove_norms(model, small_recipe(), data[:, :1], progress=False)
    elsewhere = small_recipe(events=(Event(0, NormSite("ln2", 9)),))
    with pytest.raises(NormSiteError, match=r"blocks\.9\.ln2"):
        lf.remove_norms(model, elsewhere, data, progress=False)


def test_the_model_with_norm_sites_is_built_once(model, data, monkeypatch):
    """For the run, for its original and for the check of its hooks."""
    built, compared = [], []
    right = sites.split_norms, sites.require_same_logits
    monkeypatch.setattr(sites, "split_norms", lambda *a: built.append(1) or right[0](*a))
    monkeypatch.setattr(sites, "require_same_logits", lambda *a: compared.append(1) or right[1](*a))
    hooks = [("blocks.0.ln1.qk.hook_scale", lambda x, hook: None)]
    lf.remove_norms(model, small_recipe(distillation=0.5), data, fwd_hooks=hooks, progress=False)
    assert (built, compared) == ([1], [1])


def test_nothing_of_a_run_stays_in_memory(model, data, monkeypatch):
    """The optimiser is twice the model: it goes with the call, not with the next collection."""
    made, right = [], trainer.Trainer.__init__

    def init(self, *arguments, **more):
        right(self, *arguments, **more)
        made.append(weakref.ref(self))
        made.append(weakref.ref(self.optimizer))

    monkeypatch.setattr(trainer.Trainer, "__init__", init)
    gc.collect()
    gc.disable()
    try:
        run = lf.remove_norms(model, small_recipe(distillation=0.5), data, progress=False)
        assert [ref() for ref in made] == [None, None]
    finally:
        gc.enable()
    assert run.model is not None


def test_a_run_that_blows_up_says_so(model, data):
    def explode(resid, hook):
        return resid * float("inf")

    with pytest.raises(TrainingError, match=r"diverged at step 0: cross-entropy .*; lower lr"):
        lf.remove_norms(
            model, small_recipe(), data, fwd_hooks=[("blocks.1.hook_resid_post", explode)],
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_embeddings_that_are_longer_than_the_text_s_are_shortened(kind, tmp_path):
    """The unembedding stays as it is, and so does the model that was given."""
    given = live_model(kind, torch.float32)
    text = torch.randint(40, (12, 16), generator=torch.Generator().manual_seed(3))
    recipe = replace(
        lf.recipes.at_once(given, steps=4), batch=4, lr=1e-12, embedding_cap=1.1,
        precision="float32", weight_decay=0.0, guard=Guard(above_best=1e3, sigma_factor=1e6),
        statistics=Statistics(sequences=12),
    )  # fmt: skip
    W_E, W_U = given.W_E.detach().clone(), given.W_U.detach().clone()
    run = lf.remove_norms(given, recipe, text, out=tmp_path / "run", progress=False)
    norms = W_E.norm(dim=-1)
    longest = 1.1 * norms[text].mean()
    assert 0 < (norms > longest).sum() < len(norms) / 2
    found = run.model.W_E
    torch.testing.assert_close(found.norm(dim=-1), norms.clamp(max=longest))
    assert torch.equal(found[norms < 0.99 * longest], W_E[norms < 0.99 * longest])
    torch.testing.assert_close(torch.cosine_similarity(found, W_E), torch.ones(len(found)))
    torch.testing.assert_close(run.model.W_U, W_U)
    assert torch.equal(given.W_E, W_E)
    assert not lf.fold(run.model).W_U.equal(found.T)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    again = lf.remove_norms(given, recipe, text, out=tmp_path / "run", resume=True, progress=False)
    assert torch.equal(again.model.W_E, found)
    assert recipe.vanilla().embedding_cap == 0
    assert "rows longer than 1.1 times the text's mean are shortened" in plan(recipe)
