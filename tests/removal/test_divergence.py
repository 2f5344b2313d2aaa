"""A run that goes wrong stops, or goes back with wider gaps; one that is done stops early."""

import dataclasses
import itertools
import math
import re
from contextlib import contextmanager

import pytest
import torch
from support.loaded import live_model
from test_resume import STEPS, a_recipe, data, model, train

import lnfree_interp as lf
from lnfree_interp.errors import RecipeError, TrainingError
from lnfree_interp.removal.divergence import DivergenceWatch, find_runaway
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.settings import Guard, Special, Statistics
from lnfree_interp.removal.trainer import Trainer

__all__ = ["data", "model"]  # fixtures


def explode_at(step, *, times=1):
    """A hook that makes the loss explode whenever the run comes to a step, so many times."""
    state = {"forward": 0, "left": times}

    def explode(x, hook):
        if not torch.is_grad_enabled():
            return None
        state["forward"] += 1
        if state["forward"] == 2 * step + 1 and state["left"]:
            state["left"] -= 1
            state["forward"] = 2 * 5  # the run goes back to the checkpoint of step 5
            return x * math.inf
        return None

    return explode


def test_a_diverging_run_goes_back_with_wider_gaps(model, data, tmp_path):
    recipe = a_recipe(guard=Guard(action="rollback", widen=2.0))
    run = train(model, data, tmp_path / "run", recipe=recipe, hook=explode_at(8))
    frozen = {site: record.step for record in run.history for site in record.frozen}
    planned = {str(event.site): event.step for event in recipe.events}
    for site, step in planned.items():
        assert frozen[site] == (step if step < 5 else 4 + 2 * (step - 4)), site
    assert run.recipe == dataclasses.replace(recipe.widened(5, 2.0), lr=recipe.lr / 2)
    assert len(run.history) == run.recipe.steps > STEPS
    assert [record.step for record in run.history] == list(range(len(run.history)))
    (told,) = [record for record in run.history if record.rollback]
    assert told.step == 5
    assert "KL divergence from the original nan" in told.rollback
    assert lf.live_sites(run.model) == ()
    assert all(math.isfinite(record.loss) for record in run.history)


def explode_in(steps):
    """A hook that makes the loss not finite in some steps of a run with two micro-batches."""
    state = {"forward": 0}

    def explode(x, hook):
        if not torch.is_grad_enabled():
            return None
        state["forward"] += 1
        return x * math.inf if (state["forward"] - 1) // 2 in steps else None

    return explode


def test_single_steps_that_run_away_are_passed_over_if_the_guard_allows_it(model, data, tmp_path):
    recipe = a_recipe(guard=Guard(in_a_row=3))
    run = train(model, data, None, recipe=recipe, hook=explode_in({4, 5, 12}))
    lost = [record.step for record in run.history if not math.isfinite(record.loss)]
    assert lost == [4, 5, 12]
    assert [record.step for record in run.history] == list(range(STEPS))
    assert lf.live_sites(run.model) == ()
    assert all(W.isfinite().all() for W in run.model.parameters())
    constants = [lf.get_norm(run.model, site).constant for site in lf.list_norm_sites(run.model)]
    assert all(math.isfinite(sigma) and sigma > 0 for sigma in constants)
    with pytest.raises(TrainingError, match=r"diverged at step 6: KL divergence .* nan"):
        train(model, data, None, recipe=recipe, hook=explode_in({2, 4, 5, 6}))


def test_where_it_began_is_looked_for_in_micro_batches(model, data):
    """Memory is enough for one; the sequence is numbered as in the whole batch."""
    sites = lf.with_norm_sites(model)
    lf.freeze_site(sites, "ln_final", 1e-6)
    norms, sizes = {"ln_final": lf.get_norm(sites, "ln_final")}, []

    def forward(tokens):
        sizes.append(len(tokens))
        if len(sizes) == 3:  # the others are as the live norm would have them
            lf.get_norm(sites, "ln_final").freeze(1e-6)
        else:
            lf.get_norm(sites, "ln_final").freeze(1e6)
        sites(tokens)

    found = find_runaway(sites, norms, data[:7], [], 10.0, forward, 2)
    assert sizes == [2, 2, 2, 1]
    assert "it began at ln_final" in found
    assert re.search("of sequence [45] has", found)

    def out_of_memory(tokens):
        raise torch.OutOfMemoryError

    assert find_runaway(sites, norms, data[:7], [], 10.0, out_of_memory, 2) is None


