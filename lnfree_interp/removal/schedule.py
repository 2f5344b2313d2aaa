"""When which norm site is frozen: pure data, and the published order that makes it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lnfree_interp.errors import RecipeError
from lnfree_interp.models.sites import NormSite, SiteKind


@dataclass(frozen=True)
class Event:
    """Before the forward pass of `step` (from 0), `site` goes from live to frozen."""

    step: int
    site: NormSite


@dataclass(frozen=True)
class Phase:
    """All sites of one kind, layer by layer."""

    kind: SiteKind
    start: int
    """Step at which layer 0 is frozen."""
    gap: int = 0
    """Steps between one layer and the next; 0 freezes all layers at once."""

    def events(self, n_layers: int) -> tuple[Event, ...]:
        """The phase for a model of `n_layers`."""
        layers: Iterable[int | None] = [None] if self.kind == "ln_final" else range(n_layers)
        return tuple(
            Event(self.start + index * self.gap, NormSite(self.kind, layer))
            for index, layer in enumerate(layers)
        )


def published_order(
    n_layers: int, *, start: int, ln2_gap: int, qk_gap: int, v_gap: int
) -> tuple[Event, ...]:
    """ln2, then ln1 for queries and keys, then ln1 for values, then ln_final.

    Each kind goes layer by layer from 0; a phase begins one gap after the last layer of the phase
    before it. Values come late and with the widest gaps: removing them is what most often makes
    gradients explode (2507.02559).

    Args:
        n_layers: Blocks in the model.
        start: Step of the first event.
        ln2_gap: Steps between two layers' `ln2`.
        qk_gap: Steps between two layers' `ln1.qk`.
        v_gap: Steps between two layers' `ln1.v`.

    Raises:
        RecipeError: if start or a gap is negative.
    """
    if min(start, ln2_gap, qk_gap, v_gap) < 0:
        raise RecipeError("start and gaps of a removal schedule cannot be negative")
    qk_start = start + n_layers * ln2_gap
    v_start = qk_start + n_layers * qk_gap
    phases = (
        Phase("ln2", start, ln2_gap),
        Phase("ln1.qk", qk_start, qk_gap),
        Phase("ln1.v", v_start, v_gap),
        Phase("ln_final", v_start + n_layers * v_gap),
    )
    return tuple(event for phase in phases for event in phase.events(n_layers))


def cosine_with_warmup(step: int, *, steps: int, warmup: int, floor: float) -> float:
    """The learning rate at `step` (from 0) as a share of its peak.

    Linear up over `warmup` steps, then a cosine down to `floor` at `steps`.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
