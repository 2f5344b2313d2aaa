"""What a run returns: the trained model, and what happened at each step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformer_lens import HookedTransformer

from lnfree_interp.removal.recipe import Recipe


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step."""

    step: int
    """Its number, from 0."""
    losses: Mapping[str, float]
    """Each term of the loss by name, before its weight, on this step's batch. `cross_entropy` and
    `distillation`, the KL divergence from the original, are in nats per token."""
    lr: float
    """The learning rate."""
    frozen: Mapping[str, float]
    """Sites that are frozen from this step on, and their sigma."""
    gradient: float = 0.0
    """Norm of the gradient before clipping."""
    seconds: float = 0.0
    """How long the step took."""
    probes: Mapping[str, Any] = field(default_factory=dict)
    """Every `log_every` steps: sigma drift by site, residual norms by layer, largest activation,
    and the mean absolute gradient of each weight by kind and layer, before clipping."""
    heldout: float | None = None
    """Cross-entropy on the held-out text after this step, if it was evaluated."""
    released: str | None = None
    """What else is trained from the next step on, if anything."""
    rollback: str | None = None
    """Why the run went back to this step, if it did."""
    skipped: bool = False
    """Whether the gradient was thrown away, because it was not finite or far above the usual."""

    @property
    def loss(self) -> float:
        """Cross-entropy in nats per token."""
        return self.losses["cross_entropy"]


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning."""

    model: HookedTransformer
    """With norm sites, frozen where the recipe says so. `fold` removes the frozen ones."""
    recipe: Recipe
    """The recipe as it was run, with the gaps that rollbacks widened."""
    history: tuple[StepRecord, ...]
    """One record per optimiser step: losses, frozen sites, probes."""
    seconds: float
    """How long this process trained; a resumed run counts from where it was resumed."""