def test_a_run_that_has_had_no_step_since_it_was_resumed_has_no_token_to_name(model, data):
    sites = lf.with_norm_sites(model)
    lf.freeze_site(sites, "ln_final", 1e-6)
    norms = {"ln_final": lf.get_norm(sites, "ln_final")}
    assert find_runaway(sites, norms, data[:0], [], 10.0, sites, 2) is None


def test_a_run_that_diverges_again_and_again_stops(model, data, tmp_path):
    recipe = a_recipe(guard=Guard(action="rollback", rollbacks=2))
    with pytest.raises(TrainingError, match=r"diverged at step 8: .*2 rollbacks did not help"):
        train(model, data, tmp_path / "run", recipe=recipe, hook=explode_at(8, times=9))


@contextmanager
def poisoned_before(step):
    """The last update before a step ruins the weights, once; a hook that the run needs for it.

    Of a run with two micro-batches.
    """
    state, right = {"seen": 0}, torch.optim.AdamW.step

    def see(gradient, hook):
        state["seen"] += 1

    def update(self, *arguments, **more):
        result = right(self, *arguments, **more)
        if state["seen"] == 2 * step:
            state["seen"] += 1  # only once, whatever step the run goes back to
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", update)
        yield [("blocks.0.hook_mlp_out", see)]


def test_a_poisoned_checkpoint_is_passed_over(model, data, tmp_path):
    """Weights that one update ruined are noticed a step later; then the one before must do."""
    recipe = a_recipe(guard=Guard(action="rollback"))
    with poisoned_before(10) as hooks:
        run = train(model, data, tmp_path / "run", recipe=recipe, bwd_hooks=hooks)
    (told,) = [record for record in run.history if record.rollback]
    assert told.step == 5
    assert all(math.isfinite(record.loss) for record in run.history)


def test_a_run_that_went_back_can_be_interrupted_and_resumed(model, data, tmp_path):
    """What it took back is forgotten, the poisoned checkpoint too."""
    recipe = a_recipe(guard=Guard(action="rollback"))
    right, went_back = Trainer._step, []

    def step(self, number, rollback):
        went_back.append(rollback)
        if any(went_back) and number == 7:
            raise KeyboardInterrupt
        return right(self, number, rollback)

    with poisoned_before(10) as hooks, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(model, data, tmp_path / "run", recipe=recipe, bwd_hooks=hooks)
    run = train(model, data, tmp_path / "run", recipe=recipe, resume=True)
    assert lf.live_sites(run.model) == ()
    assert all(math.isfinite(record.loss) for record in run.history)


def test_the_newest_good_checkpoint_is_not_pruned(model, data, tmp_path):
    """A checkpoint at every step, and three bad steps in a row before the run counts as lost."""
    recipe = a_recipe(guard=Guard(action="rollback", in_a_row=4))
    with poisoned_before(9) as hooks:
        run = train(model, data, tmp_path / "run", recipe=recipe, bwd_hooks=hooks, every=1)
    (told,) = [record for record in run.history if record.rollback]
    assert told.step == 8
    assert all(math.isfinite(record.loss) for record in run.history[8:])


def test_which_checkpoints_were_good_is_known_after_a_pause(model, data, tmp_path):
    """The run stops at a step that went badly, behind a checkpoint of ruined weights."""
    recipe = a_recipe(guard=Guard(action="rollback", in_a_row=4))
    right, out = Trainer._step, tmp_path / "run"

    def step(self, number, rollback):
        if number == 11 and not self.divergence.rollbacks:
            raise KeyboardInterrupt
        return right(self, number, rollback)

    with poisoned_before(9) as hooks:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_step", step)
            with pytest.raises(KeyboardInterrupt):
                train(model, data, out, recipe=recipe, bwd_hooks=hooks, every=1)
        run = train(model, data, out, recipe=recipe, bwd_hooks=hooks, every=1, resume=True)
    (told,) = [record for record in run.history if record.rollback]
    assert told.step == 8
    assert all(math.isfinite(record.loss) for record in run.history[8:])


def test_a_constant_that_cannot_be_measured_is_a_reason_to_go_back(model, data, tmp_path):
    """Weights that are ruined just before a site is to be frozen."""
    recipe = a_recipe(
        guard=Guard(action="rollback"), statistics=Statistics(source="event"), special=Special()
    )
    at = next(event.step for event in recipe.events if event.step > 5)
    with poisoned_before(at) as hooks:
        run = train(model, data, tmp_path / "run", recipe=recipe, bwd_hooks=hooks)
    (told,) = [record for record in run.history if record.rollback]
    assert "sigma of" in told.rollback
    assert told.step == 5
    assert lf.live_sites(run.model) == ()
    assert all(math.isfinite(record.loss) for record in run.history)
    again, message = dataclasses.replace(recipe, guard=Guard()), f"at step {at}: the sigma of .* is"
    with poisoned_before(at) as hooks, pytest.raises(TrainingError, match=message):
        train(model, data, None, recipe=again, bwd_hooks=hooks)


