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
    micro_batch: int = 4
    """Blocks per forward pass; gradients add up over the batch. On a CPU, small is fast: logits
    that fit into the cache."""
    lr: float
    """Peak learning rate of AdamW."""
    warmup: int
    final_lr: float
    """What the learning rate falls to, as a share of `lr`."""
    weight_decay: float = 0.01
    """On weight matrices and embeddings; never on biases and gains."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Largest gradient norm."""
    distillation: float = 0.0
    """Share of the loss that is the KL divergence from the original model; cross-entropy is the
    rest. Costs one forward pass of the original per step."""
    scale_anchor: float = 0.1
    """Weight of the auxiliary loss that keeps ln_final's input at one scale."""
    sigma_blocks: int = 64
    """Blocks of text on which a site's sigma is measured when its event comes."""
    seed: int = 0
    """Of the order of the data."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "lr", "clip", "sigma_blocks"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.warmup < self.steps:
            raise RecipeError(f"warmup must lie in 0..{self.steps - 1}, not {self.warmup}")
        if not 0 <= self.distillation <= 1:
            raise RecipeError(f"distillation must lie in 0..1, not {self.distillation}")
        for event in self.events:
            if not 0 <= event.step < self.steps:
                raise RecipeError(
                    f"{event.site} would be frozen at step {event.step}, outside the {self.steps} "
                    "steps of training"
                )
        sites = [event.site for event in self.events]
        if twice := [str(site) for site in sites if sites.count(site) > 1]:
            raise RecipeError(f"{twice[0]} would be frozen twice")

    def vanilla(self) -> "Recipe":
        """The control: same steps, data order and learning rates, but nothing is removed."""
        return replace(self, events=(), scale_anchor=0.0, distillation=0.0)


def demo(n_layers: int = 4, *, steps: int = 250, seed: int = 0) -> Recipe:
    """The published order, scaled to a small model and a few minutes on two CPU cores.

    Events take the first quarter of the steps, with the gaps of the published schedule for GPT-2
    small (2, 2 and 3 steps a layer; 2507.02559) or a multiple of them; single steps where there is
    no time for that. The rest recovers. Half of the loss is distillation from the original, which
    the published recipes do not have: with so few tokens, cross-entropy alone leaves a gap.

    Args:
        n_layers: Blocks in the model.
        steps: Optimiser steps.
        seed: Of the data order.

    Raises:
        RecipeError: if there are fewer steps than events.
    """
    n_sites = 3 * n_layers + 1
    if steps < n_sites:
        raise RecipeError(f"{steps} steps are too few for {n_sites} norm sites: give more steps")
    start = min(steps // 30, steps - n_sites)
    unit = (steps // 4 - start) // (7 * n_layers)
    gaps = (2 * unit, 2 * unit, 3 * unit) if unit > 0 else (1, 1, 1)
    return Recipe(
        events=published_order(
            n_layers, start=start, ln2_gap=gaps[0], qk_gap=gaps[1], v_gap=gaps[2]
        ),
        steps=steps,
        batch=16,
        lr=6e-4,
        warmup=min(20, steps // 10),
        final_lr=0.05,
        distillation=0.5,
        seed=seed,
    )
