"""When each norm site goes from live to frozen, as plain data, and functions that make it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from transformer_lens import HookedTransformer

from lnfree_interp.errors import RecipeError
from lnfree_interp.models.site_names import NormSite, SiteKind, SplitKind
from lnfree_interp.models.sites import live_sites


@dataclass(frozen=True)
class Event:
    """A norm site goes from live to frozen.

    Source:
        arXiv 2409.13710 (at one step); arXiv 2602.10408 (over several steps).

    Examples:
        >>> event = lf.Event(20, lf.NormSite("ln2", 3), over=10)
        >>> event.end, [round(event.gate(step), 2) for step in (20, 25, 30)]
        (30, [1.0, 0.5, 0.0])
    """

    step: int
    """The step, from 0, at whose forward pass it begins."""
    site: NormSite
    """The site."""
    over: int = 0
    """How many steps it takes. 0: the site is frozen at once. Else its gate, the share of the live
    norm, falls from 1 to 0 along a cosine."""

    @property
    def end(self) -> int:
        """The first step at which the site is frozen."""
        return self.step + self.over

    def gate(self, step: int) -> float:
        """The share of the live norm in the forward pass of a step."""
        if step < self.step:
            return 1.0
        if step >= self.end:
            return 0.0
        return 0.5 * (1 + math.cos(math.pi * (step - self.step) / self.over))


@dataclass(frozen=True)
class Ramp:
    """A weight of the loss that moves linearly between two steps, and is constant outside them.

    Raises:
        RecipeError: if it does not end after it begins.

    Examples:
        >>> ramp = lf.Ramp(1.0, 0.0, from_step=10, to_step=20)
        >>> [ramp.at(step) for step in (0, 15, 30)]
        [1.0, 0.5, 0.0]
    """

    start: float
    """The weight until `from_step`."""
    end: float
    """The weight from `to_step` on."""
    from_step: int
    """The last step with the first weight."""
    to_step: int
    """The first step with the last weight."""

    def __post_init__(self) -> None:
        if self.to_step <= self.from_step:
            raise RecipeError(
                f"a ramp from step {self.from_step} must end after it, not at {self.to_step}"
            )

    def widened(self, done: int, factor: float) -> "Ramp":
        """The ramp with what remains after `done` steps spread out by a factor."""
        from_step, to_step = (later(at, done, factor) for at in (self.from_step, self.to_step))
        return replace(self, from_step=from_step, to_step=to_step)

    def at(self, step: int) -> float:
        """The weight at a step."""
        done = (step - self.from_step) / (self.to_step - self.from_step)
        return self.start + (self.end - self.start) * min(1.0, max(0.0, done))

    def __str__(self) -> str:
        return f"{self.start:g} to {self.end:g} (steps {self.from_step} to {self.to_step})"


Weight = float | Ramp
"""A weight in the loss: constant, or a ramp."""


def weight_at(weight: Weight, step: int) -> float:
    """The weight at a step."""
    return weight.at(step) if isinstance(weight, Ramp) else weight


def extremes(weight: Weight) -> tuple[float, float]:
    """The smallest and the largest value of a weight."""
    ends = (weight.start, weight.end) if isinstance(weight, Ramp) else (weight, weight)
    return min(ends), max(ends)


Sites = HookedTransformer | Sequence[NormSite]
"""A model, or its norm sites."""


def sites_of(model: Sites) -> tuple[NormSite, ...]:
    """The live sites of a model, or the given ones.

    Raises:
        RecipeError: if there is none.
    """
    sites = live_sites(model) if isinstance(model, HookedTransformer) else model
    if not sites:
        raise RecipeError("there are no norm sites that are live: is the model LN-free already?")
    return tuple(sites)


def sequential_sites(n_layers: int) -> tuple[NormSite, ...]:
    """The sites of a model like GPT-2, GPT-NeoX or Llama with that many blocks."""
    kinds: tuple[SiteKind, ...] = ("ln1.qk", "ln1.v", "ln2")
    blocks = [NormSite(kind, layer) for layer in range(n_layers) for kind in kinds]
    return (*blocks, NormSite("ln_final"))


PHASES: tuple[tuple[SiteKind, ...], ...] = (
    ("ln2",),
    ("mlp.inner",),
    ("ln2_post",),
    ("ln1.qk",),
    ("attn.q_norm", "attn.k_norm"),
    ("ln1.v",),
    ("attn.inner",),
    ("ln1_post",),
    ("ln_final",),
)
"""The published order of 2507.02559 (`ln2`, `ln1` for queries and keys, `ln1` for values,
`ln_final`); sites that GPT-2 does not have stand behind the one whose path they are on."""

assert {kind for phase in PHASES for kind in phase} == set(get_args(SplitKind))


def published_order(
    model: Sites, *, start: int, ln2_gap: int, qk_gap: int, v_gap: int
) -> tuple[Event, ...]:
    """Phase by phase (`PHASES`), each layer by layer from 0.

    A phase begins one gap after the last layer of the phase before it. Values come late and with
    the widest gaps: removing them is what most often makes gradients explode (2507.02559).

    Args:
        model: A model or its sites, of any architecture.
        start: Step of the first event.
        ln2_gap: Steps between two layers' `ln2`, and their `mlp.inner` and `ln2_post`.
        qk_gap: Steps between two layers' `ln1.qk`, and their norms on queries and keys.
        v_gap: Steps between two layers' `ln1.v`, and their `attn.inner` and `ln1_post`.

    Raises:
        RecipeError: if start or a gap is negative, or there are no sites.
    """
    if min(start, ln2_gap, qk_gap, v_gap) < 0:
        raise RecipeError("start and gaps of a removal schedule cannot be negative")
    by_phase = (*[ln2_gap] * 3, *[qk_gap] * 2, *[v_gap] * 3, 0)
    gaps = dict(zip(PHASES, by_phase, strict=True))
    sites, events = sites_of(model), []
    for phase in PHASES:
        in_phase = [site for site in sites if site.kind in phase]
        layers = sorted({site.layer or 0 for site in in_phase})
        at = {layer: start + index * gaps[phase] for index, layer in enumerate(layers)}
        events += [Event(at[site.layer or 0], site) for site in in_phase]
        start += len(layers) * gaps[phase]
    return tuple(events)


def all_at_once(model: Sites, *, step: int) -> tuple[Event, ...]:
    """Every site at the same step."""
    return tuple(Event(step, site) for site in sites_of(model))


def taper(model: Sites, *, start: int, over: int, gap: int = 0) -> tuple[Event, ...]:
    """Every site fades from live to frozen, in the published order if there is a gap.

    With `gap=0`, one gate for all sites: the schedule of TaperNorm (2602.10408), there with the
    final norm kept.

    Args:
        model: A model or its sites.
        start: Step at which the first gate begins to fall.
        over: Steps from live to frozen, for each site.
        gap: Steps by which each site begins after the one before it.

    Raises:
        RecipeError: if start, over or gap is negative, or there are no sites.
    """
    if min(start, over, gap) < 0:
        raise RecipeError("start, over and gap of a taper cannot be negative")
    in_order = published_order(model, start=0, ln2_gap=0, qk_gap=0, v_gap=0)
    return tuple(
        Event(start + index * gap, event.site, over) for index, event in enumerate(in_order)
    )


def paced(
    costs: Mapping[NormSite, float], *, start: int, over: int, fade: int = 0
) -> tuple[Event, ...]:
    """The cheapest site first, and the more time for a site the more it costs.

    A site's share of the time is proportional to the root of its cost: it fades over that many
    steps and `fade` more. Several cheap ones begin at the same step.

    Args:
        costs: By site, what freezing it alone costs, in any unit; what is not finite is taken to be
            twice the largest finite cost.
        start: Step of the first event.
        over: Steps over which the sites begin.
        fade: Steps that every site takes from live to frozen, beside its share of `over`.

    Raises:
        RecipeError: if start, over or fade is negative, or there are no sites.
    """
    if min(start, over, fade) < 0:
        raise RecipeError("start, over and fade of a removal schedule cannot be negative")
    if not costs:
        raise RecipeError("there are no norm sites: is the model LN-free already?")
    largest = max([cost for cost in costs.values() if math.isfinite(cost)] + [0.0]) or 1.0
    shares = {
        site: math.sqrt(max(cost, _FREE * largest) if math.isfinite(cost) else 2 * largest)
        for site, cost in costs.items()
    }
    unit, at, events = over / sum(shares.values()), float(start), []
    for site, share in sorted(shares.items(), key=lambda item: item[1]):
        step, at = int(at + 1e-6), at + unit * share
        fades = int(at + 1e-6) - step
        events.append(Event(step, site, fade + (fades if fades > 1 else 0)))
    return tuple(events)


_FREE = 1e-4
"""Sites that cost less than this share of the most expensive one have equal time."""


def moved(
    events: Sequence[Event],
    *,
    start: int | None = None,
    gap: int | None = None,
    over: int | None = None,
) -> tuple[Event, ...]:
    """The events with another start, other gaps, or another time to fade.

    Args:
        events: At least one.
        start: Step of the first event. Default: as it is.
        gap: Steps from a site to the next one, site by site in the published order. Default: as
            they are.
        over: Steps that each site takes from live to frozen. Default: as they are.

    Raises:
        RecipeError: if one of them is negative, or there are no events.
    """
    if min(start or 0, gap or 0, over or 0) < 0:
        raise RecipeError(
            f"start={start}, gap={gap} and taper={over} are numbers of steps: none may be negative"
        )
    if not events:
        raise RecipeError("the recipe freezes none of the norm sites that are to go")
    first = min(event.step for event in events)
    at = {event.site: event.step - first for event in events}
    if gap is not None:
        sites = sorted(at, key=lambda site: site.layer or 0)
        in_order = published_order(sites, start=0, ln2_gap=0, qk_gap=0, v_gap=0)
        at = {event.site: index * gap for index, event in enumerate(in_order)}
    begin = first if start is None else start
    return tuple(
        Event(begin + at[event.site], event.site, event.over if over is None else over)
        for event in events
    )


def later(step: int, done: int, factor: float) -> int:
    """The new number of a step when what remains after `done` steps is spread out by a factor."""
    return step if step < done else done - 1 + math.ceil((step - done + 1) * factor)


def widened(events: Iterable[Event], done: int, factor: float) -> tuple[Event, ...]:
    """The events with those that remain after `done` steps spread out by a factor.

    A run that diverged continues with them, because larger gaps help (2507.02559).
    """
    spread = []
    for event in events:
        step, end = (later(at, done, factor) for at in (event.step, event.end))
        spread.append(event if event.end < done else replace(event, step=step, over=end - step))
    return tuple(spread)


def last_step(events: Iterable[Event]) -> int:
    """The step from which on every site of the events is frozen; 0 without events."""
    return max((event.end for event in events), default=0)


def cosine_with_warmup(step: int, *, steps: int, warmup: int, floor: float) -> float:
    """The learning rate at `step` (from 0) as a share of its peak.

    Linear up over `warmup` steps, then a cosine down to `floor` at `steps`, and no further.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
