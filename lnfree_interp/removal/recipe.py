"""A recipe: everything that a removal run is made of, except the model and the text."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lnfree_interp.errors import RecipeError, TooFewStepsError
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.removal.schedule import (
    Event,
    Ramp,
    Weight,
    extremes,
    last_step,
    later,
    weight_at,
    widened,
)
from lnfree_interp.removal.settings import (
    SPECIAL_STEPS,
    Guard,
    Release,
    Special,
    Statistics,
    Wait,
    check_choices,
)
from lnfree_interp.tuning.parameter_mask import ParameterMask, Trainable


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a removal run is made of, except the model and the text.

    The functions of `lf.recipes` return recipes; `dataclasses.replace` changes a setting.

    Raises:
        RecipeError: if the settings do not fit together.

    Examples:
        >>> events = [lf.Event(10 + i, site) for i, site in enumerate(lf.list_norm_sites(model))]
        >>> recipe = lf.Recipe(
        ...     events=tuple(events), steps=60, batch=8, lr=4e-4, warmup=5, final_lr=0.5,
        ...     distillation=lf.Ramp(1.0, 0.5, from_step=30, to_step=50),
        ... )
        >>> recipe.removed_at, recipe.loss_weights(40)["distillation"]
        (22, 0.75)
    """

    name: str = "custom"
    """What reports and model cards call it."""
    events: tuple[Event, ...]
    """When each site is frozen. Without events the run is an ordinary fine-tuning."""
    steps: int
    """Optimiser steps."""
    batch: int
    """Sequences of text per optimiser step, over all processes."""
    micro_batch: int = 4
    """Sequences per forward pass and process; the gradients of a batch are added up."""
    lr: float
    """Peak learning rate of AdamW."""
    warmup: int
    """Steps over which the learning rate rises linearly to `lr`."""
    final_lr: float
    """The learning rate at the end of its cosine, as a share of `lr`."""
    decay_steps: int | None = None
    """The step at which the cosine ends. Default: `steps`. A later one is not reached."""
    weight_decay: float = 0.01
    """Weight decay of matrices and embeddings; biases and gains have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """The two betas of AdamW."""
    clip: float = 1.0
    """The largest gradient norm; larger ones are scaled down to it."""
    weight_average: float = 0.0
    """The share of its old value that a moving average of the weights keeps at each step, once all
    sites are frozen; without events, from the first step. The held-out loss from there on is that
    of the average, and the finished model has it. 0: the weights of the last step. (1803.05407)"""
    precision: Literal["auto", "bfloat16", "float32", "int16", "int12", "int10", "int8"] = "auto"
    """The precision of matrix products; weights are float32. `"auto"`: bfloat16 if the hardware has
    it. `"int16"` to `"int8"`: linear layers, norms and embeddings compute with integers of so many
    bits, forward and backward; all but `"int8"` are simulated, and slow. (2209.09815)"""
    distillation: Weight = 0.0
    """The share of the KL divergence from the original model in the loss; cross-entropy has the
    rest. It costs a forward pass of the original per step."""
    scale_anchor: Weight = 0.1
    """The weight of the auxiliary loss that holds ln_final's input at one scale."""
    anchor_target: Literal["batch", "frozen"] = "batch"
    """That scale: the mean of the batch (2507.02559), or the mean before the first step
    (2602.10408)."""
    losses: Mapping[str, Weight] = field(default_factory=dict)
    """The weights of further terms of the loss, by their names in `removal.losses.TERMS`."""
    statistics: Statistics = field(default_factory=Statistics)
    """How the constants sigma are measured."""
    repeats: float = 0.0
    """The share of the training sequences that are given a stretch of one token, or of two in turn,
    again and again. A model takes such tokens for first ones and makes outliers of them; in text
    they are too rare to be unlearnt. (2503.08908)"""
    random_tokens: float = 0.0
    """The share of the training sequences that are given a stretch of tokens from the whole
    vocabulary; in every second one they come again. Most of a vocabulary is rare in text, and a
    rare token may be an outlier that nothing has trained."""
    embedding_cap: float = 0.0
    """How long a row of W_E may be, in units of the mean length of the rows of the text's tokens;
    longer ones are shortened to that before the first step. 0: no cap. The rows of rare tokens are
    often longer, which a norm in block 0 hides. With a cap W_U stays as it is, so that the two are
    no longer tied."""
    special: Special = field(default_factory=Special)
    """Tokens that have a sigma of their own for some steps. Default: none."""
    wait: Wait | None = None
    """When the schedule waits for the model. Default: never."""
    guard: Guard = field(default_factory=Guard)
    """When the run counts as diverging. Default: it stops then."""
    evaluate_every: int = 50
    """Steps between two evaluations on held-out text, if there is any."""
    patience: int | None = None
    """Stop after this many evaluations since the last event without a lower loss."""
    seed: int = 0
    """The random seed of the order of the text, and of what else is drawn."""
    trainable: Trainable = "all"
    """Which parameters are trained, in the words of `lf.select_parameters`, such as `"norms:ln2"`,
    or a mask of entries. All others are bit for bit what they were, and have no memory in the
    optimiser. `seed` is that of shares, such as `"20% of norms"`. (2403.20284)"""
    release: tuple[Release, ...] = ()
    """What is trained too from some step on, in this order. Default: nothing."""
    sequence_length: int | None = None
    """Tokens per sequence that the recipe was made for; None: any number."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each setting comes from."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.trainable == ("all",):  # as a command line has it
            object.__setattr__(self, "trainable", "all")
        counts = ("steps", "batch", "micro_batch", "evaluate_every", "decay_steps", "patience")
        for name in (*counts, "lr", "clip"):
            value: Any = getattr(self, name)
            if name in ("decay_steps", "patience") and value is None:
                continue
            if name in counts and value != int(value):
                raise RecipeError(f"{name} must be a whole number, not {value}")
            if not 0 < value < math.inf:
                raise RecipeError(f"{name} must be positive, not {value}")
        for name in ("weight_decay", "embedding_cap"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"betas must lie in 0..1 (1 excluded), not {self.betas}")
        if self.warmup < 0:
            raise RecipeError(f"warmup must be 0 or more, not {self.warmup}")
        if self.warmup >= self.steps:
            raise TooFewStepsError(
                f"the learning rate rises over {self.warmup} steps, and there are {self.steps}",
                self.warmup + 1,
            )
        if not 0 <= self.final_lr <= 1:
            raise RecipeError(f"final_lr is a share of lr, in 0..1, not {self.final_lr}")
        if not 0 <= self.weight_average < 1:
            raise RecipeError(
                f"weight_average is a share, in 0..1 (1 excluded), not {self.weight_average}"
            )
        for name in ("repeats", "random_tokens"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(
                    f"{name} is a share of the sequences, in 0..1, not {getattr(self, name)}"
                )
        if not all(0 <= weight <= 1 for weight in extremes(self.distillation)):
            raise RecipeError(f"distillation must lie in 0..1, not {self.distillation}")
        if not all(0 <= weight < math.inf for weight in extremes(self.scale_anchor)):
            raise RecipeError(f"scale_anchor cannot be negative: {self.scale_anchor}")
        if named := {"cross_entropy", "distillation", "scale_anchor"} & set(self.losses):
            raise RecipeError(
                f"{min(named)} is a field of the recipe: set its weight there, not in losses"
            )
        for name, weight in self.losses.items():
            if not all(0 <= value < math.inf for value in extremes(weight)):
                raise RecipeError(f"the weight of {name} cannot be negative: {weight}")
        if "stream" in self.losses and not self.always_distils:
            raise RecipeError(
                "the term stream compares with the original, which runs only while the recipe "
                "distils: give a distillation above 0 at every step, or leave the term out"
            )
        if self.embedding_cap and not self._trains_embeddings:
            raise RecipeError(
                "embedding_cap shortens rows of W_E before the first step, and trainable leaves "
                'W_E as it is: set embedding_cap=0, or let trainable name "embed" too'
            )
        for release in self.release:
            if release.at is not None and release.at >= self.steps:
                raise RecipeError(
                    f"{release}: the last of {self.steps} steps is {self.steps - 1}, so give an "
                    "earlier one"
                )
        steps = [release.at for release in self.release if release.at is not None]
        if steps != sorted(steps):
            raise RecipeError(f"releases are in the order of their steps, not at {steps}")
        self._check_events()

    @property
    def _trains_embeddings(self) -> bool:
        if isinstance(self.trainable, ParameterMask):
            chosen = self.trainable.chosen.get("embed.W_E")
            return chosen is not None and bool(chosen.all())
        words = self.trainable if isinstance(self.trainable, tuple) else (self.trainable,)
        return bool({"all", "embed"} & set(words))

    def _check_events(self) -> None:
        for event in self.events:
            if event.step < 0 or event.over < 0:
                raise RecipeError(
                    f"{event.site} would be frozen from step {event.step} over {event.over} steps: "
                    "neither may be negative"
                )
            if event.end + self._may_wait >= self.steps:
                raise TooFewStepsError(
                    f"{event.site} would be frozen at step {event.end + self._may_wait}, and the "
                    f"last of {self.steps} steps is {self.steps - 1}",
                    self.removed_by + 1,
                )
        sites = [event.site for event in self.events]
        if twice := [str(site) for site in sites if sites.count(site) > 1]:
            raise RecipeError(f"{twice[0]} would be frozen twice: give one event per site")
        if self.events and self.special.until + self._may_wait >= self.steps:
            raise TooFewStepsError(
                f"tokens would be special until step {self.special.until + self._may_wait}, and "
                f"the last of {self.steps} steps is {self.steps - 1}",
                self.removed_by + 1,
            )
        if self.wait is not None and not self.always_distils:
            raise RecipeError(
                "the schedule waits for the KL divergence from the original, which is measured "
                "only with a distillation above 0 at every step"
            )

    @property
    def removed_at(self) -> int:
        """The first step at which every norm is frozen and no token is special, but for a cap that
        stays; unless it waits."""
        return max(last_step(self.events), self.special.until if self.events else 0)

    @property
    def removed_by(self) -> int:
        """The same if the schedule waits for as long as it may."""
        return self.removed_at + self._may_wait

    @property
    def always_distils(self) -> bool:
        """Whether the KL divergence from the original is measured at every step."""
        return extremes(self.distillation)[0] > 0

    @property
    def _may_wait(self) -> int:
        return 0 if self.wait is None else self.wait.steps

    def loss_weights(self, step: int) -> dict[str, float]:
        """The weight of each term of the loss at a step, by name."""
        share = weight_at(self.distillation, step)
        weights = {"scale_anchor": self.scale_anchor, **self.losses}
        return {"cross_entropy": 1 - share, "distillation": share} | {
            name: weight_at(weight, step) for name, weight in weights.items()
        }

    def vanilla(self) -> "Recipe":
        """The control: same steps, data order and learning rates, but nothing is removed."""
        return replace(
            self,
            name=f"{self.name}, vanilla control",
            events=(),
            scale_anchor=0.0,
            distillation=0.0,
            losses={},
            repeats=0.0,
            random_tokens=0.0,
            embedding_cap=0.0,
            special=Special(),
            wait=None,
            patience=None,
        )

    def widened(self, done: int, factor: float) -> "Recipe":
        """The recipe with what remains after `done` steps spread out by a factor.

        As many steps follow the last event as before. The same recipe if nothing remains.

        Args:
            done: Steps that are done.
            factor: The factor on the remaining distances.
        """

        def spread(weight: Weight) -> Weight:
            return weight.widened(done, factor) if isinstance(weight, Ramp) else weight

        special = {
            name: until if until is None else later(until, done, factor)
            for name in SPECIAL_STEPS
            for until in [getattr(self.special, name)]
        }
        if self.removed_at < done or not self.events:
            return self
        more = later(self.removed_at, done, factor) - self.removed_at
        return replace(
            self,
            events=widened(self.events, done, factor),
            release=tuple(
                one
                if one.at is None
                else replace(one, at=min(later(one.at, done, factor), one.at + more))
                for one in self.release
            ),
            special=replace(self.special, **special),
            distillation=spread(self.distillation),
            scale_anchor=spread(self.scale_anchor),
            losses={name: spread(weight) for name, weight in self.losses.items()},
            steps=self.steps + more,
            decay_steps=(self.decay_steps or self.steps) + more,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes the recipe again."""
        plain = asdict(self)
        plain["events"] = [[event.step, str(event.site), event.over] for event in self.events]
        plain["sources"] = dict(self.sources)
        plain["trainable"] = _plain_trainable(self.trainable)
        for written, release in zip(plain["release"], self.release, strict=True):
            written["trainable"] = _plain_trainable(release.trainable)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Recipe":
        """The recipe that `to_json` described.

        Raises:
            RecipeError: if it is not a recipe.
        """
        try:
            fields = dict(plain)
            fields["events"] = tuple(
                Event(step, NormSite.parse(site), over) for step, site, over in fields["events"]
            )
            fields["betas"] = tuple(fields["betas"])
            for name in ("distillation", "scale_anchor"):
                fields[name] = _weight(fields[name])
            losses = fields.get("losses", {})
            fields["losses"] = {name: _weight(weight) for name, weight in losses.items()}
            fields["trainable"] = _trainable(fields.get("trainable", "all"))
            fields["release"] = tuple(
                Release(**one | {"trainable": _trainable(one["trainable"])})
                for one in fields.get("release", ())
            )
            special = dict(fields["special"])
            if "outlier_caps" in special:  # not in files of an earlier version
                special["outlier_caps"] = tuple(special["outlier_caps"])
            if special["end_of_text_kinds"] is not None:
                special["end_of_text_kinds"] = tuple(special["end_of_text_kinds"])
            fields |= {
                "statistics": Statistics(**fields["statistics"]),
                "special": Special(**special),
                "guard": Guard(**fields["guard"]),
                "wait": Wait(**fields["wait"]) if fields.get("wait") else None,
            }
            return cls(**fields)
        except (KeyError, RuntimeError, TypeError, ValueError, zlib.error) as error:
            raise RecipeError(f"this is not a recipe of lnfree_interp: {error!r:.100}") from error


def _plain_trainable(trainable: Trainable) -> Any:
    """What is trained, as plain data."""
    return {"mask": trainable.to_json()} if isinstance(trainable, ParameterMask) else trainable


def _trainable(plain: Any) -> Trainable:
    """What is trained, from plain data."""
    if isinstance(plain, dict):
        return ParameterMask.from_json(plain["mask"])
    return plain if isinstance(plain, str) else tuple(plain)


def _weight(plain: Any) -> Weight:
    """A weight, from plain data."""
    return Ramp(**plain) if isinstance(plain, dict) else plain
