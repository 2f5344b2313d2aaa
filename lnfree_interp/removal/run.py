"""What a run leaves behind."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformer_lens import HookedTransformer

from lnfree_interp.removal.recipe import Recipe


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step."""

    step: int
    loss: float
    """Cross-entropy in nats per token, on this step's batch."""
    anchor: float
    """The scale anchor before its weight."""
    lr: float
    frozen: Mapping[str, float]
    """Sites that are frozen from this step on, and their sigma."""
    distillation: float = 0.0
    """KL divergence from the original, in nats per token; 0 where it is not asked for."""
    gradient: float = 0.0
    """Norm of the gradient before clipping."""
    seconds: float = 0.0
    probes: Mapping[str, Any] = field(default_factory=dict)
    """Every `log_every` steps: sigma drift by site, residual norms by layer, largest activation."""
    heldout: float | None = None
    """Cross-entropy on the held-out text after this step, if it was evaluated."""
    rollback: str | None = None
    """Why the run was set back to this step, if it was."""


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning."""

    model: HookedTransformer
    """With norm sites: frozen where the recipe says so. `fold` takes it from here."""
    recipe: Recipe
    """As it was run: with the gaps that rollbacks widened."""
    history: tuple[StepRecord, ...]
    """One record per optimiser step: losses in nats per token, what was frozen, probes."""
    seconds: float
    """Of this process; a resumed run counts from where it was resumed."""
