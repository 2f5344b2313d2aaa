"""Notices when a run diverges, and finds where."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from lnfree_interp.models.norms import Norm
from lnfree_interp.removal.settings import RECENT, Guard
from lnfree_interp.removal.statistics import Hooks


class DivergenceWatch:
    """Judges each step, and so whether the run has diverged.

    Attributes:
        what: The loss that is watched, in words: the KL divergence from the original if the recipe
            distils at every step, because the text of a batch moves it less; else cross-entropy.
        term: Its name in `StepRecord.losses`.
        best: The lowest that was usual so far, in nats per token: a single step's says more of its
            text than of the model where a batch is one sequence.
        rollbacks: How often the run has gone back to a checkpoint.
        in_a_row: How many steps in a row have been wrong.
    """

    def __init__(self, guard: Guard, *, distils: bool = False):
        self.guard = guard
        self.term = "distillation" if distils else "cross_entropy"
        self.what = "KL divergence from the original" if distils else "cross-entropy"
        self.best = math.inf
        self.rollbacks = 0
        self.in_a_row = 0

    def keeps(self, gradient: float, earlier: Sequence[float]) -> bool:
        """Whether a step with a gradient of this norm is made.

        Args:
            gradient: The norm.
            earlier: Those of the steps before it.
        """
        if self.guard.spike is None or not math.isfinite(gradient):
            return math.isfinite(gradient)
        few = sum(map(math.isfinite, earlier[-RECENT:])) < RECENT // 2
        return few or gradient <= self.guard.spike * _usual(earlier)

    @property
    def diverged(self) -> bool:
        """Whether as many steps in a row have been wrong as the guard allows."""
        return self.in_a_row >= self.guard.in_a_row

    def verdict(
        self,
        loss: float,
        gradient: float,
        earlier: Sequence[float] = (),
        drift: Mapping[str, float] | None = None,
    ) -> str | None:
        """What is wrong with a step, in words; None if nothing is.

        Args:
            loss: The step's loss that is watched.
            gradient: The norm of its gradient.
            earlier: The losses of the steps before it.
            drift: By frozen site, the sigma of its inputs over its constant, if it was measured.
        """
        self.best = min(self.best, _usual(earlier))
        wrong = self._wrong(loss, gradient, drift or {})
        self.in_a_row = 0 if wrong is None else self.in_a_row + 1
        return wrong

    def _wrong(self, loss: float, gradient: float, drift: Mapping[str, float]) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            return f"{self.what} {loss:.4g}, gradient norm {gradient:.4g}"
        if loss > self.best + self.guard.above_best:
            return f"{self.what} {loss:.4g}, {loss - self.best:.3g} above the lowest usual so far"
        for site, ratio in drift.items():
            if not 1 / self.guard.sigma_factor < ratio < self.guard.sigma_factor:
                return f"the inputs of {site} have {ratio:.3g} times its constant sigma"
        return None


def _usual(earlier: Sequence[float]) -> float:
    """The median of the last `RECENT` steps; infinite before the first."""
    found = sorted(filter(math.isfinite, earlier[-RECENT:]))
    return found[len(found) // 2] if found else math.inf


@torch.no_grad()
def find_runaway(
    model: HookedTransformer,
    norms: Mapping[str, Norm],
    tokens: Int[Tensor, "sequence pos"],
    hooks: Hooks,
    factor: float,
    forward: Callable[[Tensor], object],
    at_once: int,
) -> str | None:
    """Where activations ran away, in words: the first frozen site at which a token is far above
    what it is divided by.

    Args:
        model: With norm sites.
        norms: The norms at its sites, by name.
        tokens: The text on which the run diverged.
        hooks: The hooks of the step.
        factor: How many times that counts as far.
        forward: Runs the model on the text.
        at_once: How many sequences it runs on at once.

    Returns:
        The site, the token and by how much; None if every token is near, or memory is too short
        to look.
    """
    if len(tokens) == 0:  # no step yet since the run was resumed
        return None
    found: list[str] = []
    rows = 0  # that have been looked at
    own: dict[str, Tensor] = {}

    def see(x: Tensor, hook: HookPoint) -> None:
        name, _, _ = str(hook.name).rpartition(".")
        own[name] = norms[name].token_sigma(x)

    def compare(scale: Tensor, hook: HookPoint) -> None:
        name, _, _ = str(hook.name).rpartition(".")
        if found or norms[name].live:
            return
        ratio = (own[name] / scale).flatten(2).amax(2)
        ratio = torch.where(ratio.isfinite(), ratio, torch.inf)
        if ratio.max() > factor:
            row, pos = divmod(int(ratio.argmax()), ratio.shape[1])
            row += rows
            token = int(tokens[row, pos])
            text = repr(model.tokenizer.decode([token])) if model.tokenizer else f"token {token}"
            found.append(
                f"it began at {name}, where {text} at position {pos} of sequence {row} has "
                f"{ratio.max().item():.3g} times the scale that it is divided by"
            )

    looking = [(f"{name}.hook_in", see) for name in norms]
    comparing = [(f"{name}.hook_scale", compare) for name in norms]
    watching = model.hooks(fwd_hooks=[*hooks, *looking, *comparing])
    # To say less must not end a run that could go back.
    with suppress(torch.OutOfMemoryError), watching:
        for some in tokens.split(at_once):  # all of them: under FSDP processes go together
            forward(some)
            rows += len(some)
    return found[0] if found else None
