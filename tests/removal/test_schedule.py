"""When each norm goes, and at which learning rate."""

import math

import pytest

import lnfree_interp as lf
from lnfree_interp.errors import RecipeError
from lnfree_interp.removal.schedule import cosine_with_warmup, published_order, sequential_sites


def test_published_order():
    events = published_order(sequential_sites(3), start=20, ln2_gap=2, qk_gap=2, v_gap=3)
    steps = {str(event.site): event.step for event in events}
    assert steps == {
        "blocks.0.ln2": 20, "blocks.1.ln2": 22, "blocks.2.ln2": 24,
        "blocks.0.ln1.qk": 26, "blocks.1.ln1.qk": 28, "blocks.2.ln1.qk": 30,
        "blocks.0.ln1.v": 32, "blocks.1.ln1.v": 35, "blocks.2.ln1.v": 38,
        "ln_final": 41,
    }  # fmt: skip


def test_order_reproduces_the_published_steps_of_gpt2_small():
    """gpt2_aux of 2507.02559: ln2 20 (2), qk 44 (2), v 68 (3), ln_f 104."""
    events = published_order(sequential_sites(12), start=20, ln2_gap=2, qk_gap=2, v_gap=3)
    first = {kind: min(e.step for e in events if e.site.kind == kind) for kind in
             ("ln2", "ln1.qk", "ln1.v", "ln_final")}  # fmt: skip
    assert first == {"ln2": 20, "ln1.qk": 44, "ln1.v": 68, "ln_final": 104}


def test_learning_rate():
    rates = [cosine_with_warmup(s, steps=100, warmup=10, floor=0.1) for s in range(101)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize("n_layers", [1, 4, 12])
@pytest.mark.parametrize("steps", [130, 200, 1000])
def test_our_recipe_spreads_its_events_and_leaves_time_to_recover(steps, n_layers):
    events = lf.recipes.distilled(sequential_sites(n_layers), steps=steps).events
    assert (
        len({event.site for event in events}) == len({e.step for e in events}) == 3 * n_layers + 1
    )
    if steps >= 40 * n_layers:
        assert max(event.step for event in events) <= steps // 4


def test_our_recipe_needs_a_step_for_every_event():
    events = lf.recipes.distilled(sequential_sites(4), steps=13).events
    assert max(event.step for event in events) == 12
    with pytest.raises(RecipeError, match="12 steps are too few for 13 norm sites"):
        lf.recipes.distilled(sequential_sites(4), steps=12)