def test_a_run_with_nothing_left_to_widen_stops_at_once(model, data, tmp_path):
    recipe = a_recipe(guard=Guard(action="rollback", slower=1.0)).vanilla()
    with pytest.raises(TrainingError, match="no event is left"):
        train(model, data, tmp_path / "run", recipe=recipe, hook=explode_at(8))


def test_going_back_needs_a_folder(model, data):
    recipe = a_recipe(guard=Guard(action="rollback"))
    with pytest.raises(RecipeError, match="give out="):
        train(model, data, None, recipe=recipe)


def test_verdicts():
    watch = DivergenceWatch(Guard(above_best=2.0, sigma_factor=10.0))
    assert watch.verdict(50.0, 1.0) is None  # there is nothing to compare with yet
    assert watch.verdict(5.9, 1.0, [4.0]) is None
    assert "2.1 above the lowest" in watch.verdict(6.1, 1.0, [4.0])
    assert "cross-entropy nan" in watch.verdict(math.nan, 1.0, [4.0])
    assert "gradient norm inf" in watch.verdict(4.0, math.inf, [4.0])
    assert watch.verdict(4.0, 1.0, [4.0], {"ln_final": 9.0}) is None
    assert "blocks.0.ln2 have 11 times" in watch.verdict(4.0, 1.0, [4.0], {"blocks.0.ln2": 11.0})
    assert "0.05 times" in watch.verdict(4.0, 1.0, [4.0], {"blocks.0.ln2": 0.05})
    assert "nan times" in watch.verdict(4.0, 1.0, [4.0], {"blocks.0.ln2": math.nan})
    # The usual may rise, and what was usual at its lowest counts.
    assert watch.verdict(5.9, 1.0, [5.8] * 20) is None
    assert "2.3 above the lowest" in watch.verdict(6.3, 1.0, [5.8] * 20)


def test_one_easy_sequence_is_not_what_later_ones_are_compared_with():
    """Cross-entropy of single sequences: one is of a few words again and again, all others not."""
    watch, losses = DivergenceWatch(Guard(above_best=3.0)), [3.2, 2.9, 3.4] * 10
    losses[12] = 0.3
    assert all(watch.verdict(x, 1.0, losses[:n]) is None for n, x in enumerate(losses))
    assert watch.best == pytest.approx(2.9, abs=0.31)
    assert "above the lowest usual so far" in watch.verdict(6.5, 1.0, losses)


def test_gradients_far_above_the_usual_are_thrown_away():
    usual = [1.0, 3.0, 2.0] * 20
    watch = DivergenceWatch(Guard(spike=5.0))
    assert watch.keeps(10.0, usual)
    assert not watch.keeps(10.1, usual)
    assert watch.keeps(400.0, [*usual, *[100.0] * 11])  # of the last 20 the most
    assert watch.keeps(400.0, usual[:9])  # too few to say what is usual
    assert watch.keeps(10.0, [*usual, math.inf, math.nan])
    assert not watch.keeps(math.nan, [])
    assert DivergenceWatch(Guard()).keeps(1e30, usual)
    assert not DivergenceWatch(Guard()).keeps(math.inf, usual)
    with pytest.raises(RecipeError, match="must be above 1"):
        Guard(spike=1.0)


def test_a_step_with_such_a_gradient_leaves_the_weights(model, data):
    def weights(steps, spike):
        passes = []

        def steep(x, hook):  # the same value; in step 20 the gradient is 1e6 times as large
            if torch.is_grad_enabled():
                passes.append(1)
            return x + 1e6 * (x - x.detach()) if len(passes) > 2 * 20 else x

        recipe = a_recipe(events=(), steps=steps, decay_steps=99, guard=Guard(spike=spike))
        recipe = dataclasses.replace(
            recipe, special=Special(), precision="float32", weight_average=0.0
        )
        hooks = [("blocks.0.hook_mlp_out", steep)]
        run = lf.remove_norms(model, recipe, data, fwd_hooks=hooks, progress=False, log_every=0)
        return run.model.state_dict(), [record.step for record in run.history if record.skipped]

    (before, none), (after, skipped), (stepped, nor_here) = (
        weights(20, 5.0),
        weights(21, 5.0),
        weights(21, None),
    )
    assert (none, skipped, nor_here) == ([], [20], [])
    # Constants of live sites are NaN.
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert not torch.equal(before["embed.W_E"], stepped["embed.W_E"])


