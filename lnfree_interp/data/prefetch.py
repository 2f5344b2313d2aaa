"""Reads and packs the next sequences while the accelerator works."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxtyping import Int
from torch import Tensor

from lnfree_interp.data.sequences import TokenSequences, check_take
from lnfree_interp.errors import DataError


class Prefetched:
    """A `TokenSequences` that computes its next take ahead, in a thread.

    It expects the next take to be as large as the last one. Its position is the one after the last
    sequences that were taken. Use it in `with`, or close it: the source then stands at that
    position too. Nothing else may use the source before that.

    Args:
        sequences: The source.
    """

    def __init__(self, sequences: TokenSequences) -> None:
        self._sequences = sequences
        self.sequence_length = sequences.sequence_length
        self.epoch = sequences.epoch
        self._state = sequences.state_dict()
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "sequences")
        self._next: tuple[int, Future[tuple[Tensor, dict[str, Any], int]]] | None = None

    def take(self, n: int) -> Int[Tensor, "n pos"]:
        """The next n sequences, int64, on the CPU. An error of the thread is raised here.

        Raises:
            DataError: if n is below 1, the source cannot be read, or this is closed.
        """
        check_take(n)
        if self._thread is None:
            raise DataError("this source was closed: take from the one it read")
        if self._next is not None and self._next[0] != n:
            self._go_back()
        self._next = self._next or (n, self._thread.submit(self._compute, n))
        try:
            batch, self._state, self.epoch = self._next[1].result()
        except BaseException:
            self._go_back()
            raise
        self._next = (n, self._thread.submit(self._compute, n))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last take, however far the thread has read on."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self._state = state
        self._go_back()
        self.epoch = self._sequences.epoch

    def fingerprint(self) -> str:
        """The source's fingerprint."""
        return self._sequences.fingerprint()

    def close(self) -> None:
        """End the thread, and set the source to the position after the last take."""
        if self._thread is not None:
            self._go_back()
            self._thread.shutdown()
            self._thread = None

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compute(self, n: int) -> tuple[Tensor, dict[str, Any], int]:
        batch = self._sequences.take(n)
        return batch, self._sequences.state_dict(), self._sequences.epoch

    def _go_back(self) -> None:
        """Discard what was computed ahead."""
        if self._next is not None:
            self._next[1].exception()  # waits; an error in a take that is discarded does not count
            self._next = None
        self._sequences.load_state_dict(self._state)
