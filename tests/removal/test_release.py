"""Parameters that are trained from a later step on."""

import json
from dataclasses import replace

import pytest
import torch
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.errors import PausedError, RecipeError
from lnfree_interp.models.site_names import stock_name
from lnfree_interp.models.sites import stock_weights
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.run_folder import RunFolder
from lnfree_interp.removal.schedule import sequential_sites

TEXT = torch.randint(300, (40, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model():
    return live_model("gpt2", torch.float32, n_layer=2)


def a_recipe(*release, steps=24, trainable="norms", **changes):
    recipe = lf.recipes.finetuning(steps=steps, batch=2)
    settings = {"precision": "float32", "weight_decay": 0.3, "warmup": 2} | changes
    return replace(recipe, trainable=trainable, release=release, **settings)


def train(model, recipe, **options):
    options = {"progress": False, "log_every": 0} | options
    return lf.finetune(model, recipe, TEXT, **options)


def moved(before, after):
    """The mask of what changed."""
    before, after = (stock_weights(lf.with_norm_sites(one)) for one in (before, after))
    return lf.ParameterMask(
        {name: before[name] != after[name] for name in before if name != "unembed.W_U"}
    )


def moved_in(model, weights):
    """The same, for weights by the names of a model with norm sites."""
    return lf.ParameterMask(
        {stock_name(n): weights[n].detach() != W for n, W in model.named_parameters()}
    )


class TestAtAStep:
    def test_nothing_is_trained_before(self, model, tmp_path):
        release = lf.Release(trainable=("L1H1", "30% of mlps"), at=10)
        norms = lf.select_parameters(model, "norms")
        both = norms | lf.select_parameters(model, *release.trainable)
        out = tmp_path / "run"
        run = train(model, a_recipe(release), out=out, checkpoint_every=5, heldout=TEXT[:2])
        before = lf.with_norm_sites(model)
        kept = RunFolder(out).load(20).model  # a spare one and the last are kept
        for weights, allowed in ((kept, both), (dict(run.model.named_parameters()), both)):
            assert (moved_in(before, weights) | allowed) == allowed
            assert moved_in(before, weights).count > 0.98 * allowed.count
        # It is paused before the release: only the norms have moved.
        with pytest.raises(PausedError):
            train(model, a_recipe(release), out=tmp_path / "other", minutes=1e-9)
        for _ in range(8):
            with pytest.raises(PausedError):
                train(model, a_recipe(release), out=tmp_path / "other", minutes=1e-9, resume=True)
        folder = RunFolder(tmp_path / "other")
        assert folder.latest().step == 9
        assert (moved_in(before, folder.latest().model) | norms) == norms

    def test_the_record_says_so(self, model):
        run = train(model, a_recipe(lf.Release(trainable="mlps", at=7)))
        assert [r.step for r in run.history if r.released] == [6]
        assert run.history[6].released == "mlps from step 7 on"

    def test_until_then_steps_are_those_without(self, model):
        plain = train(model, a_recipe())
        later = train(model, a_recipe(lf.Release(trainable="all", at=12)))
        losses = [[r.loss for r in run.history] for run in (plain, later)]
        gradients = [[r.gradient for r in run.history] for run in (plain, later)]
        assert losses[0][:13] == losses[1][:13]
        assert losses[0][13:] != losses[1][13:]
        assert gradients[0][:12] == gradients[1][:12]
        assert gradients[1][12] > gradients[0][12]

    def test_entries_of_one_parameter_at_two_steps(self, model, tmp_path):
        recipe = a_recipe(lf.Release(trainable="L0H1", at=8), trainable="L0H0", steps=16)
        run = train(model, recipe, out=tmp_path / "run", checkpoint_every=8)
        allowed = lf.select_parameters(model, "L0H0", "L0H1")
        assert (moved(model, run.model) | allowed) == allowed
        W_Q = RunFolder(tmp_path / "run").load(8).model["blocks.0.attn.W_Q"]
        assert not torch.equal(W_Q[0], model.blocks[0].attn.W_Q[0])
        assert torch.equal(W_Q[1], model.blocks[0].attn.W_Q[1])
        assert not torch.equal(run.model.blocks[0].attn.W_Q[1], W_Q[1])


class TestWhenTheLossStandsStill:
    def test_at_the_step_that_the_windows_say(self, model):
        release = lf.Release(trainable="mlps", window=3, less_than=0.02)
        run = train(model, a_recipe(release, lr=1e-2))
        losses = [record.loss for record in run.history]
        due = [
            step for step in range(6, 24)
            if sum(losses[step - 6 : step - 3]) / 3 - sum(losses[step - 3 : step]) / 3 < 0.02
        ]  # fmt: skip
        assert [r.step for r in run.history if r.released] == [due[0] - 1]

    @pytest.mark.parametrize(
        ("losses", "due"),
        [
            ([3.0, 2.0, 1.0, 0.0], False),  # a window of 2: 2.5 and 0.5
            ([1.0, 1.0, 1.0, 1.0], True),
            ([1.0, 1.0, 1.0], False),  # too short
            ([9.0, 1.0, 1.0, 1.0, 0.99], True),  # only the last four count
            ([1.0, 1.0, 0.98, 0.9], False),
            ([1.0, 1.0, 2.0, 2.0], True),
        ],
    )
    def test_by_hand(self, losses, due):
        release = lf.Release(trainable="all", window=2, less_than=0.05)
        assert release.due(len(losses), losses) is due

    def test_each_release_has_windows_of_its_own(self, model):
        still = {"window": 2, "less_than": 1e9}
        run = train(model, a_recipe(lf.Release(trainable="mlps", **still),
                                    lf.Release(trainable="heads", **still),
                                    lf.Release(trainable="all", at=15)))  # fmt: skip
        assert [r.step for r in run.history if r.released] == [3, 7, 14]


@pytest.mark.parametrize("trainable", ["norms", "L0H0"])
def test_a_run_that_is_interrupted(model, tmp_path, trainable):
    first = lf.Release(trainable="mlps", window=3, less_than=1e9)
    second = lf.Release(trainable=("L0H1", "embed"), at=11)
    recipe = a_recipe(first, second, weight_average=0.8, trainable=trainable)
    whole = train(model, recipe)
    out = tmp_path / "run"
    options = {"out": out, "checkpoint_every": 3}
    for resume in range(30):
        try:
            run = train(model, recipe, resume=bool(resume), minutes=1e-9, **options)
            break
        except PausedError:
            continue
    assert resume > 5
    for name, W in stock_weights(whole.model).items():
        assert torch.equal(W, stock_weights(run.model)[name]), name
    assert [r.released for r in run.history] == [r.released for r in whole.history]


def test_a_run_that_rolls_back(model, tmp_path):
    """What was trained in part keeps its moments, and a release that was taken back comes again."""
    recipe = a_recipe(lf.Release(trainable=("L0H1", "30% of mlps"), at=8), trainable="L0H0",
                      guard=lf.Guard(action="rollback", slower=0.5))  # fmt: skip
    struck = []

    def strike(x, hook):
        struck.append(0)
        return x * float("nan") if len(struck) == 12 else x

    run = train(model, recipe, out=tmp_path / "run", checkpoint_every=5,
                fwd_hooks=[("blocks.1.hook_mlp_out", strike)])  # fmt: skip
    assert any(record.rollback for record in run.history)
    assert [r.step for r in run.history if r.released] == [7]
    allowed = lf.select_parameters(model, "L0H0", "L0H1") | lf.select_parameters(
        model, "30% of mlps"
    )
    change = moved(model, run.model)
    assert (change | allowed) == allowed
    kept = RunFolder(tmp_path / "run").latest().optimizer
    for name in ("blocks.0.attn.W_Q", "blocks.0.attn.W_Q#1"):
        assert kept[f"{name}|step"].item() == 24 - (8 if "#" in name else 0)


def test_a_larger_gradient_of_more_parameters_is_no_spike(model):
    recipe = a_recipe(lf.Release(trainable="all", at=12), trainable="blocks.0.attn.b_O",
                      guard=lf.Guard(spike=2.0))  # fmt: skip
    run = train(model, recipe)
    assert run.history[12].gradient > 2 * run.history[11].gradient
    assert not run.history[12].skipped


def test_two_at_one_step(model):
    run = train(model, a_recipe(lf.Release(trainable="heads", at=5),
                                lf.Release(trainable="mlps", at=5)))  # fmt: skip
    assert [r.step for r in run.history if r.released] == [4]
    assert "heads" in run.history[4].released
    assert "mlps" in run.history[4].released


def test_wider_gaps_move_a_release():
    recipe = lf.recipes.distilled(sequential_sites(2), steps=40)
    first, last = recipe.removed_at - 2, recipe.removed_at + 1
    releases = tuple(lf.Release(trainable="all", at=at) for at in (first, last))
    wider = replace(recipe, trainable="norms", release=releases).widened(4, 2.0)
    assert wider.release[0].at < wider.removed_at
    assert wider.release[1].at == wider.removed_at + 1


def test_a_removal_releases_too(model):
    recipe = lf.recipes.distilled(model, steps=24)
    recipe = replace(recipe, batch=2, trainable="norms", precision="float32",
                     release=(lf.Release(trainable="mlps", at=12),))  # fmt: skip
    run = lf.remove_norms(model, recipe, TEXT, progress=False)
    assert lf.live_sites(run.model) == ()
    allowed = lf.select_parameters(model, "norms", "mlps")
    change = moved(model, run.model)
    assert (change | allowed) == allowed
    assert change.count > 0.98 * allowed.count


def test_a_recipe_is_written_and_read(model):
    mask = lf.select_parameters(model, "20% of heads")
    recipe = a_recipe(lf.Release(trainable=mask, at=3), lf.Release(trainable=("L0H0", "embed")))
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mlps@100", lf.Release(trainable=("mlps",), at=100)),
        ("norms+heads:L3H1@7", lf.Release(trainable=("norms", "heads:L3H1"), at=7)),
        ("20% of norms@still", lf.Release(trainable=("20% of norms",))),
    ],
)
def test_words_of_the_command_line(text, expected):
    assert lf.Release.parse(text) == expected


@pytest.mark.parametrize("text", ["mlps", "@100", "mlps@", "mlps@soon", "mlps@-3"])
def test_words_that_are_none(text):
    with pytest.raises(RecipeError, match="give what is released and when"):
        lf.Release.parse(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"at": 0}, "at step 1 or later"),
        ({"window": 0}, "a number of steps"),
        ({"less_than": -1.0}, "0 or more nats"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        lf.Release(trainable="all", **settings)


def test_releases_out_of_order_are_refused():
    with pytest.raises(RecipeError, match="in the order of their steps"):
        a_recipe(lf.Release(trainable="mlps", at=9), lf.Release(trainable="all", at=5))


def test_a_release_after_the_end_is_refused():
    with pytest.raises(RecipeError, match="the last of 24 steps is 23"):
        a_recipe(lf.Release(trainable="all", at=24))
