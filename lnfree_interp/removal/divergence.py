"""Notices when a run diverges."""

import math
from collections.abc import Mapping

from lnfree_interp.removal.settings import Guard


class DivergenceWatch:
    """Decides after each step whether the run has diverged.

    Attributes:
        best: The lowest cross-entropy of a step so far, in nats per token.
        rollbacks: How often the run has gone back to a checkpoint.
    """

    def __init__(self, guard: Guard):
        self.guard = guard
        self.best = math.inf
        self.rollbacks = 0

    def verdict(
        self, loss: float, gradient: float, drift: Mapping[str, float] | None = None
    ) -> str | None:
        """Why the run has diverged, in words; None if it has not.

        Args:
            loss: The step's cross-entropy.
            gradient: The norm of its gradient.
            drift: By frozen site, the sigma of its inputs over its constant, if it was measured.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            return f"loss {loss:.4g}, gradient norm {gradient:.4g}"
        if loss > self.best + self.guard.above_best:
            return f"loss {loss:.4g}, {loss - self.best:.3g} above the lowest so far"
        self.best = min(self.best, loss)
        for site, ratio in (drift or {}).items():
            if not 1 / self.guard.sigma_factor < ratio < self.guard.sigma_factor:
                return f"the inputs of {site} have {ratio:.3g} times its constant sigma"
        return None
