"""A recipe: everything that a removal run is made of, except the model and the text."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lnfree_interp.errors import RecipeError
from lnfree_interp.models.sites import NormSite, SiteKind
from lnfree_interp.removal.schedule import (
    Event,
    Ramp,
    Weight,
    extremes,
    last_step,
    later,
    widened,
)


def _check_choices(settings: Any) -> None:
    """Refuse a word that is none of a field's choices: it would act as another one."""
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal and getattr(settings, name) not in get_args(hint):
            choices = ", ".join(map(repr, get_args(hint)))
            raise RecipeError(f"{name} is {getattr(settings, name)!r}; choices: {choices}")


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """How sigma is measured."""

    average: Literal["mean", "rms", "least_squares"] = "mean"
    """Of the tokens' standard deviations r: their mean E[r] (2507.02559), sqrt(E[r^2]), or
    E[r^2] / E[r], whose inverse is the constant nearest to 1 / r in the sense of 2602.10408."""
    source: Literal["start", "event", "ema", "batch"] = "event"
    """`"start"`: over `blocks` blocks of text, before the first step; it stays.
    `"event"`: over the same text when the site's event comes; it stays.
    `"ema"`, `"batch"`: over the training text itself, a moving average or the latest step; it
    follows until the site is frozen."""
    blocks: int = 64
    """Blocks of text for `"start"`, `"event"`, and what must be known before the first step."""
    momentum: float = 0.9
    """Share of the old average that a step of `"ema"` keeps."""
    tokens: Literal["all", "ordinary"] = "all"
    """Whether position 0 and end-of-text count."""
    share_ln1: bool = False
    """One sigma for `ln1.qk` and `ln1.v`; it follows until both are frozen."""
    follow_frozen: bool = False
    """Whether `"ema"` and `"batch"` go on following until the last event."""

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.blocks < 1:
            raise RecipeError(f"sigma needs at least one block of text, not {self.blocks}")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum must lie in 0..1 (1 excluded), not {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class Special:
    """Tokens that a frozen site divides by a sigma of their own during the transition.

    Position 0 and end-of-text have residual norms far from the others'. (2409.13710)
    """

    first_until: int | None = None
    """Step at which position 0 gets the common sigma; None: from the start."""
    end_of_text_until: int | None = None
    """The same for end-of-text tokens."""
    end_of_text_kinds: tuple[SiteKind, ...] | None = None
    """Kinds of sites at which end-of-text is special; None: all."""

    def __post_init__(self) -> None:
        for step in (self.first_until, self.end_of_text_until):
            if step is not None and step < 0:
                raise RecipeError(f"tokens cannot be special until step {step}")

    @property
    def until(self) -> int:
        """The step from which on no token is special."""
        return max(self.first_until or 0, self.end_of_text_until or 0)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When a run counts as diverging, and what happens then."""

    action: Literal["stop", "rollback"] = "stop"
    """`"rollback"`: back to the last checkpoint, with wider gaps; needs a run folder."""
    above_best: float = 3.0
    """Nats by which a step's cross-entropy may exceed the lowest so far."""
    sigma_factor: float = 30.0
    """How far a frozen site's inputs may run away from its constant, either way. Looked at
    whenever the probes are."""
    widen: float = 2.0
    """Factor on the gaps that are left, at every rollback."""
    rollbacks: int = 3
    """After that many, stop."""

    def __post_init__(self) -> None:
        _check_choices(self)
        if not 1 < self.widen < math.inf:
            raise RecipeError(f"gaps must become wider: widen={self.widen} does not")
        if not (self.sigma_factor > 1 and self.above_best > 0):
            raise RecipeError("a guard's thresholds must lie above what every run does")
        if self.rollbacks < 0:
            raise RecipeError(f"rollbacks cannot be {self.rollbacks}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a removal run is made of, except the model and the text."""

    name: str = "custom"
    """For reports and model cards."""
    events: tuple[Event, ...]
    """When which site is frozen. Empty: an ordinary fine-tuning."""
    steps: int
    """Optimiser steps."""
    batch: int
    """Blocks of text per optimiser step, over all processes."""
    micro_batch: int = 4
    """Blocks per forward pass and process; gradients add up over the batch."""
    lr: float
    """Peak learning rate of AdamW."""
    warmup: int
    """Steps in which the learning rate rises in a straight line to `lr`."""
    final_lr: float
    """What the learning rate falls to, as a share of `lr`."""
    decay_steps: int | None = None
    """Steps of the cosine, if the run stops before its end; default: `steps`."""
    weight_decay: float = 0.01
    """On weight matrices and embeddings; never on biases and gains."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    clip: float = 1.0
    """Largest gradient norm."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of products, over float32 weights; auto: bfloat16 where the hardware has it natively."""
    distillation: Weight = 0.0
    """Share of the loss that is the KL divergence from the original model; cross-entropy is the
    rest. Costs one forward pass of the original per step."""
    scale_anchor: Weight = 0.1
    """Weight of the auxiliary loss that keeps ln_final's input at one scale."""
    anchor_target: Literal["batch", "frozen"] = "batch"
    """That scale: the batch's own mean (2507.02559), or the mean before the first step
    (2602.10408)."""
    statistics: Statistics = field(default_factory=Statistics)
    """How the constants sigma are measured."""
    special: Special = field(default_factory=Special)
    """Tokens with a sigma of their own for a while. Default: none."""
    guard: Guard = field(default_factory=Guard)
    """What counts as diverging. Default: stop there."""
    evaluate_every: int = 50
    """Steps between two evaluations on held-out text, if there is any."""
    patience: int | None = None
    """Stop after that many evaluations without a new minimum since the last event."""
    seed: int = 0
    """Of the order of the data."""
    block: int | None = None
    """Tokens per block that the recipe was made for; None: any."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where a setting comes from."""

    def __post_init__(self) -> None:
        _check_choices(self)
        counts = ("steps", "batch", "micro_batch", "evaluate_every", "decay_steps", "patience")
        for name in (*counts, "lr", "clip"):
            value: Any = getattr(self, name)
            if name in ("decay_steps", "patience") and value is None:
                continue
            if name in counts and value != int(value):
                raise RecipeError(f"{name} must be a whole number, not {value}")
            if not 0 < value < math.inf:
                raise RecipeError(f"{name} must be positive, not {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise RecipeError(f"weight_decay cannot be {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"betas must lie in 0..1 (1 excluded), not {self.betas}")
        if not 0 <= self.warmup < self.steps:
            raise RecipeError(f"warmup must lie in 0..{self.steps - 1}, not {self.warmup}")
        if not 0 <= self.final_lr <= 1:
            raise RecipeError(f"final_lr is a share of lr, in 0..1, not {self.final_lr}")
        if not all(0 <= weight <= 1 for weight in extremes(self.distillation)):
            raise RecipeError(f"distillation must lie in 0..1, not {self.distillation}")
        if not all(0 <= weight < math.inf for weight in extremes(self.scale_anchor)):
            raise RecipeError(f"scale_anchor cannot be negative: {self.scale_anchor}")
        self._check_events()

    def _check_events(self) -> None:
        for event in self.events:
            if not (event.step >= 0 and event.over >= 0 and event.end < self.steps):
                raise RecipeError(
                    f"{event.site} would be frozen at step {event.end}, outside the {self.steps} "
                    "steps of training"
                )
        sites = [event.site for event in self.events]
        if twice := [str(site) for site in sites if sites.count(site) > 1]:
            raise RecipeError(f"{twice[0]} would be frozen twice")
        if self.events and self.special.until >= self.steps:
            raise RecipeError(
                f"tokens would be special until step {self.special.until}, beyond the "
                f"{self.steps} steps of training"
            )

    @property
    def removed_at(self) -> int:
        """The step from which on nothing of the norms is left."""
        return max(last_step(self.events), self.special.until if self.events else 0)

    def vanilla(self) -> "Recipe":
        """The control: same steps, data order and learning rates, but nothing is removed."""
        return replace(
            self,
            name=f"{self.name}, vanilla control",
            events=(),
            scale_anchor=0.0,
            distillation=0.0,
            special=Special(),
            patience=None,
        )

    def widened(self, done: int, factor: float) -> "Recipe":
        """Everything that is left after `done` steps spread out by a factor, and as many steps to
        recover from it as before. The same recipe if nothing is left.

        Args:
            done: Steps done.
            factor: On the distances between what is left.
        """

        def spread(weight: Weight) -> Weight:
            return weight.widened(done, factor) if isinstance(weight, Ramp) else weight

        special = {
            name: until if until is None else later(until, done, factor)
            for name in ("first_until", "end_of_text_until")
            for until in [getattr(self.special, name)]
        }
        if self.removed_at < done or not self.events:
            return self
        more = later(self.removed_at, done, factor) - self.removed_at
        return replace(
            self,
            events=widened(self.events, done, factor),
            special=replace(self.special, **special),
            distillation=spread(self.distillation),
            scale_anchor=spread(self.scale_anchor),
            steps=self.steps + more,
            decay_steps=(self.decay_steps or self.steps) + more,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes the recipe again."""
        plain = asdict(self)
        plain["events"] = [[event.step, str(event.site), event.over] for event in self.events]
        plain["sources"] = dict(self.sources)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Recipe":
        """The recipe that `to_json` described.

        Raises:
            RecipeError: if it is none.
        """
        try:
            fields = dict(plain)
            fields["events"] = tuple(
                Event(step, NormSite.parse(site), over) for step, site, over in fields["events"]
            )
            fields["betas"] = tuple(fields["betas"])
            for name in ("distillation", "scale_anchor"):
                if isinstance(fields[name], dict):
                    fields[name] = Ramp(**fields[name])
            special = dict(fields["special"])
            if special["end_of_text_kinds"] is not None:
                special["end_of_text_kinds"] = tuple(special["end_of_text_kinds"])
            fields |= {
                "statistics": Statistics(**fields["statistics"]),
                "special": Special(**special),
                "guard": Guard(**fields["guard"]),
            }
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"this is no recipe of this package: {error!r:.100}") from error
