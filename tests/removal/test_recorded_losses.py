"""A seed's losses stay what they were, whatever becomes of the code that computes them.

Weights and losses are float64, so that the numbers hold on every machine. GPT-2's loss is computed
in chunks, Gemma 2's from all logits at once, because they are capped.
"""

import json
from pathlib import Path

import pytest
import torch
from support.architectures import make_model

import lnfree_interp as lf
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import Ramp, taper
from lnfree_interp.removal.settings import Guard, Special, Statistics

TERMS = ("cross_entropy", "distillation", "scale_anchor")
RECORDED = json.loads(Path(__file__).with_name("recorded_losses.json").read_text())


def train(architecture):
    model = lf.load(make_model(architecture), dtype=torch.float64, check=False)
    data = torch.randint(300, (40, 24), generator=torch.Generator().manual_seed(3))
    recipe = Recipe(
        events=taper(model, start=1, over=4), steps=10, batch=4, micro_batch=2, lr=2e-4, warmup=2,
        final_lr=0.1, distillation=Ramp(1.0, 0.3, 2, 8), scale_anchor=Ramp(0.2, 0.05, 1, 8),
        anchor_target="frozen", special=Special(first_until=7), evaluate_every=5,
        statistics=Statistics(source="ema", tokens="ordinary", sequences=4),
        guard=Guard(above_best=1e9, sigma_factor=1e12),
    )  # fmt: skip
    return lf.remove_norms(model, recipe, data, heldout=data[:5], progress=False)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_the_losses_are_those_that_were_recorded(architecture):
    run = train(architecture)
    found = {
        **{name: [record.losses[name] for record in run.history] for name in TERMS},
        "gradient": [record.gradient for record in run.history],
        "heldout": [r.heldout for r in run.history if r.heldout is not None],
    }
    for name, values in RECORDED[architecture].items():
        assert found[name] == pytest.approx(values, rel=1e-9), name
