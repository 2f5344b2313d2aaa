"""The next blocks, read and packed while the accelerator works."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxtyping import Int
from torch import Tensor

from lnfree_interp.data.blocks import TokenBlocks, check_take
from lnfree_interp.errors import DataError


class Prefetched:
    """A `TokenBlocks` that computes its next take in one thread, always of the last take's size.

    Its position is that after the last blocks handed out. Close it, or use it in `with`: the
    source then stands at that position too. Until then nobody else may use the source.

    Args:
        blocks: The source.
    """

    def __init__(self, blocks: TokenBlocks) -> None:
        self._blocks = blocks
        self.block = blocks.block
        self.epoch = blocks.epoch
        self._state = blocks.state_dict()
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "blocks")
        self._next: tuple[int, Future[tuple[Tensor, dict[str, Any], int]]] | None = None

    def take(self, n: int) -> Int[Tensor, "n block"]:
        """As `TokenBlocks.take`; what went wrong in the thread is raised here.

        Raises:
            DataError: as the source, and if it is closed.
        """
        check_take(n)
        if self._thread is None:
            raise DataError("these blocks are closed: take from their source")
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
        """As `TokenBlocks.state_dict`, whatever the thread has read since."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `TokenBlocks.load_state_dict`."""
        self._state = state
        self._go_back()
        self.epoch = self._blocks.epoch

    def fingerprint(self) -> str:
        """As `TokenBlocks.fingerprint`."""
        return self._blocks.fingerprint()

    def close(self) -> None:
        """End the thread and put the source where the last blocks handed out end."""
        if self._thread is not None:
            self._go_back()
            self._thread.shutdown()
            self._thread = None

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compute(self, n: int) -> tuple[Tensor, dict[str, Any], int]:
        batch = self._blocks.take(n)
        return batch, self._blocks.state_dict(), self._blocks.epoch

    def _go_back(self) -> None:
        """Drop what was computed ahead."""
        if self._next is not None:
            self._next[1].exception()  # waits; an error in blocks that nobody took is not one
            self._next = None
        self._blocks.load_state_dict(self._state)
