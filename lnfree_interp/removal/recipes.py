"""Recipes: functions that return a configuration of the fine-tuning that removes the norms."""

from dataclasses import dataclass, replace

from lnfree_interp.errors import RecipeError
from lnfree_interp.removal.schedule import Event, published_order


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a removal run is made of, except the model and the text."""

    events: tuple[Event, ...]
    """When which site is frozen. Empty: an ordinary fine-tuning."""
    steps: int
    batch: int
    """Blocks of text per optimiser step."""
    lr: float
    """Peak learning rate of AdamW."""
    warmup: int
    final_lr: float
    """Learning rate at the last step, as a share of `lr`."""
    weight_decay: float = 0.01
    """On weight matrices and embeddings; never on biases and gains."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Largest gradient norm."""
    scale_anchor: float = 0.1
    """Weight of the auxiliary loss that keeps ln_final's input at one scale."""
    sigma_blocks: int = 64
    """Blocks of text on which a site's sigma is measured when its event comes."""
    seed: int = 0
    """Of the order of the data."""

    def __post_init__(self) -> None:
        late = [event for event in self.events if event.step >= self.steps]
        if late:
            raise RecipeError(
                f"{late[0].site} would be frozen at step {late[0].step}, but training ends after "
                f"{self.steps} steps: give more steps, or start earlier with smaller gaps"
            )
        for name in ("steps", "batch", "lr", "clip", "sigma_blocks"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.warmup < self.steps:
            raise RecipeError(f"warmup must lie in 0..{self.steps - 1}, not {self.warmup}")

    def vanilla(self) -> "Recipe":
        """The control: same steps, data order and learning rates, but nothing is removed."""
        return replace(self, events=(), scale_anchor=0.0)


def demo(n_layers: int = 4, *, steps: int = 300, seed: int = 0) -> Recipe:
    """The published order, scaled to a small model and a few minutes on two CPU cores.

    Events take the first half of the steps, in the proportions of the published schedule for
    GPT-2 small with the auxiliary loss (2507.02559); the other half recovers.

    Args:
        n_layers: Blocks in the model.
        steps: Optimiser steps.
        seed: Of the data order.

    Raises:
        RecipeError: if the steps are too few for the events.
    """
    start = steps // 15
    # Published gaps stand as 2 : 2 : 3 for ln2 : qk : v, and the events must end by half-time.
    unit = max(0, (steps // 2 - start) // (7 * n_layers))
    return Recipe(
        events=published_order(
            n_layers, start=start, ln2_gap=2 * unit, qk_gap=2 * unit, v_gap=3 * unit
        ),
        steps=steps,
        batch=16,
        lr=6e-4,
        warmup=min(20, steps // 10),
        final_lr=0.05,
        seed=seed,
    )
