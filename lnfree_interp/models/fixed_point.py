"""Dynamic fixed point: a tensor as integers of b bits, times one power of two for all of them.

    x  ->  q 2^e,    |q| <= 2^(b - 1) - 1,    e the smallest for which the largest entry fits

No entry is clipped, so that rounding to nearest is off by half a step 2^e at most, and stochastic
rounding is unbiased everywhere. Products are of the integers, summed without rounding:

    (q 2^e) (p 2^f)  =  (q p) 2^(e + f)

Integers of 8 bits go through torch's integer kernel where it has one that is right (`_int_mm`; sums
in int32). Wider ones, and all others, are multiplied in float64, in which every partial sum is an
integer below 2^53 and therefore exact: for two operands of b bits, as long as
2 (b - 1) + log2(terms) <= 53. Longer sums are taken in stretches, which are added up in int64.

Source: arXiv 2209.09815.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lnfree_interp.errors import DataError
from lnfree_interp.numerics import wide

WIDTHS = range(2, 17)
"""The numbers of bits that a tensor can be rounded to."""

_SMALLEST = {torch.float32: -149, torch.float64: -1074}
"""The exponent of the smallest positive number, by dtype."""
_INT32_TERMS = 2**17
"""How many products of two 8-bit integers an int32 holds the sum of: 2^17 127^2 < 2^31."""
_FLOAT64 = 53
"""Up to which power of two float64 holds every integer."""


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """A tensor in dynamic fixed point: `integers` times 2^`exponent`.

    `a @ b` is the product of two matrices: exact, and then rounded once, to `dtype`. Rows can be
    taken by an index, and a matrix transposed by `T`.

    Source:
        arXiv 2209.09815.

    Examples:
        >>> import torch
        >>> x, W = (lf.fixed_point(torch.randn(4, 4), 8) for _ in range(2))
        >>> bool((x @ W == (x.value.double() @ W.value.double()).float()).all())
        True
    """

    integers: Int[Tensor, "*shape"]
    """The integers, as int8 up to 8 bits and as int16 beyond."""
    exponent: int | None
    """The exponent of their common factor; None if an entry was not finite, and then every value
    and every product is NaN."""
    bits: int
    """The width of the integers, sign included."""
    dtype: torch.dtype
    """The dtype of the tensor, and of products."""

    @property
    def value(self) -> Float[Tensor, "*shape"]:
        """The tensor that the integers stand for."""
        return _scaled(self.integers, self.exponent, self.dtype)

    @property
    def T(self) -> "FixedPoint":
        """A matrix, transposed."""
        return replace(self, integers=self.integers.T)

    def __getitem__(self, index: Any) -> "FixedPoint":
        return replace(self, integers=self.integers[index])

    def __matmul__(self, other: "FixedPoint") -> Float[Tensor, "m n"]:
        exponents = (self.exponent, other.exponent)
        exponent = None if None in exponents else sum(filter(None, exponents))
        dtype = torch.promote_types(self.dtype, other.dtype)
        return _scaled(_integer_product(self, other), exponent, dtype)

    def sum(self, dim: int) -> Float[Tensor, "*rest"]:
        """The sum over a dimension: exact, and then rounded once."""
        return _scaled(self.integers.sum(dim, dtype=torch.int64), self.exponent, self.dtype)

    def rows_added(self, rows: Int[Tensor, " row"], n: int) -> Float[Tensor, "n d"]:
        """A matrix of n rows: to each, the rows of this one are added that `rows` says; exact, and
        then rounded once."""
        fits = len(rows) < 2 ** (32 - self.bits)
        total = self.integers.new_zeros(
            (n, self.integers.shape[1]), dtype=torch.int32 if fits else torch.int64
        )
        total.index_add_(0, rows, self.integers.to(total.dtype))
        return _scaled(total, self.exponent, self.dtype)


def fixed_point(
    x: Float[Tensor, "*shape"], bits: int, generator: torch.Generator | None = None
) -> FixedPoint:
    """Round a tensor to integers of `bits` bits that share one power of two.

    Args:
        x: Any tensor of floating-point numbers. If an entry is not finite, every value is NaN, so
            that whoever looks at a loss sees it.
        bits: The width, sign included, 2 to 16.
        generator: Draws whether an entry is rounded up or down, with chances by which the mean is
            the entry itself, to 2^-24 of a step. Default: to the nearest integer, half to even.

    Returns:
        The integers, and the exponent.

    Raises:
        DataError: if there is no such width.

    Source:
        arXiv 2209.09815.

    Examples:
        >>> import torch
        >>> x = lf.fixed_point(torch.tensor([1.0, -0.3, 0.004]), 8)
        >>> x.integers.tolist(), x.exponent
        ([64, -19, 0], -6)
        >>> x.value.tolist()
        [1.0, -0.296875, 0.0]
    """
    if bits not in WIDTHS:
        raise DataError(f"integers of {bits} bits: give {WIDTHS[0]} to {WIDTHS[-1]}")
    given, x = x.dtype, wide(x.detach())
    container = torch.int8 if bits <= 8 else torch.int16
    largest = _largest(x)
    if not math.isfinite(largest):
        return FixedPoint(torch.zeros_like(x, dtype=container), None, bits, given)
    exponent = _exponent(largest, bits, _SMALLEST[x.dtype])
    x = _scaled(x, -exponent, x.dtype)
    if generator is None:
        x = x.round_()
    else:
        below = x.floor()
        # Without an addition, which would round: what can be represented stays what it is.
        up = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = below.add_(up.lt_(x.sub_(below)))
    return FixedPoint(x.to(container), exponent, bits, given)


def _largest(x: Tensor) -> float:
    """The largest absolute entry; NaN if there is one."""
    if x.numel() == 0:
        return 0.0
    low, high = torch.stack(torch.aminmax(x)).tolist()
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


def _exponent(largest: float, bits: int, smallest: int) -> int:
    """The smallest exponent with which `largest` is within the integers."""
    if largest == 0:
        return 0
    mantissa, exponent = math.frexp(largest)
    exponent -= bits - 1
    if math.ldexp(mantissa, bits - 1) > 2 ** (bits - 1) - 1:
        exponent += 1
    return max(exponent, smallest)


def _scaled(x: Tensor, exponent: int | None, dtype: torch.dtype) -> Tensor:
    """x 2^exponent, a new tensor, with one rounding; NaN without an exponent."""
    if exponent is None:
        return x.new_full(x.shape, math.nan, dtype=dtype)
    if dtype == torch.float32 and x.dtype != torch.float64 and -126 <= exponent <= 127:
        y = x.to(dtype)
        return y * 2.0**exponent if y is x else y.mul_(2.0**exponent)
    half = exponent // 2  # the factor itself may be no float64
    return (x.double() * 2.0**half).mul_(2.0 ** (exponent - half)).to(dtype)


def _integer_product(a: FixedPoint, b: FixedPoint) -> Int[Tensor, "m n"] | Float[Tensor, "m n"]:
    """The product of the integers, exact."""
    x, y = a.integers, b.integers
    if x.dtype == y.dtype == torch.int8 and has_integer_kernel(str(x.device)):
        multiply, most = _by_kernel, _INT32_TERMS
    else:
        multiply, most = _in_float64, 2 ** (_FLOAT64 - (a.bits - 1) - (b.bits - 1))
    terms = x.shape[1]
    if terms <= most:
        return multiply(x, y)
    total = x.new_zeros((x.shape[0], y.shape[1]), dtype=torch.int64)
    for first in range(0, terms, most):
        total += multiply(x[:, first : first + most], y[first : first + most]).long()
    return total


def _in_float64(x: Tensor, y: Tensor) -> Tensor:
    return x.double() @ y.double()


def _by_kernel(x: Int[Tensor, "m k"], y: Int[Tensor, "k n"]) -> Tensor:
    """By torch's kernel for int8, in the shapes that it takes."""
    m, k, n = *x.shape, y.shape[1]
    if x.device.type == "cuda":  # more than 16 rows, and multiples of 8; of 16 on some devices
        x = F.pad(x, (0, -k % 16, 0, max(-m % 16, 32 - m)))
        y = F.pad(y, (0, -n % 16, 0, -k % 16))
    elif min(m, k, n) < 2:
        # Where a dimension is 1, the strides do not say which one is contiguous, and the kernel of
        # torch 2.13 may take the wrong one.
        return _in_float64(x, y)
    return torch._int_mm(_dense(x), _dense(y))[:m, :n]


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


@functools.cache
def has_integer_kernel(device: str) -> bool:
    """Whether torch multiplies matrices of int8 on a device, and rightly: it is tried once, in each
    layout that is used here, against float64.

    Args:
        device: Such as `"cpu"` or `"cuda:0"`.
    """
    draw = torch.Generator().manual_seed(0)
    for k, *transposed in itertools.product((24, 33), (False, True), (False, True)):
        shapes = [(40, k), (k, 17)]
        x, y = (
            torch.randint(
                -127, 128, shape[::-1] if turned else shape, generator=draw, device="cpu"
            )
            .to(torch.int8).to(device)
            for shape, turned in zip(shapes, transposed, strict=True)
        )  # fmt: skip
        x, y = (one.T if turned else one for one, turned in zip((x, y), transposed, strict=True))
        try:
            found = _by_kernel(x, y)
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
        if not torch.equal(found.cpu().double(), x.cpu().double() @ y.cpu().double()):
            return False
    return True
