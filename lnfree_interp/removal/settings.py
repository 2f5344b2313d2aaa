"""Parts of a recipe: how sigma is measured, special tokens, and what counts as diverging."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lnfree_interp.errors import RecipeError
from lnfree_interp.models.site_names import SiteKind


def check_choices(settings: Any) -> None:
    """Refuse a word that is not one of a field's choices."""
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal and getattr(settings, name) not in get_args(hint):
            choices = ", ".join(map(repr, get_args(hint)))
            raise RecipeError(f"{name} is {getattr(settings, name)!r}; choices: {choices}")


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """How sigma is measured: the constant that a frozen norm divides by.

    Raises:
        RecipeError: if a setting is not allowed.

    Source:
        arXiv 2507.02559 (`"mean"`, moving averages, `share_ln1`); arXiv 2602.10408
        (`"least_squares"`); arXiv 2409.13710 (`"start"`).

    Examples:
        >>> from dataclasses import replace
        >>> statistics = lf.Statistics(source="ema", momentum=0.5)
        >>> recipe = replace(lf.recipes.distilled(model), statistics=statistics)
    """

    average: Literal["mean", "rms", "least_squares"] = "mean"
    """The average of the tokens' standard deviations r: `"mean"`, E[r]; `"rms"`, sqrt(E[r^2]); or
    `"least_squares"`, E[r^2] / E[r]: its inverse is the constant nearest to 1 / r, weighted by
    r^2."""
    source: Literal["start", "event", "ema", "batch"] = "event"
    """The text on which it is measured, and when. `"start"`: some of the training text, before the
    first step. `"event"`: the same text, when the site's event comes. `"ema"` and `"batch"`: the
    text of each step, as a moving average or of the latest step alone, until the site is frozen."""
    sequences: int = 64
    """How many sequences are measured for `"start"` and `"event"`, and by the others before the
    first step."""
    momentum: float = 0.9
    """The share of the old average that a step of `"ema"` keeps."""
    tokens: Literal["all", "ordinary"] = "all"
    """Which tokens count: all, or all but position 0 and end-of-text."""
    share_ln1: bool = False
    """Whether `ln1.qk` and `ln1.v` have one sigma. It moves until both are frozen."""
    follow_frozen: bool = False
    """Whether `"ema"` and `"batch"` continue to move the sigma of a frozen site until the last
    event."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.sequences < 1:
            raise RecipeError(f"sigma needs at least one sequence of text, not {self.sequences}")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum must lie in 0..1 (1 excluded), not {self.momentum}")


OUTLIER = 5.0
"""A token is an outlier at a site where its own scale is so many times what it is divided by."""


@dataclass(frozen=True, kw_only=True)
class Special:
    """Tokens that a frozen site divides by a sigma of their own during the transition.

    The residual norms of position 0 and of end-of-text differ much from those of other tokens, and
    in many models those of a few other tokens do: massive activations. A frozen site that divides
    such a token by the ordinary constant lets it grow from layer to layer.

    Raises:
        RecipeError: if a step is negative.

    Source:
        arXiv 2409.13710; massive activations: arXiv 2402.17762; outliers wherever they stand, and
        position 0 apart in the finished model: ours.

    Examples:
        >>> from dataclasses import replace
        >>> special = lf.Special(first_until=80)
        >>> recipe = replace(lf.recipes.distilled(model, steps=100), special=special)
        >>> recipe.removed_at
        80
    """

    first_until: int | None = None
    """The step at which position 0 gets the common sigma; None: it always has it."""
    end_of_text_until: int | None = None
    """The same for end-of-text tokens."""
    keep_first: bool = False
    """Whether position 0 keeps a sigma of its own in the finished model, which then cannot be
    folded; the frozen form holds it."""
    outliers_until: int | None = None
    """The step at which outliers get the common sigma: tokens, wherever they stand, whose own scale
    is `OUTLIER` times what the site would divide them by. Until then the live norm has a share in
    what they are divided by, which falls linearly from 1 at step 0. None: they always have it."""
    end_of_text_kinds: tuple[SiteKind, ...] | None = None
    """The kinds of sites at which end-of-text is special; None: all."""

    def __post_init__(self) -> None:
        for step in (self.first_until, self.end_of_text_until, self.outliers_until):
            if step is not None and step < 0:
                raise RecipeError(f"tokens cannot be special until step {step}: it is negative")
        if self.keep_first and self.first_until is not None:
            raise RecipeError(
                f"position 0 cannot both keep its sigma and lose it at step {self.first_until}: "
                "give keep_first or first_until"
            )

    @property
    def until(self) -> int:
        """The first step at which no token is special."""
        return max(self.first_until or 0, self.end_of_text_until or 0, self.outliers_until or 0)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When a run counts as diverging, and what happens then.

    Raises:
        RecipeError: if a setting is not allowed.

    Source:
        Ours; that wider gaps help: arXiv 2507.02559.

    Examples:
        >>> from dataclasses import replace
        >>> guard = lf.Guard(action="rollback", above_best=2.0)
        >>> recipe = replace(lf.recipes.distilled(model), guard=guard)
    """

    action: Literal["stop", "rollback"] = "stop"
    """`"stop"`: raise a TrainingError. `"rollback"`: go back to the last good checkpoint, with
    wider gaps between the events; this needs a run folder."""
    above_best: float = 3.0
    """The run diverges if a step's cross-entropy is this many nats above the lowest so far."""
    sigma_factor: float = 30.0
    """The run diverges if the inputs of a frozen site have a sigma this many times larger or
    smaller than its constant. It is measured every `log_every` steps."""
    widen: float = 2.0
    """The factor on the remaining gaps at every rollback."""
    rollbacks: int = 3
    """How many rollbacks are tried."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 1 < self.widen < math.inf:
            raise RecipeError(f"gaps must become wider: widen must be above 1, not {self.widen}")
        if not (self.sigma_factor > 1 and self.above_best > 0):
            raise RecipeError(
                f"sigma_factor must be above 1 and above_best above 0, not {self.sigma_factor} and "
                f"{self.above_best}: every run would diverge"
            )
        if self.rollbacks < 0:
            raise RecipeError(f"rollbacks cannot be negative: {self.rollbacks}")
