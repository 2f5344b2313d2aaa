"""Parts of a recipe: how sigma is measured, special tokens, and what counts as diverging."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lnfree_interp.errors import RecipeError
from lnfree_interp.models.site_names import SiteKind
from lnfree_interp.tuning.parameter_mask import Trainable


def check_choices(settings: Any) -> None:
    """Refuse a word that is not one of a field's choices."""
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal and getattr(settings, name) not in get_args(hint):
            choices = ", ".join(map(repr, get_args(hint)))
            raise RecipeError(f"{name} is {getattr(settings, name)!r}; choices: {choices}")


OUTLIER = 5.0
"""A token is an outlier where its own scale is so many times the median of the others."""

RECENT = 20
"""Steps whose losses and gradient norms say what is usual."""


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
    """Which tokens count: all; or all but position 0, end-of-text and, at each site, tokens whose
    scale is `OUTLIER` times the median of the others."""
    share_ln1: bool = False
    """Whether `ln1.qk` and `ln1.v` have one sigma. It moves until both are frozen."""
    follow_frozen: bool = False
    """Whether `"ema"` and `"batch"` continue to move the sigma of a frozen site until every site is
    frozen and no token is special."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.sequences < 1:
            raise RecipeError(f"sigma needs at least one sequence of text, not {self.sequences}")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum must lie in 0..1 (1 excluded), not {self.momentum}")


SPECIAL_STEPS = ("first_until", "end_of_text_until", "outliers_from", "outliers_until")
"""The fields of `Special` that are steps of the schedule."""


@dataclass(frozen=True, kw_only=True)
class Special:
    """Tokens that a frozen site divides by a sigma of their own during the transition.

    The residual norms of position 0 and of end-of-text differ much from those of other tokens, and
    in many models those of a few other tokens do: massive activations. A frozen site that divides
    such a token by the ordinary constant lets it grow from layer to layer.

    Raises:
        RecipeError: if a step is negative, or a cap is not allowed.

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
    """The step at which every token gets the common sigma, however large it is; with
    `outliers_stay`, at which its cap has risen. Until then a frozen site divides a token by at
    least its own scale over a cap, so that no token comes out larger than the cap times what the
    live norm makes of it; the largest tokens lose the live norm last. None or 0: there is no
    cap."""
    outliers_from: int = 0
    """The last step with the first of the two `outlier_caps`. From there the logarithm of the cap
    rises geometrically: slowly where most tokens are, fast where few are left."""
    outlier_caps: tuple[float, float] = (1.25, 10.0)
    """The cap on outliers at first, and just before it is gone."""
    outliers_stay: bool = False
    """Whether the cap stays as it is from `outliers_until` on, to the last step of the training.
    The finished model and the held-out loss from there on have none."""
    end_of_text_kinds: tuple[SiteKind, ...] | None = None
    """The kinds of sites at which end-of-text is special; None: all."""

    def __post_init__(self) -> None:
        for step in (getattr(self, name) for name in SPECIAL_STEPS):
            if step is not None and step < 0:
                raise RecipeError(f"tokens cannot be special until step {step}: it is negative")
        if self.outliers_until and self.outliers_from >= self.outliers_until:
            raise RecipeError(
                f"the cap on outliers would rise from step {self.outliers_from} and end at step "
                f"{self.outliers_until}: let it end later"
            )
        first, last = self.outlier_caps
        if not 1 < first <= last < math.inf:
            raise RecipeError(
                f"the cap on outliers would go from {first:g} to {last:g}: both are multiples of "
                "what a live norm makes of a token, above 1, and the second is not the smaller one"
            )
        if self.keep_first and self.first_until is not None:
            raise RecipeError(
                f"position 0 cannot both keep its sigma and lose it at step {self.first_until}: "
                "give keep_first or first_until"
            )

    def moved(self, steps: int) -> "Special":
        """The same some steps later, or earlier if they are negative."""
        moved = {
            name: max(step + steps, int(name != "outliers_from"))
            for name in SPECIAL_STEPS
            if (step := getattr(self, name))
        }
        return replace(self, **moved)

    def cap(self, step: int) -> float:
        """How many times larger than a live norm would make it a token may come out at a step."""
        until = self.outliers_until or 0
        if not until or (step >= until and not self.outliers_stay):
            return math.inf
        risen = min(max(0, step - self.outliers_from) / (until - self.outliers_from), 1)
        first, last = map(math.log, self.outlier_caps)
        return math.exp(first * (last / first) ** risen)

    @property
    def until(self) -> int:
        """The first step at which no token is special, but for a cap that stays."""
        return max(self.first_until or 0, self.end_of_text_until or 0, self.outliers_until or 0)


@dataclass(frozen=True, kw_only=True)
class Wait:
    """The schedule waits while the model is far from the original: the next site is frozen when
    the last has been absorbed.

    It waits from the first event on. While it waits, the model trains on, and neither events nor
    the ramps of the loss move; the learning rate does.

    Raises:
        RecipeError: if a setting is not allowed.

    Source:
        Ours.

    Examples:
        >>> from dataclasses import replace
        >>> wait = lf.Wait(above=0.2, steps=30)
        >>> recipe = replace(lf.recipes.distilled(model), wait=wait)
        >>> recipe.removed_at, recipe.removed_by
        (36, 66)
    """

    above: float
    """The schedule waits after a step whose KL divergence from the original is above this, in nats
    per token."""
    steps: int
    """How many steps it may wait in all."""

    def __post_init__(self) -> None:
        if not (0 < self.above < math.inf and self.steps > 0):
            raise RecipeError(
                f"above={self.above} and steps={self.steps} say when the schedule waits and for "
                "how long: both must be positive"
            )


