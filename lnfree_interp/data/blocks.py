"""Endless sources of blocks whose position can be saved and found again."""

import hashlib
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from lnfree_interp.errors import DataError


@runtime_checkable
class TokenBlocks(Protocol):
    """Blocks of tokens without end: used up, the text starts again as the next epoch."""

    @property
    def block(self) -> int:
        """Tokens per block."""
        ...

    @property
    def epoch(self) -> int:
        """How often the text was used up before the next block begins: 0 at first."""
        ...

    def take(self, n: int) -> Int[Tensor, "n block"]:
        """The next n blocks, int64, on the CPU.

        Raises:
            DataError: if n is below 1, or the text cannot be read; the position is then unchanged.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last take, of values that JSON keeps as they are."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; it must come from a source with the same `fingerprint()`."""
        ...

    def fingerprint(self) -> str:
        """Names the text, its packing and its order: equal where a saved position means the same.

        Cheap, so it looks at a sample of a long text.
        """
        ...


class ShuffledBlocks:
    """Blocks in memory, in a fresh order every epoch; each comes exactly once an epoch.

    Args:
        blocks: [blocks, block], such as `pack(...)`.
        seed: Of the orders.

    Raises:
        DataError: if there is no block, or the blocks are empty.
    """

    def __init__(self, blocks: Int[Tensor, "blocks block"], seed: int) -> None:
        if blocks.numel() == 0:
            raise DataError(f"blocks of shape {list(blocks.shape)} hold no text")
        self.block = blocks.shape[1]
        self._blocks = blocks.detach().to("cpu", torch.long)
        self._seed = seed
        self._taken = 0
        self._order = (0, epoch_order(len(blocks), seed, 0))

    @property
    def epoch(self) -> int:
        """As `TokenBlocks.epoch`."""
        return self._taken // len(self._blocks)

    def take(self, n: int) -> Int[Tensor, "n block"]:
        """As `TokenBlocks.take`."""
        check_take(n)
        rows = []
        while n:
            epoch, start = divmod(self._taken, len(self._blocks))
            if self._order[0] != epoch:
                self._order = (epoch, epoch_order(len(self._blocks), self._seed, epoch))
            rows.append(self._order[1][start : start + n])
            self._taken += len(rows[-1])
            n -= len(rows[-1])
        return self._blocks[torch.cat(rows)]

    def state_dict(self) -> dict[str, Any]:
        """As `TokenBlocks.state_dict`."""
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `TokenBlocks.load_state_dict`."""
        self._taken = state["taken"]

    def fingerprint(self) -> str:
        """As `TokenBlocks.fingerprint`, of every token."""
        digest = hashlib.sha256(self._blocks.flatten().numpy().data)
        digest.update(f"{list(self._blocks.shape)} {self._seed}".encode())
        return digest.hexdigest()


def epoch_order(n: int, seed: int, epoch: int) -> Int[Tensor, " n"]:
    """A permutation of n things that depends on the seed and the epoch alone."""
    # Hashed, so that an epoch of one seed is not another epoch of the next seed.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randperm(n, generator=generator)


def check_take(n: int) -> None:
    """Refuse a take of no blocks.

    Raises:
        DataError: if n is below 1.
    """
    if n < 1:
        raise DataError(f"{n} blocks cannot be taken: take 1 or more")


def share(batch: Int[Tensor, "n block"], rank: int, world: int) -> Int[Tensor, "m block"]:
    """One process's rows of a batch: every `world`-th, from its rank on.

    Args:
        batch: [n, block], the same in every process.
        rank: This process, 0 to world - 1.
        world: How many processes share the batch.

    Raises:
        DataError: if the rows do not divide evenly, or there is no such rank.
    """
    if not 0 <= rank < world:
        raise DataError(f"rank {rank} is not one of {world} processes")
    if len(batch) % world:
        raise DataError(
            f"a batch of {len(batch)} blocks does not divide among {world} processes: "
            f"make it a multiple of {world}"
        )
    return batch[rank::world]
