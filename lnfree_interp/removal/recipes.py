"""Recipes: functions that return a `Recipe`.

The published ones come from two repositories. What they share: AdamW, gradients clipped at 1,
sequences of 1024 tokens of OpenWebText packed with end-of-text, the order `ln2`, `ln1` for queries
and keys, `ln1` for values, `ln_final`. Not repeated here: dropout, bfloat16 master weights, masked
end-of-text targets, a special sigma on channel 0 (docs/removal.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lnfree_interp.errors import TooFewStepsError
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import (
    Event,
    Sites,
    all_at_once,
    paced,
    published_order,
    sequential_sites,
    sites_of,
    taper,
)
from lnfree_interp.removal.sensitivity import SiteSensitivity
from lnfree_interp.removal.settings import Guard, Special, Statistics, Wait

__all__ = [
    "BY_NAME",
    "Recipe",
    "at_once",
    "distilled",
    "finetuning",
    "from_scratch",
    "gpt2_large",
    "gpt2_medium",
    "gpt2_small",
    "gpt2_small_2024",
    "gpt2_xl",
    "measured",
    "published_style",
    "tapered",
]

_CONFIG = "submarat/removing-layer-norm, config.py"
_TRAIN = "submarat/removing-layer-norm, train.py"
_SOURCES = {
    "events, steps, batch, lr, final_lr, warmup, scale_anchor": f"{_CONFIG}; 2507.02559",
    "decay_steps": f"{_CONFIG}: max_steps, published as a checkpoint before the end",
    "statistics": f"{_TRAIN} with EXP_RECOMPUTE_STD_ON_REAL=1, as its runners set it; there once "
    "per micro-batch, hence momentum to their number; one buffer for ln1.qk and ln1.v",
    "clip, weight_decay": f"{_TRAIN}: 1.0 and 0.01",
    "betas": "transformers.TrainingArguments' defaults",
    "batch": f"{_CONFIG}: sequences per micro-batch times accumulation steps",
}


def _published(
    n_layers: int,
    *,
    name: str,
    steps: int,
    micro_batch: int,
    accumulation: int,
    lr: float,
    min_lr: float,
    warmup: int,
    anchor: float,
    momentum: float,
    start: int,
    gaps: tuple[int, int, int],
    decay_steps: int | None = None,
) -> Recipe:
    ln2_gap, qk_gap, v_gap = gaps
    return Recipe(
        name=name,
        events=published_order(
            sequential_sites(n_layers), start=start, ln2_gap=ln2_gap, qk_gap=qk_gap, v_gap=v_gap
        ),
        steps=steps,
        decay_steps=decay_steps,
        batch=micro_batch * accumulation,
        micro_batch=micro_batch,
        lr=lr,
        final_lr=min_lr / lr,
        warmup=warmup,
        betas=(0.9, 0.999),
        scale_anchor=anchor,
        statistics=Statistics(source="ema", momentum=momentum**accumulation, share_ln1=True),
        sequence_length=1024,
        sources=_SOURCES,
    )


def gpt2_small(*, anchor: bool = True) -> Recipe:
    """2507.02559's recipe for GPT-2 small: 300 steps, 157M tokens, schaeff/gpt2-small_LNFree300.

    Args:
        anchor: With the auxiliary loss, as published; or their variant without it.

    Returns:
        A `Recipe` for the 37 norm sites of a model with 12 blocks.

    Source:
        arXiv 2507.02559; settings of https://github.com/submarat/removing-layer-norm, config.py.

    Examples:
        >>> recipe = lf.recipes.gpt2_small()
        >>> len(recipe.events), recipe.steps
        (37, 300)
    """
    return _published(
        12,
        name="gpt2_aux" if anchor else "gpt2",
        steps=300,
        micro_batch=32 if anchor else 40,
        accumulation=16 if anchor else 12,
        lr=6e-4,
        min_lr=3e-4,
        warmup=25 if anchor else 20,
        anchor=0.1 if anchor else 0.0,
        momentum=0.9,
        start=20,
        gaps=(2, 2, 3),
    )


def gpt2_medium(*, anchor: bool = True) -> Recipe:
    """2507.02559's recipe for GPT-2 medium: 500 steps, 259M tokens.

    Args:
        anchor: With the auxiliary loss, as published; or their variant without it.

    Returns:
        A `Recipe` for the 73 norm sites of a model with 24 blocks.

    Source:
        arXiv 2507.02559; settings of https://github.com/submarat/removing-layer-norm, config.py.

    Examples:
        >>> recipe = lf.recipes.gpt2_medium()
        >>> len(recipe.events), recipe.steps
        (73, 500)
    """
    return _published(
        24,
        name="medium_fasttune_aux" if anchor else "medium_fasttune",
        steps=500,
        micro_batch=22,
        accumulation=23,
        lr=6e-4,
        min_lr=3e-4,
        warmup=10,
        anchor=0.1 if anchor else 0.0,
        momentum=0.9,
        start=20,
        gaps=(2, 2, 3),
    )


def gpt2_large(*, anchor: bool = True) -> Recipe:
    """2507.02559's recipe for GPT-2 large: published at step 600 of 1200, 310M tokens.

    Args:
        anchor: With the auxiliary loss, as published; or their variant without it, 1200 steps.

    Returns:
        A `Recipe` for the 109 norm sites of a model with 36 blocks.

    Source:
        arXiv 2507.02559; settings of https://github.com/submarat/removing-layer-norm, config.py.

    Examples:
        >>> recipe = lf.recipes.gpt2_large()
        >>> len(recipe.events), recipe.steps
        (109, 600)
    """
    return _published(
        36,
        name="large_aux" if anchor else "large",
        steps=600 if anchor else 1200,
        decay_steps=1200,
        micro_batch=28,
        accumulation=18,
        lr=3e-4,
        min_lr=4e-5,
        warmup=15,
        anchor=0.03 if anchor else 0.0,
        momentum=0.912,
        start=30,
        gaps=(4, 4, 6),
    )


def gpt2_xl(*, anchor: bool = True) -> Recipe:
    """2507.02559's recipe for GPT-2 XL: published at step 800 of 1200, 413M tokens.

    Args:
        anchor: With the auxiliary loss, as published; or their variant without it, 1200 steps.

    Returns:
        A `Recipe` for the 145 norm sites of a model with 48 blocks.

    Source:
        arXiv 2507.02559; settings of https://github.com/submarat/removing-layer-norm, config.py.

    Examples:
        >>> recipe = lf.recipes.gpt2_xl()
        >>> len(recipe.events), recipe.steps
        (145, 800)
    """
    return _published(
        48,
        name="xl_aux" if anchor else "xl",
        steps=800 if anchor else 1200,
        decay_steps=1200,
        micro_batch=18,
        accumulation=28,
        lr=1e-4,
        min_lr=2e-5,
        warmup=20,
        anchor=0.01 if anchor else 0.0,
        momentum=0.942,
        start=50 if anchor else 20,
        gaps=(4, 4, 6) if anchor else (2, 2, 3),
    )


def gpt2_small_2024() -> Recipe:
    """2409.13710's recipe for GPT-2 small: 1200 steps, 590M tokens, apollo-research/gpt2_noLN.

    Position 0 has its own sigma until step 1160, end-of-text (on the value path) until 1060. Their
    code put the special sigma on channel 0 instead of position 0; this is what was meant.

    Returns:
        A `Recipe` for the 37 norm sites of a model with 12 blocks.

    Source:
        arXiv 2409.13710; settings of https://github.com/ApolloResearch/gpt2_noLN, train.py.

    Examples:
        >>> recipe = lf.recipes.gpt2_small_2024()
        >>> recipe.special.first_until, recipe.removed_at
        (1160, 1160)
    """
    code = "ApolloResearch/gpt2_noLN"
    return Recipe(
        name="gpt2_noLN hf_1200",
        events=published_order(
            sequential_sites(12), start=200, ln2_gap=20, qk_gap=20, v_gap=30
        ),
        steps=1200,
        decay_steps=2000,
        batch=480,
        micro_batch=48,
        lr=6e-4,
        final_lr=0.1,
        warmup=100,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        scale_anchor=0.0,
        statistics=Statistics(source="start", tokens="ordinary"),
        special=Special(
            first_until=1160, end_of_text_until=1060, end_of_text_kinds=("ln1.v",)
        ),
        sequence_length=1024,
        sources={
            "events, special": f"{code}, train.py; 2409.13710",
            "steps, decay_steps": f"{code}: stopped at 1200 of a decay over 2000",
            "batch, lr, final_lr, warmup, weight_decay, betas, clip": f"{code}, nanoGPT settings",
            "statistics": f"{code}, std_dicts.py: constants of the original model, written down; "
            "measured here before the first step",
        },
    )  # fmt: skip


def _scaled_gaps(model: Sites, steps: int) -> tuple[int, tuple[int, int, int]]:
    """Start and gaps of the published order, stretched so that events take a quarter of a run."""
    sites = sites_of(model)
    if steps < len(sites):
        raise TooFewStepsError(f"{steps} steps are too few for {len(sites)} norm sites", len(sites))
    start = min(steps // 30, steps - len(sites))
    one = published_order(sites, start=0, ln2_gap=2, qk_gap=2, v_gap=3)
    unit = (steps // 4 - start) // max(1, one[-1].step)
    return start, (2 * unit, 2 * unit, 3 * unit) if unit > 0 else (1, 1, 1)


def published_style(model: Sites, *, steps: int = 250, seed: int = 0) -> Recipe:
    """2507.02559's recipe for GPT-2 small on any model, and in any number of steps.

    The same order, ratio of gaps, moving-average sigma, auxiliary loss and learning rates. Events
    take the first quarter of the steps (theirs: the first third); with few steps they follow each
    other without gaps.

    Args:
        model: A model or its sites.
        steps: Optimiser steps.
        seed: The random seed of the order of the text.

    Returns:
        A `Recipe` for every norm site of the model.

    Raises:
        TooFewStepsError: if there are fewer steps than norm sites.
        RecipeError: if there are no norm sites.

    Source:
        arXiv 2507.02559; that it scales to any model and number of steps is ours.

    Examples:
        >>> recipe = lf.recipes.published_style(model, steps=100)
        >>> len(recipe.events), recipe.removed_at < recipe.steps / 3
        (13, True)
    """
    start, (ln2_gap, qk_gap, v_gap) = _scaled_gaps(model, steps)
    return Recipe(
        name="published style",
        events=published_order(model, start=start, ln2_gap=ln2_gap, qk_gap=qk_gap, v_gap=v_gap),
        steps=steps,
        batch=16,
        lr=6e-4,
        final_lr=0.5,
        warmup=min(20, steps // 12),
        betas=(0.9, 0.999),
        scale_anchor=0.1,
        statistics=Statistics(source="ema", momentum=0.5, share_ln1=True),
        seed=seed,
        sources={"all but steps and batch": f"{_CONFIG}, gpt2_aux, scaled"},
    )


def distilled(model: Sites, *, steps: int = 250, seed: int = 0) -> Recipe:
    """This project's recipe: the published order, and the original's distribution as the target.

    Events take the first quarter of the steps, with the gaps of the published schedule for GPT-2
    small (2, 2 and 3 steps per layer; 2507.02559) or a multiple of them; they follow each other
    without gaps if there are few steps. In the other steps the model recovers, at a learning rate
    that falls to half. The loss is the KL divergence from the original instead of cross-entropy, so
    that the model keeps what a short fine-tuning on little text would unlearn
    (docs/benchmarks.md). Batches are small, so that there are more steps for as many tokens.

    Args:
        model: A model or its sites, of any architecture.
        steps: Optimiser steps.
        seed: The random seed of the order of the text.

    Returns:
        A `Recipe` for every norm site of the model.

    Raises:
        TooFewStepsError: if there are fewer steps than norm sites.
        RecipeError: if there are no norm sites.

    Source:
        Ours: distillation (arXiv 1503.02531) in the order of arXiv 2507.02559, so that the model is
        held to the original and not to the text.

    Examples:
        >>> recipe = lf.recipes.distilled(model, steps=100)
        >>> recipe.distillation, len(recipe.events)
        (1.0, 13)
        >>> str(recipe.events[0].site), str(recipe.events[-1].site)
        ('blocks.0.ln2', 'ln_final')
    """
    start, (ln2_gap, qk_gap, v_gap) = _scaled_gaps(model, steps)
    events = published_order(model, start=start, ln2_gap=ln2_gap, qk_gap=qk_gap, v_gap=v_gap)
    return _distilling("distilled", events, steps, seed)


def _distilling(name: str, events: Sequence[Event], steps: int, seed: int) -> Recipe:
    return Recipe(
        name=name,
        events=tuple(events),
        steps=steps,
        batch=8,
        lr=4e-4,
        warmup=min(20, steps // 10),
        final_lr=0.5,
        distillation=1.0,
        seed=seed,
    )


def measured(costs: SiteSensitivity | Sites, *, steps: int = 1000, seed: int = 0) -> Recipe:
    """This project's recipe for any model, from a measurement of what each of its norms costs.

    If activations are ordinary, it has the schedule of `distilled`, in batches of a quarter of its
    size, so that there are four times as many steps for as much text, at a lower learning rate that
    falls to a tenth. The original's distribution is a target with little noise, so that small
    batches lose nothing by it (docs/benchmarks.md).

    If the measurement finds massive activations, norms go slowly: the cheapest begin first, and an
    expensive one has more time. What ends a removal of such a model is a token that a frozen norm
    makes too large: it grows from layer to layer, because a gated MLP answers with the square. So
    there is a cap on how large a token may come out, which rises once all sites are frozen, until
    it is gone; sigma follows the text until then; terms of the loss pull outliers down and hold the
    residual stream to the original's; and the schedule waits while the model is far from the
    original. First tokens keep a constant of their own if they need one; such a model is exact, but
    cannot be folded.

    Args:
        costs: `lf.site_sensitivity(model, text)`. A model or its sites: without a measurement every
            site is taken to cost the same, and activations to be ordinary.
        steps: Optimiser steps.
        seed: The random seed of the order of the text.

    Returns:
        A `Recipe` for every site that was measured.

    Raises:
        TooFewStepsError: if there are fewer than eight steps.
        RecipeError: if there are no norm sites.

    Source:
        Ours, with distillation (arXiv 1503.02531); massive activations: arXiv 2402.17762.

    Examples:
        >>> costs = lf.site_sensitivity(model, tokens, progress=False)
        >>> recipe = lf.recipes.measured(costs, steps=100)
        >>> recipe.name, recipe.events == lf.recipes.distilled(model, steps=100).events
        ('measured', True)
    """
    if steps < 8:
        raise TooFewStepsError(f"{steps} steps are too few to let norms go one by one", 8)
    if not isinstance(costs, SiteSensitivity):
        return _at_pace(dict.fromkeys(sites_of(costs), 0.0), steps, seed)
    by_site = {site: cost.divergence for site, cost in costs.first_apart.items()}
    if not (costs.first_matters or any(costs.outliers.values())):
        return _at_pace(by_site, steps, seed)
    return _slowly(by_site, steps, seed, keep_first=costs.first_matters)


def _at_pace(costs: Mapping[NormSite, float], steps: int, seed: int) -> Recipe:
    """As `distilled`; with fewer steps than sites the cheapest first, some at once."""
    if steps >= len(costs):
        recipe = distilled(sorted(costs, key=lambda site: site.order), steps=steps, seed=seed)
    else:
        start = steps // 30
        events = paced(costs, start=start, over=steps // 4 - start)
        recipe = _distilling("measured", events, steps, seed)
    return replace(
        recipe, name="measured", batch=2, micro_batch=2, lr=3e-4, final_lr=0.1, evaluate_every=200
    )


def _slowly(costs: Mapping[NormSite, float], steps: int, seed: int, *, keep_first: bool) -> Recipe:
    """Every site fades, under a cap that rises afterwards; a fifth of the steps is for waiting."""
    wait = max(1, steps // 5)
    scheduled = steps - wait
    start, fade, frozen = scheduled // 30, round(0.25 * scheduled), round(0.4 * scheduled)
    return Recipe(
        name="measured",
        events=paced(costs, start=start, over=frozen - fade - start, fade=fade),
        steps=steps,
        batch=4,
        lr=1e-4,
        warmup=min(20, steps // 10),
        final_lr=0.1,
        distillation=1.0,
        scale_anchor=0.0,
        losses={"stream": 1.0, "outliers": 0.3},
        statistics=Statistics(source="ema", tokens="ordinary", sequences=8, follow_frozen=True),
        special=Special(
            keep_first=keep_first,
            outliers_from=frozen,
            outliers_until=round(0.85 * scheduled),
        ),
        wait=Wait(above=0.3, steps=wait),
        seed=seed,
    )


def tapered(model: Sites, *, steps: int = 250, seed: int = 0) -> Recipe:
    """TaperNorm's schedule: one gate for all sites, live for a tenth of the steps, closed at half.

    The constant is the least squares one, followed by a moving average, and the auxiliary loss has
    a fixed target; learning rates as in `published_style`. Unlike in the paper the final norm fades
    too. (2602.10408)

    Args:
        model: A model or its sites, of any architecture.
        steps: Optimiser steps.
        seed: The random seed of the order of the text.

    Returns:
        A `Recipe` for every norm site of the model.

    Raises:
        TooFewStepsError: if there are fewer than ten steps.
        RecipeError: if there are no norm sites.

    Source:
        arXiv 2602.10408

    Examples:
        >>> recipe = lf.recipes.tapered(model, steps=100)
        >>> recipe.events[0].step, recipe.removed_at
        (10, 50)
    """
    if steps < 10:
        raise TooFewStepsError(f"{steps} steps are too few for a taper", 10)
    return Recipe(
        name="taper",
        events=taper(model, start=steps // 10, over=steps // 2 - steps // 10),
        steps=steps,
        batch=16,
        lr=6e-4,
        warmup=min(20, steps // 12),
        final_lr=0.5,
        betas=(0.9, 0.999),
        anchor_target="frozen",
        statistics=Statistics(source="ema", average="least_squares"),
        seed=seed,
    )


def at_once(model: Sites, *, steps: int = 250, seed: int = 0) -> Recipe:
    """Every norm at one step, when the warm-up is over, with distillation from the original.

    Learning rates as in `published_style`.

    Args:
        model: A model or its sites, of any architecture.
        steps: Optimiser steps.
        seed: The random seed of the order of the text.

    Returns:
        A `Recipe` for every norm site of the model.

    Raises:
        RecipeError: if there are no norm sites, or no steps.

    Source:
        Ours, to compare schedules with; distillation: arXiv 1503.02531.

    Examples:
        >>> recipe = lf.recipes.at_once(model, steps=120)
        >>> {event.step for event in recipe.events}
        {10}
    """
    warmup = min(20, steps // 12)
    return Recipe(
        name="all at once",
        events=all_at_once(model, step=warmup),
        steps=steps,
        batch=16,
        lr=6e-4,
        warmup=warmup,
        final_lr=0.5,
        betas=(0.9, 0.999),
        distillation=1.0,
        guard=Guard(above_best=20.0),  # the loss jumps with the norms, and may come down again
        seed=seed,
    )


def from_scratch(*, steps: int = 1000, batch: int = 16, seed: int = 0) -> Recipe:
    """Training of a model from its first weights, at the rates of the bundled checkpoint.

    Args:
        steps: Optimiser steps.
        batch: Sequences of text per step.
        seed: The random seed of the order of the text; the model's weights have their own.

    Returns:
        A `Recipe` without events, for `lf.train`: AdamW with a peak learning rate of 2e-3 and
            weight decay 0.1, a warm-up over a twenty-fifth of the steps, a cosine to a fiftieth.

    Source:
        Ours: how the bundled checkpoint was trained (`lnfree_interp/bundled/train.py`).

    Examples:
        >>> lf.recipes.from_scratch(steps=400).warmup
        16
    """
    return Recipe(
        name="from scratch",
        events=(),
        steps=steps,
        batch=batch,
        lr=2e-3,
        warmup=steps // 25,
        final_lr=0.02,
        weight_decay=0.1,
        scale_anchor=0.0,
        seed=seed,
    )


def finetuning(
    *, steps: int = 250, batch: int = 8, distillation: float = 0.0, seed: int = 0
) -> Recipe:
    """Fine-tuning of a checkpoint, at the rates of `distilled`.

    Args:
        steps: Optimiser steps.
        batch: Sequences of text per step.
        distillation: The share of the KL divergence from the teacher in the loss, which is the
            model before the first step unless another is given.
        seed: The random seed of the order of the text.

    Returns:
        A `Recipe` without events, for `lf.finetune`.

    Source:
        Ours: `distilled` without its events.

    Examples:
        >>> lf.recipes.finetuning(steps=100).lr
        0.0004
    """
    recipe = _distilling("fine-tuning", (), steps, seed)
    return replace(recipe, batch=batch, distillation=distillation, scale_anchor=0.0)


BY_NAME = {
    "measured": measured,
    "distilled": distilled,
    "published-style": published_style,
    "taper": tapered,
    "at-once": at_once,
    "gpt2-small": gpt2_small,
    "gpt2-medium": gpt2_medium,
    "gpt2-large": gpt2_large,
    "gpt2-xl": gpt2_xl,
    "gpt2-small-2024": gpt2_small_2024,
}
"""The recipes of `lnfree remove --recipe` by name."""
