"""Sources of token sequences that never end, and whose position can be saved and restored."""

import hashlib
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from lnfree_interp.errors import DataError


@runtime_checkable
class TokenSequences(Protocol):
    """Sequences of tokens without end: when the text is used up, it starts again as a new epoch."""

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch in which the next sequence begins; the first one is 0."""
        ...

    def take(self, n: int) -> Int[Tensor, "n pos"]:
        """The next n sequences, int64, on the CPU.

        Raises:
            DataError: if n is below 1 or the text cannot be read. The position does not change.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last take, as plain data that survives JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that a source with the same `fingerprint()` has saved."""
        ...

    def fingerprint(self) -> str:
        """A hash of the text, its packing and its order.

        Two sources with the same fingerprint give the same sequences from the same position. Of a
        long text only a sample is read.
        """
        ...


class ShuffledSequences:
    """Sequences in memory. Every epoch has each of them once, in an order of its own.

    Args:
        sequences: Token ids [sequence, pos], as `pack` returns them.
        seed: The random seed of the orders.

    Raises:
        DataError: if there are no sequences, or no tokens in them.
    """

    def __init__(self, sequences: Int[Tensor, "sequence pos"], seed: int) -> None:
        if sequences.numel() == 0:
            raise DataError(f"there are no tokens in sequences of shape {list(sequences.shape)}")
        self.sequence_length = sequences.shape[1]
        self._sequences = sequences.detach().to("cpu", torch.long)
        self._seed = seed
        self._taken = 0
        self._order = (0, epoch_order(len(sequences), seed, 0))

    @property
    def epoch(self) -> int:
        """The epoch in which the next sequence begins."""
        return self._taken // len(self._sequences)

    def take(self, n: int) -> Int[Tensor, "n pos"]:
        """The next n sequences, int64, on the CPU."""
        check_take(n)
        rows = []
        while n:
            epoch, start = divmod(self._taken, len(self._sequences))
            if self._order[0] != epoch:
                self._order = (epoch, epoch_order(len(self._sequences), self._seed, epoch))
            rows.append(self._order[1][start : start + n])
            self._taken += len(rows[-1])
            n -= len(rows[-1])
        return self._sequences[torch.cat(rows)]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last take."""
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self._taken = state["taken"]

    def fingerprint(self) -> str:
        """A hash of every token and the seed."""
        digest = hashlib.sha256(self._sequences.flatten().numpy().data)
        digest.update(f"{list(self._sequences.shape)} {self._seed}".encode())
        return digest.hexdigest()


def epoch_order(n: int, seed: int, epoch: int) -> Int[Tensor, " n"]:
    """A permutation of 0 to n - 1 that depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    return torch.randperm(n, generator=generator)


def derived_seed(seed: int, n: int) -> int:
    """The n-th of the seeds that follow from one; hashed, so that no two seeds share any."""
    digest = hashlib.sha256(f"{seed} {n}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def check_take(n: int) -> None:
    """Refuse a take of less than one sequence.

    Raises:
        DataError: if n is below 1.
    """
    if n < 1:
        raise DataError(f"{n} sequences cannot be taken: take 1 or more")


def share(batch: Int[Tensor, "n pos"], rank: int, world: int) -> Int[Tensor, "m pos"]:
    """One process's rows of a batch: every `world`-th row, beginning with row `rank`.

    Args:
        batch: [n, pos], the same in every process.
        rank: The number of this process, 0 to world - 1.
        world: How many processes share the batch.

    Raises:
        DataError: if the rows do not divide evenly, or there is no such rank.
    """
    if not 0 <= rank < world:
        raise DataError(f"rank {rank} is not one of {world} processes")
    if len(batch) % world:
        raise DataError(
            f"a batch of {len(batch)} sequences cannot be divided among {world} processes: make it "
            f"a multiple of {world}"
        )
    return batch[rank::world]