@dataclass(frozen=True, kw_only=True)
class Release:
    """More parameters that are trained from some step on.

    Raises:
        RecipeError: if a setting is not allowed.

    Source:
        arXiv 2404.02684, where parameters that were copied from another architecture are released
        once the new ones have learnt.

    Examples:
        >>> from dataclasses import replace
        >>> recipe = lf.recipes.finetuning(steps=100)
        >>> later = (lf.Release(trainable="mlps", at=30), lf.Release(trainable="all"))
        >>> recipe = replace(recipe, trainable="norms", release=later)
    """

    trainable: Trainable
    """What is trained too, in the words of `lf.select_parameters`, or a mask."""
    at: int | None = None
    """The first step at which it is. Default: when the loss stands still."""
    window: int = 20
    """The loss stands still if its mean over so many steps,"""
    less_than: float = 0.01
    """compared with as many before, fell by less than this, in nats per token. Both windows lie
    behind the last release. The loss is the KL divergence from the original if the recipe distils
    at every step, else cross-entropy."""

    def __post_init__(self) -> None:
        if self.at is not None and self.at < 1:
            raise RecipeError(f"at={self.at}: a release is at step 1 or later")
        if self.window < 1:
            raise RecipeError(f"window={self.window}: give a number of steps, at least 1")
        if not 0 <= self.less_than < math.inf:
            raise RecipeError(f"less_than must be 0 or more nats, not {self.less_than}")

    @classmethod
    def parse(cls, text: str) -> "Release":
        """The release that `--release` names: `mlps@100`, `norms+heads:L3H1@100`, `all@still`.

        Raises:
            RecipeError: if it is none.
        """
        words, _, when = text.rpartition("@")
        if not words or not (when == "still" or when.isdecimal()):
            raise RecipeError(
                f"release {text!r}: give what is released and when, such as mlps@100 or, when the "
                "loss stands still, all@still"
            )
        at = None if when == "still" else int(when)
        return cls(trainable=tuple(words.split("+")), at=at)

    def due(self, step: int, losses: Sequence[float]) -> bool:
        """Whether it is time.

        Args:
            step: The step that comes next.
            losses: Of each step since the last release, or since the first one.
        """
        if self.at is not None:
            return step >= self.at
        if len(losses) < 2 * self.window:
            return False
        before, after = losses[-2 * self.window : -self.window], losses[-self.window :]
        return fmean(before) - fmean(after) < self.less_than

    def __str__(self) -> str:
        words = ", ".join(self.trainable) if isinstance(self.trainable, tuple) else self.trainable
        if self.at is not None:
            return f"{words} from step {self.at} on"
        return f"{words} when the loss falls by less than {self.less_than:g} in {self.window} steps"


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When a run counts as diverging, and what happens then.

    Raises:
        RecipeError: if a setting is not allowed.

    Source:
        Ours; that wider gaps help, and a lower learning rate: arXiv 2507.02559.

    Examples:
        >>> from dataclasses import replace
        >>> guard = lf.Guard(action="rollback", above_best=2.0)
        >>> recipe = replace(lf.recipes.distilled(model), guard=guard)
    """

    action: Literal["stop", "rollback"] = "stop"
    """`"stop"`: raise a TrainingError. `"rollback"`: go back to the last good checkpoint, with
    wider gaps between the events and a lower learning rate; this needs a run folder."""
    above_best: float = 3.0
    """The run diverges if a step's loss is this many nats above the lowest median of the last
    `RECENT` steps so far: its KL
    divergence from the original if the recipe distils at every step, else its cross-entropy."""
    sigma_factor: float = 30.0
    """The run diverges if the inputs of a frozen site have a sigma this many times larger or
    smaller than its constant. It is measured every `log_every` steps."""
    in_a_row: int = 1
    """How many steps in a row have to be so. Where a batch is one sequence, one that runs away says
    little."""
    spike: float | None = None
    """A gradient whose norm is so many times the median of the last `RECENT` steps is thrown away:
    the weights stay. Clipped, it would be as long as any other, and undo several steps. One that
    is not finite is always thrown away, with None no other."""
    widen: float = 2.0
    """The factor on the remaining gaps at every rollback."""
    slower: float = 0.5
    """The factor on the learning rate at every rollback."""
    rollbacks: int = 3
    """How many rollbacks are tried."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 1 < self.widen < math.inf:
            raise RecipeError(f"gaps must become wider: widen must be above 1, not {self.widen}")
        if not 0 < self.slower <= 1:
            raise RecipeError(
                f"slower={self.slower} is a factor on the learning rate: it must lie in 0..1 (0 "
                "excluded)"
            )
        if not (self.sigma_factor > 1 and self.above_best > 0):
            raise RecipeError(
                f"sigma_factor must be above 1 and above_best above 0, not {self.sigma_factor} and "
                f"{self.above_best}: every run would diverge"
            )
        if self.spike is not None and not self.spike > 1:
            raise RecipeError(
                f"spike={self.spike} is a multiple of the usual gradient norm: it must be above 1"
            )
        if self.rollbacks < 0:
            raise RecipeError(f"rollbacks cannot be negative: {self.rollbacks}")
        if self.in_a_row < 1:
            raise RecipeError(f"in_a_row={self.in_a_row}: give a number of steps, at least 1")
