"""How far two tensors are apart, measured in one way for every check in the package."""

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.errors import InexactError

P = ParamSpec("P")
R = TypeVar("R")

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
"""The largest relative error that rounding may cause in one forward pass, by dtype."""


ROUNDING: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-2,
}
"""The share of a weight's largest entry below which an entry is only rounding, by dtype."""

LNFREE_EPSILON = 1e8
"""With an epsilon this large or larger, a norm divides by sqrt(epsilon), whatever its input."""

_CHUNK = 2**22
"""How many elements are compared in float64 at once, to keep the peak of memory low."""
_PARTS = 2048
"""How many parts are summed at once."""


def wide(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """In float32 at least, as in TransformerLens' norms: squares of half-precision values
    overflow."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class MeasuredError:
    """How far `found` is from `expected`."""

    absolute: float
    """The largest absolute difference, in the unit of the values compared."""
    relative: float
    """The same divided by the largest absolute expected value, or by another scale if given."""
    dtype: torch.dtype
    """The coarser of the two dtypes compared, which sets the tolerance."""

    @property
    def tolerance(self) -> float:
        """The relative error that rounding in `dtype` explains."""
        return TOLERANCE[self.dtype]

    def require(self, what: str, tolerance: float | None = None) -> "MeasuredError":
        """Return self if the relative error is within the tolerance.

        Args:
            what: What was compared, for the message.
            tolerance: The largest relative error allowed. Default: what rounding in `dtype`
                explains.

        Raises:
            InexactError: if the relative error is larger, or not a number.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        if not self.relative <= tolerance:
            raise InexactError(
                f"{what}: largest relative error {self.relative:.2e} is above {tolerance:.0e} "
                f"({str(self.dtype).removeprefix('torch.')}, {self.absolute:.2e} absolute)"
            )
        return self

    def __str__(self) -> str:
        return f"{self.relative:.1e} relative ({self.absolute:.1e} absolute)"


def sum_and_largest(
    values: Float[Tensor, "part *shape"],
) -> tuple[Float[Tensor, "*shape"], float]:
    """The sum of parts, and the largest absolute part, in one pass without a copy.

    Chunks are summed in the values' own dtype, float32 at least, and added up in float64.
    """
    total = values.new_zeros(values.shape[1:], dtype=torch.float64)
    dtype = torch.promote_types(values.dtype, torch.float32)
    largest = 0.0
    for chunk in values.split(_PARTS):
        total += chunk.sum(0, dtype=dtype)
        # If the order differs from that in memory, finding the extremes takes ten times as long.
        last = chunk.stride(0) < chunk.stride(-1)
        low, high = torch.aminmax(chunk.movedim(0, -1) if last else chunk)
        largest = _larger(largest, _larger(-low.item(), high.item()))
    return total, largest


def measure_error(
    found: Float[Tensor, "*shape"],
    expected: Float[Tensor, "*shape"],
    scale: float | None = None,
) -> MeasuredError:
    """The largest difference between two tensors, computed in float64 on the CPU.

    Args:
        found: A tensor of any shape.
        expected: A tensor of the same shape.
        scale: What `relative` divides by. Default: the largest absolute expected value.
    """
    coarser = max(found.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if found.shape != expected.shape:
        raise ValueError(f"shapes {list(found.shape)} and {list(expected.shape)} differ")
    chunks = (x.detach().flatten().split(_CHUNK) for x in (found, expected))
    absolute = largest = 0.0
    for some, other in zip(*chunks, strict=True):
        some, other = some.cpu().double(), other.cpu().double()
        absolute = _larger(absolute, (some - other).abs().max().item())
        largest = _larger(largest, other.abs().max().item())
    scale = largest if scale is None else scale
    relative = absolute / scale if scale > 0 else (0.0 if absolute == 0 else float("inf"))
    return MeasuredError(absolute, relative, coarser)


def _larger(a: float, b: float) -> float:
    """The larger of two numbers, or NaN if one of them is NaN, which `max` may drop."""
    return b if math.isnan(b) or b > a else a


def soft_cap(x: Float[Tensor, "*shape"], cap: float) -> Float[Tensor, "*shape"]:
    """cap tanh(x / cap), as Gemma 2 caps logits and scores; without a positive cap, x itself."""
    return cap * torch.tanh(x / cap) if cap > 0 else x


def own_precision(call: Callable[P, R]) -> Callable[P, R]:
    """Let a call compute without gradients, in the precision that its tensors have, whatever
    autocast the caller is in."""

    @functools.wraps(call)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for device in ("cpu", "cuda", "mps", "xpu"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return call(*args, **kwargs)

    return exact