def test_steps_in_a_row():
    watch = DivergenceWatch(Guard(above_best=2.0, in_a_row=2))
    for loss, wrong, diverged in ((1, 0, 0), (4, 1, 0), (2, 0, 0), (4, 1, 0), (9, 1, 1)):
        assert (watch.verdict(float(loss), 1.0, [1.0]) is not None) is bool(wrong)
        assert watch.diverged is bool(diverged)
    assert watch.best == 1
    with pytest.raises(RecipeError, match="in_a_row=0: give a number of steps"):
        Guard(in_a_row=0)


@pytest.mark.parametrize(("in_a_row", "at"), [(1, 20), (3, 22)])
def test_a_sigma_that_runs_away_is_noticed(model, data, in_a_row, at):
    """Though it is measured every ten steps, while nothing is wrong."""

    def inflate(x, hook):
        if inflate.on:
            return 100 * x
        return None

    inflate.on = False

    def watch(x, hook):
        inflate.on = torch.is_grad_enabled() and watch.forwards >= 2 * 20
        watch.forwards += torch.is_grad_enabled()

    watch.forwards = 0
    guard = Guard(above_best=1e9, sigma_factor=5.0, in_a_row=in_a_row)
    with pytest.raises(TrainingError, match=f"at step {at}: the inputs of"):
        lf.remove_norms(
            model, a_recipe(guard=guard), data, progress=False, log_every=10,
            fwd_hooks=[("hook_embed", watch), ("blocks.0.hook_resid_mid", inflate)],
        )  # fmt: skip


def test_early_stop_waits_for_the_last_event(model, data):
    recipe = a_recipe(patience=2, evaluate_every=2, steps=60, lr=1e-9, distillation=0.0)
    run = lf.remove_norms(model, recipe, data, heldout=data[:4], progress=False)
    evaluated = [record.step for record in run.history if record.heldout is not None]
    assert evaluated == list(range(1, len(run.history), 2))
    assert recipe.removed_at <= run.history[-1].step < 30
    assert lf.live_sites(run.model) == ()


def test_a_held_out_loss_that_is_no_number_is_not_the_best(model, data, monkeypatch):
    recipe = a_recipe(patience=2, evaluate_every=2, steps=40, lr=1e-9, distillation=0.0)
    recipe = dataclasses.replace(recipe, events=recipe.events[:1], special=Special())
    losses = itertools.chain([4.0, 3.0, math.nan], itertools.count(2.9, -0.01))
    monkeypatch.setattr(Trainer, "_heldout_loss", lambda self, heldout: next(losses))
    run = lf.remove_norms(model, recipe, data, heldout=data[:4], progress=False)
    assert run.history[-1].step == 39
    losses = itertools.repeat(math.nan)
    run = lf.remove_norms(model, recipe, data, heldout=data[:4], progress=False)
    assert run.history[-1].step < 10


def test_held_out_loss_is_that_of_the_model_at_that_step(model, data):
    recipe = a_recipe(steps=20, evaluate_every=20, precision="float32", patience=None)
    run = lf.remove_norms(model, recipe, data, heldout=data[:6], progress=False)
    assert [r.step for r in run.history if r.heldout is not None] == [19]
    expected = lf.evaluate_loss(run.model, data[:6]).mean
    assert run.history[-1].heldout == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distillation", [1.0, 0.0])
def test_a_batch_of_difficult_text_is_no_divergence_for_a_run_that_distils(distillation):
    """The text's own loss differs by more than the guard allows; the distance does not."""
    model = live_model("gpt2", torch.float32, n_layer=2)
    with torch.no_grad():
        model.unembed.b_U[7] = 20.0
    data = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(3))
    data[::2] = 7
    recipe = Recipe(
        events=(), steps=8, batch=1, lr=1e-6, warmup=0, final_lr=1.0, precision="float32",
        distillation=distillation, scale_anchor=0.0,
    )  # fmt: skip
    if distillation:
        run = lf.remove_norms(model, recipe, data, progress=False)
        losses = [record.loss for record in run.history]
        assert max(losses) > min(losses) + recipe.guard.above_best
    else:
        with pytest.raises(TrainingError, match=r"cross-entropy .* above the lowest usual so far"):
            lf.remove_norms(model, recipe, data, progress=False)


def test_a_run_that_distils_is_watched_by_its_distance(model, data, tmp_path):
    recipe = a_recipe(distillation=0.5, guard=Guard(above_best=1e-9))
    with pytest.raises(TrainingError, match=r"from the original .* above the lowest"):
        train(model, data, tmp_path / "run", recipe=recipe)
