"""One process or several, CPU or GPU: what Accelerate does for the loop."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lnfree_interp.errors import RecipeError

T = TypeVar("T")


class Processes:
    """The processes of a run, as `accelerate launch` or `torchrun` started them.

    Attributes:
        device: Where this process computes.
        rank: Its number.
        world: How many there are.
    """

    def __init__(self, device: torch.device):
        """Meet the other processes, if there are any.

        Args:
            device: Where the model is; a single process stays there.

        Raises:
            RecipeError: if an `Accelerator` with mixed precision exists already.
        """
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not several:
            # Accelerate remembers the device of the first run in a process; a notebook has many.
            AcceleratorState._reset_state(reset_partial_state=True)
        cpu = device.type == "cpu" and not (several and torch.cuda.is_available())
        try:
            # Autocast is the objective's own, so that each product has the dtype that it states.
            self.accelerator = Accelerator(cpu=cpu, mixed_precision="no")
        except ValueError as error:
            raise RecipeError(
                f"Accelerate is set up otherwise already: start a new process ({error!s:.80})"
            ) from error
        self.device = self.accelerator.device if several or cpu else device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.wrapped: nn.Module | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The module as it is to be called, and the optimiser as it is to be stepped."""
        if self.world == 1:
            return module, optimizer
        self.wrapped, optimizer = self.accelerator.prepare(module, optimizer)
        return self.wrapped, optimizer

    def synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: gradients are exchanged after the last one only."""
        if last or self.wrapped is None:
            return nullcontext()
        return self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss."""
        self.accelerator.backward(loss)

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> float:
        """Scale the gradient down to a norm of at most `largest`; returns the norm it had."""
        norm = self.accelerator.clip_grad_norm_(list(parameters), largest)
        return whole(norm).item()

    def sum(self, x: Tensor) -> Tensor:
        """Over all processes."""
        return x if self.world == 1 else self.accelerator.reduce(x, reduction="sum")

    def on_main(self, action: Callable[[], T]) -> T:
        """Let the main process do something; all get its result, or its exception."""
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, x: T) -> list[T]:
        """One from each process."""
        return [x] if self.world == 1 else gather_object([x])


def whole(x: Tensor) -> Tensor:
    """A tensor that FSDP has spread over processes, in one piece; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread_like(x: Tensor, place: Tensor) -> Tensor:
    """A whole tensor, spread over processes as `place` is."""
    if isinstance(place, DTensor):
        return distribute_tensor(x.to(place.device), place.device_mesh, place.placements)
    return x
