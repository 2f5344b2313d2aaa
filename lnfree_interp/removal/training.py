"""`train` and `finetune`: the loop of `remove_norms` on models whose norms stay as they are."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.data.sequences import TokenSequences
from lnfree_interp.errors import RecipeError
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.remove import remove_norms
from lnfree_interp.removal.run import Run
from lnfree_interp.removal.schedule import extremes
from lnfree_interp.removal.statistics import Hooks


class RunOptions(TypedDict, total=False):
    """The options of a run, which have the meaning and the defaults of `remove_norms`."""

    heldout: Int[Tensor, "heldout_sequence heldout_pos"] | None
    out: str | os.PathLike[str] | None
    resume: bool
    about: Mapping[str, Any] | None
    fwd_hooks: Hooks
    bwd_hooks: Hooks
    checkpoint_every: int
    log_every: int
    trackers: Sequence[str]
    minutes: float | None
    progress: bool
    copy_weights: bool
    teacher: HookedTransformer | None


def train(
    model: HookedTransformer,
    recipe: Recipe,
    data: TokenSequences | Int[Tensor, "sequence pos"],
    **options: Unpack[RunOptions],
) -> Run:
    """Train a model from its first weights on, with hooks active; its norms stay what they are.

    The loop, text, hooks, checkpoints and probes are those of `remove_norms`, so that
    architectures can be compared with each other and with what removing their norms makes of them.

    Args:
        model: A model of any architecture of this package, such as `lf.untrained(...)`, or one of
            the `lf.to_...` functions made of it. It does not change.
        recipe: Such as `lf.recipes.from_scratch(...)`.
        data: Packed text, as for `remove_norms`.
        **options: As for `remove_norms`: `heldout`, `out`, `resume`, `fwd_hooks`, `log_every` and
            so on.

    Returns:
        A `Run`: the trained model with norm sites, and what happened at each step, gradients by
            layer and kind of weight among it (`lf.GradientBalance.of_run`).

    Raises:
        RecipeError: if the recipe freezes norms or distils, or does not fit the text.
        LnfreeError: for what `remove_norms` refuses.

    Source:
        Ours: one loop for all architectures and for the removal of their norms.

    Examples:
        >>> small = lf.untrained(model, n_layers=1, d_model=16, n_heads=2)
        >>> recipe = lf.recipes.from_scratch(steps=3, batch=2)
        >>> run = lf.train(lf.to_peri_ln(small).model, recipe, tokens, progress=False)
        >>> len(run.history), len(lf.live_sites(run.model))
        (3, 6)
    """
    _require_no_events(recipe, "lf.train")
    if extremes(recipe.distillation)[1] > 0:
        raise RecipeError(
            "a model that is trained from scratch has nothing to distil from: set distillation=0, "
            "or call lf.finetune, which distils from the model as it is given"
        )
    return remove_norms(model, recipe, data, **options)


def finetune(
    model: HookedTransformer,
    recipe: Recipe,
    data: TokenSequences | Int[Tensor, "sequence pos"],
    **options: Unpack[RunOptions],
) -> Run:
    """Fine-tune a checkpoint, with hooks active; its norms stay what they are.

    Args:
        model: A model of any architecture of this package, with the weights to start from. It does
            not change.
        recipe: Such as `lf.recipes.finetuning(...)`, or the `vanilla()` of a recipe for removal.
            With a `distillation` the loss holds the model to what it was before, or to a
            `teacher`, such as the model that a variant was made of.
        data: Packed text, as for `remove_norms`.
        **options: As for `remove_norms`.

    Returns:
        A `Run`, as from `lf.train`.

    Raises:
        RecipeError: if the recipe freezes norms, or does not fit the text.
        LnfreeError: for what `remove_norms` refuses.

    Source:
        Ours: as `lf.train`.

    Examples:
        >>> recipe = lf.recipes.finetuning(steps=2, batch=2)
        >>> run = lf.finetune(lf.to_dyt(model, tokens=tokens).model, recipe, tokens, progress=False)
        >>> run.recipe.name, len(run.history)
        ('fine-tuning', 2)
    """
    _require_no_events(recipe, "lf.finetune")
    return remove_norms(model, recipe, data, **options)


def _require_no_events(recipe: Recipe, call: str) -> None:
    if recipe.events:
        raise RecipeError(
            f"{call} leaves norms as they are, and the recipe freezes {recipe.events[0].site} at "
            f"step {recipe.events[0].step}: call lf.remove_norms, or give recipe.vanilla()"
        )
