"""Positions of prompts, and other numbers that count from the end if negative."""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lnfree_interp.errors import DataError


@dataclass(frozen=True, eq=False)
class Positions:
    """The positions of each prompt that are read."""

    index: slice | Int[Tensor, "batch kept"]
    repeat: int = 1
    """How many times a single position is repeated, once for each direction."""

    def of(self, x: Float[Tensor, "*shape"], dim: int = 1) -> Float[Tensor, "*kept"]:
        """An activation at these positions; `dim` is its dimension of positions."""
        if isinstance(self.index, slice):
            x = x[(slice(None),) * dim + (self.index,)]
        else:
            rows = torch.arange(len(x), device=x.device)[:, None]
            x = x.movedim(dim, 1)[rows, self.index.to(x.device)].movedim(1, dim)
        if self.repeat == 1:
            return x
        return x.expand(*x.shape[:dim], self.repeat, *x.shape[dim + 1 :])

    def numbers(self, n_pos: int, batch: int) -> Int[Tensor, "batch kept"]:
        """The positions themselves, counted from the start."""
        if isinstance(self.index, slice):
            return torch.arange(n_pos)[self.index].expand(batch, -1)
        return self.index


def read_number(index: Any, n: int, what: str) -> int:
    """An index along a dimension, counted from the end if negative.

    Raises:
        DataError: if the dimension has no such index.
    """
    number = whole_number(index, f"the number of a {what}")
    if not -n <= number < n:
        raise DataError(f"there is no {what} {number} among {n}: they are counted from 0")
    return number % n


def whole_number(x: Any, what: str) -> int:
    """A whole number of Python, NumPy or torch, as an int.

    Raises:
        DataError: if it is not a whole number.
    """
    try:
        if isinstance(x, bool | np.bool_) or (isinstance(x, Tensor) and x.dtype == torch.bool):
            raise TypeError
        return operator.index(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} is a whole number, not {x!r}") from error


def read_position(pos: Any, n_pos: int) -> int:
    """A position, counted from the start.

    Raises:
        DataError: if it is not a whole number, or the prompt has no such position.
    """
    place = whole_number(pos, "a position")
    if not -n_pos <= place < n_pos:
        raise DataError(f"there is no position {place} among {n_pos} tokens: they count from 0")
    return place % n_pos


def read_key_position(pos: Any, n_pos: int, keys: tuple[int, ...]) -> int:
    """The column of a key, by its position.

    Raises:
        DataError: if it is not among the keys.
    """
    place = read_position(pos, n_pos)
    if place not in keys:
        raise DataError(
            f"position {place} is not among the keys of this result: give one of {list(keys)}"
        )
    return keys.index(place)
