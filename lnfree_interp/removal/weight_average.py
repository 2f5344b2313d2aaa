"""A moving average of the weights, which becomes the finished model's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lnfree_interp.removal.optimizer import PartialAdamW
from lnfree_interp.removal.processes import gather_anew


class WeightAverage:
    """The average of each weight over the last steps.

    It is kept in the optimiser's state, beside the two averages of AdamW, so that a checkpoint has
    it and FSDP spreads it like the rest; torch's AveragedModel is a second model, hooks and all.
    """

    def __init__(self, optimizer: PartialAdamW, module: nn.Module, momentum: float):
        """An average of nothing yet.

        Args:
            optimizer: Has the weights.
            module: What runs with them, as it is wrapped for several processes.
            momentum: The share of the old average that a step keeps.
        """
        self.optimizer, self.module, self.momentum = optimizer, module, momentum
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights behind a step. The first steps count alike."""
        kept = min(self.momentum, self.steps / (self.steps + 1))
        self.steps += 1
        for state, weight in self._moved():
            if KEY in state:
                state[KEY].lerp_(weight, 1 - kept)
            else:
                state[KEY] = weight.detach().clone()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the average of its weights, if there is one, for as long as it is open."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average in the place of the weights, and these in its own."""
        if not self.steps:
            return
        for state, weight in self._moved():
            latest = weight.detach().clone()
            weight.copy_(state[KEY])
            state[KEY].copy_(latest)
        self.optimizer.write()
        gather_anew(self.module)

    def _moved(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """The weights that the optimiser has a state of, which are all that ever changed."""
        for group in self.optimizer.param_groups:
            for weight in group["params"]:
                if self.optimizer.state.get(weight):
                    yield self.optimizer.state[weight], weight


KEY = "weight_average"
"""Its name in the state of the optimiser."""
