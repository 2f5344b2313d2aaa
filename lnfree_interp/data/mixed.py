"""Sequences in a random order within a window of a text that never ends."""

import hashlib
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lnfree_interp.data.sequences import TokenSequences, check_take, epoch_order
from lnfree_interp.errors import DataError

WINDOW = 1024
"""Sequences that are mixed for training."""


class MixedSequences:
    """A `TokenSequences` that reads a window of sequences and gives them in a random order.

    A packed text gives the sequences of a document one behind the other. In small batches a model
    would be trained on one document for many steps, and then on the next. A window ends with the
    epoch, so that each epoch has the sequences that it has in order.

    Args:
        sequences: The source. Nothing else may use it.
        window: How many sequences are mixed at most; they are held in memory.
        seed: The random seed of the order.

    Raises:
        DataError: if the window is below 1.

    Source:
        The shuffle buffer of `datasets`; as windows, so that a position can be saved: ours.

    Examples:
        >>> text = lf.open_sequences("stdlib", model.tokenizer, sequence_length=64)
        >>> mixed = lf.MixedSequences(text, window=16)
        >>> mixed.take(2).shape
        torch.Size([2, 64])
    """

    def __init__(self, sequences: TokenSequences, window: int = WINDOW, seed: int = 0) -> None:
        if window < 1:
            raise DataError(f"a window of {window} sequences cannot be mixed: give 1 or more")
        self.sequence_length = sequences.sequence_length
        self._sequences, self._size, self._seed = sequences, window, seed
        self._number, self._used = 0, 0
        self._go_to(sequences.state_dict())

    @property
    def epoch(self) -> int:
        """The epoch in which the window of the next sequence begins."""
        return self._epoch

    def take(self, n: int) -> Int[Tensor, "n pos"]:
        """The next n sequences, int64, on the CPU."""
        check_take(n)
        before = self.state_dict()
        try:
            return self._take(n)
        except BaseException:
            self.load_state_dict(before)
            raise

    def state_dict(self) -> dict[str, Any]:
        """The position after the last take."""
        return {"window": self._start, "number": self._number, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        if (state["window"], state["number"]) != (self._start, self._number):
            self._sequences.load_state_dict(state["window"])
            self._number = state["number"]
            self._go_to(state["window"])
        self._used = state["used"]

    def fingerprint(self) -> str:
        """A hash of the source's fingerprint, the window and the seed."""
        what = f"{self._sequences.fingerprint()} mixed {self._size} {self._seed}"
        return hashlib.sha256(what.encode()).hexdigest()

    def _take(self, n: int) -> Tensor:
        if self._window is None:
            self._window = self._read_window()
        window = self._window
        taken = window[self._used : self._used + n]
        self._used += len(taken)
        if self._used == len(window):
            self._number, self._used = self._number + 1, 0
            self._go_to(self._sequences.state_dict())
        if len(taken) == n:
            return taken.clone()
        return torch.cat([taken, self._take(n - len(taken))])

    def _read_window(self) -> Tensor:
        rows = [self._sequences.take(1)]
        while len(rows) < self._size and self._sequences.epoch == self._epoch:
            rows.append(self._sequences.take(1))
        return torch.cat(rows)[epoch_order(len(rows), self._seed, self._number)]

    def _go_to(self, start: dict[str, Any]) -> None:
        """Begin a window here, where the source stands."""
        self._start, self._epoch = start, self._sequences.epoch
        self._window: Tensor | None = None
