"""Recipes: functions that return a `Recipe`. Those made for GPT-2 itself: `published_recipes`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lnfree_interp.errors import TooFewStepsError
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.removal.published_recipes import (
    CONFIG,
    gpt2_large,
    gpt2_medium,
    gpt2_small,
    gpt2_small_2024,
    gpt2_xl,
)
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import (
    Event,
    Ramp,
    Sites,
    all_at_once,
    paced,
    published_order,
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
        sources={"all but steps and batch": f"{CONFIG}, gpt2_aux, scaled"},
    )


def distilled(model: Sites, *, steps: int = 250, seed: int = 0) -> Recipe:
    """This project's recipe: the published order, and the original's distribution as the target.

    Events take the first quarter of the steps, with the gaps of the published schedule for GPT-2
    small (2, 2 and 3 steps per layer; 2507.02559) or a multiple of them; they follow each other
    without gaps if there are few steps. In the other steps the model recovers, at a learning rate
    that falls to half. The loss is the KL divergence from the original instead of cross-entropy, so
    that the model keeps what a short fine-tuning on little text would unlearn
    (docs/results/removal.md). Batches are small, so that there are more steps for as many tokens.

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
    batches lose nothing by it (docs/results/removal.md).

    If the measurement finds massive activations, norms go slowly. What ends a removal of such a
    model is a token that a frozen norm makes too large: it grows from layer to layer, because a
    gated MLP answers with the square. So the tokens are first brought to one scale at every site,
    by a term of the loss whose weight rises, while the norms are still live: then a norm does
    nothing that a constant does not do. Stretches of repeated tokens, which the model takes for
    first ones, and of random tokens, which are rare in text, are put into the text for that, and
    rows of W_E that are longer than the text's are shortened. After a third of the steps sites
    begin to fade, the cheapest first, and an expensive one has more time; sigma follows the text
    until its site is frozen. A cap on how large a token may come out rises once all sites are
    frozen, and stays; another term holds the residual stream to the original's; the finished model
    has the average of the last weights; the schedule waits while the model is far from the
    original; and one sequence that runs away does not end the run, three steps in a row do.

    Where the MLPs that make massive activations keep their norms (every `ln2` that is to go costs
    at most `COSTLY` alone), these do no harm: sites fade from the start, and first tokens keep a
    constant of their own if they need one. Such a model is exact, but cannot be folded.

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
        Ours, with distillation (arXiv 1503.02531); massive activations: arXiv 2402.17762; repeated
        tokens: arXiv 2503.08908.

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
    return _slowly(by_site, steps, seed, first_matters=costs.first_matters)


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


def _slowly(
    costs: Mapping[NormSite, float], steps: int, seed: int, *, first_matters: bool
) -> Recipe:
    """Every site fades, then the cap rises; some steps are for waiting. Where an MLP that makes
    massive activations loses its norm, all tokens come to one scale before."""
    everywhere = any(s.kind == "ln2" and not cost <= COSTLY for s, cost in costs.items())
    # What a norm in block 0 hides can be changed only while it is live.
    hidden = {NormSite("ln1.qk", 0), NormSite("ln1.v", 0)} <= set(costs)
    wait = max(1, steps // (10 if everywhere else 5))
    shares = (0.33, 0.18, 0.62, 1.0) if everywhere else (1 / 30, 0.25, 0.4, 0.85)
    start, fade, frozen, until = (int(share * (steps - wait) + 0.5) for share in shares)
    until = min(until, steps - wait - 1)
    scales = Ramp(1.0, 30.0, from_step=0, to_step=max(1, start // 2))
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
        losses={"stream": 1.0} | ({"scales": scales} if everywhere else {}),
        weight_average=0.99,
        repeats=0.15 if everywhere else 0.0,
        random_tokens=0.3 if everywhere else 0.0,
        embedding_cap=1.3 if everywhere and hidden else 0.0,
        statistics=Statistics(source="ema", momentum=0.98, tokens="ordinary", sequences=8),
        special=Special(
            keep_first=first_matters and not everywhere,
            outliers_from=frozen,
            outliers_until=until,
            outlier_caps=(1.25, 1.6 if everywhere else 10.0),
            outliers_stay=everywhere,
        ),
        guard=Guard(in_a_row=3, spike=5.0),
        wait=Wait(above=0.3, steps=wait),
        seed=seed,
    )


COSTLY = 0.3
"""Nats per token of KL divergence. An MLP makes massive activations if its norm, frozen alone with
the first token apart, costs more."""


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
