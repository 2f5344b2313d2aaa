"""One process or several, on CPU or GPU: the loop's use of Accelerate."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lnfree_interp.errors import RecipeError

T = TypeVar("T")

TIMEOUT = timedelta(hours=3)
"""How long processes wait for the main one, which measures and evaluates alone."""


class Processes:
    """The processes of a run, as `accelerate launch` or `torchrun` started them.

    Attributes:
        device: Where this process computes.
        rank: Its number.
        world: How many there are.
    """

    def __init__(self, device: torch.device):
        """Connect to the other processes, if there are any.

        Args:
            device: Where the model is; a single process trains there.

        Raises:
            RecipeError: if Accelerate is set up in a way that is not supported.
        """
        self.device, self.rank, self.world = device, 0, 1
        self.accelerator: Accelerator | None = None
        self.wrapped: nn.Module | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        try:
            # The objective has its own autocast: each product has the dtype that it states.
            self.accelerator = Accelerator(
                cpu=device.type == "cpu" and not torch.cuda.is_available(),
                mixed_precision="no",
                kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
            )
        except ValueError as error:
            raise RecipeError(
                f"Accelerate was set up in this process before: start a new one ({error!s:.80})"
            ) from error
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version != 2:
            raise RecipeError("only FSDP 2 is supported: accelerate launch --fsdp_version 2")
        if plugin is not None and plugin.cpu_ram_efficient_loading:
            raise RecipeError(
                "fsdp_cpu_ram_efficient_loading would untie the embeddings: set it to false"
            )

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The wrapped module to call, and the wrapped optimiser to step."""
        if self.accelerator is None:
            return module, optimizer
        wrapped, optimizer = self.accelerator.prepare(module, optimizer)
        self.wrapped = wrapped
        return wrapped, optimizer

    def synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """A context for a micro-batch: gradients are exchanged after the last one only."""
        if last or self.accelerator is None or self.wrapped is None:
            return nullcontext()
        return self.accelerator.no_sync(self.wrapped)

    def clip(self, parameters: Sequence[nn.Parameter], largest: float) -> float:
        """Scale the gradient to a norm of at most `largest`; returns its norm before that."""
        clip: Any = torch.nn.utils.clip_grad_norm_
        if self.accelerator is not None:
            clip = self.accelerator.clip_grad_norm_
        return whole(clip(list(parameters), largest)).item()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.accelerator is None:
            return x
        return cast(Tensor, self.accelerator.reduce(x, reduction="sum"))

    def equal_rows(self, x: Tensor) -> Tensor:
        """This process's rows. Each process has as many; rows that are left over are dropped."""
        return x[: len(x) - len(x) % self.world][self.rank :: self.world].to(self.device)

    def on_main(self, action: Callable[[], T]) -> T:
        """Let the main process do something; all processes get its result or its exception."""
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
        """The values of all processes."""
        return [x] if self.world == 1 else gather_object([x])


def whole(x: Tensor) -> Tensor:
    """A tensor that FSDP has spread over processes, in one piece; any other unchanged."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread_like(x: Tensor, place: Tensor) -> Tensor:
    """A whole tensor, spread over processes as `place` is."""
    if isinstance(place, DTensor):
        return distribute_tensor(x.to(place.device), place.device_mesh, place.placements)
    return x


def gather_anew(module: nn.Module) -> None:
    """Let FSDP gather weights that were changed by hand; it keeps some of them gathered from one
    forward pass to the next."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
