"""The finished model has a moving average of the weights."""

from dataclasses import replace

import pytest
import torch
from support.loaded import live_model

import lnfree_interp as lf
from lnfree_interp.errors import RecipeError
from lnfree_interp.removal.optimizer import PartialAdamW
from lnfree_interp.removal.schedule import last_step
from lnfree_interp.removal.weight_average import KEY, WeightAverage

TEXT = torch.randint(300, (40, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model():
    return live_model("gpt2", torch.float32, n_layer=2)


def a_recipe(model, **changes):
    recipe = lf.recipes.distilled(model, steps=30)
    return replace(recipe, batch=2, precision="float32", evaluate_every=30, **changes)


def test_the_average_by_brute_force(model, monkeypatch):
    """From the step on at which the last site is frozen."""
    recipe, seen, update = a_recipe(model, weight_average=0.75), [], WeightAverage.update

    def seen_update(self):
        moved = [w.detach().double().clone() for group in self.optimizer.param_groups
                 for w in group["params"] if self.optimizer.state.get(w)]  # fmt: skip
        seen.append(torch.cat([w.flatten() for w in moved]))
        update(self)

    monkeypatch.setattr(WeightAverage, "update", seen_update)
    run = lf.remove_norms(model, recipe, TEXT, heldout=TEXT[:5], progress=False)
    assert len(seen) == 30 - last_step(recipe.events)
    expected = seen[0]
    for number, weights in enumerate(seen[1:], start=1):
        kept = min(0.75, number / (number + 1))
        expected = kept * expected + (1 - kept) * weights
    decayed = [p for n, p in run.model.named_parameters() if ".W_" in n or n.startswith("W_")]
    others = [p for n, p in run.model.named_parameters() if not any(p is x for x in decayed)]
    found = torch.cat([p.detach().double().flatten() for p in (*decayed, *others)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found, seen[-1], rtol=1e-5, atol=1e-7)
    loss = run.model(TEXT[:5], return_type="loss").item()
    assert run.history[-1].heldout == pytest.approx(loss, rel=1e-5)


def test_training_does_not_feel_it(model):
    plain, averaged = (
        lf.remove_norms(model, a_recipe(model, **more), TEXT, heldout=TEXT[:5], progress=False)
        for more in ({}, {"weight_average": 0.9})
    )
    assert [r.loss for r in plain.history] == [r.loss for r in averaged.history]
    assert plain.history[-1].heldout != averaged.history[-1].heldout


def test_weights_that_move_later_begin_later():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = PartialAdamW([{"params": weights}], [], [], lr=1.0, weight_decay=0.0)
    average = WeightAverage(optimizer, torch.nn.Module(), 0.5)
    with average.in_place():  # there is none yet
        average.update()
    for step, moved in enumerate((weights[:1], weights), start=1):
        for weight in moved:
            weight.grad = torch.ones(2)
        optimizer.step()
        average.update()
        assert (KEY in optimizer.state.get(weights[1], {})) is (step == 2)
    latest = [weight.detach().clone() for weight in weights]
    with average.in_place():
        assert not torch.equal(weights[0], latest[0])
        assert torch.equal(weights[1], latest[1])
    assert all(map(torch.equal, weights, latest))


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_a_share_of_one_never_moves(model, share):
    with pytest.raises(RecipeError, match="weight_average is a share"):
        a_recipe(model, weight_average=share)
