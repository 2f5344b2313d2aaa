"""What a norm can be while it is live: the maps that stand before gain and bias.

A map takes a token's vector x to a normalised one of the same width. Most divide by one number that
they compute from the token, its scale; pointwise ones bend each entry by a curve, and have as scale
the ratio of root mean squares of x and of what the curve adds to its value at zero, which is the
constant that a frozen norm in their place starts from.

A new map is one class here and one line in `MAPS`.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lnfree_interp.errors import NormSiteError

Statistic = Literal["standard deviation", "root mean square"]
"""What a live norm computes from each token and divides by."""
Vectors = Float[Tensor, "*batch d"]
Scales = Float[Tensor, "*batch 1"]


class LiveMap(nn.Module, ABC):
    """A map of vectors, [..., d] to [..., d].

    Attributes:
        centred: Whether the mean over d is subtracted first.
        statistic: What it divides by; None for a pointwise map.
        pointwise: Whether it bends each entry by a curve instead, its `forward`.
        eps: Added under the root; NaN where there is no root.
    """

    centred: ClassVar[bool] = False
    statistic: ClassVar[Statistic | None] = None
    pointwise: ClassVar[bool] = False

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    @abstractmethod
    def scale(self, x: Vectors) -> Scales:
        """Each token's own scale, of vectors from which a centred map's mean is subtracted."""

    def token_scale(self, x: Vectors) -> Scales:
        """Each token's own scale, of vectors as they come."""
        return self.scale(centre(x) if self.centred else x)

    def fused(
        self, x: Vectors, gain: Float[Tensor, " d"], bias: Float[Tensor, " d"] | None
    ) -> Vectors | None:
        """The whole map of vectors as they come, with gain and bias, in one kernel; None if there
        is none."""
        return None

    def extra_repr(self) -> str:
        """Its numbers."""
        return f"eps={self.eps:g}"


class RMSNormMap(LiveMap):
    """RMSNorm: x / sqrt(mean(x^2) + eps). (1910.07467)"""

    statistic = "root mean square"

    def scale(self, x: Vectors) -> Scales:
        """The root mean square."""
        return (mean_square(x) + self.eps).sqrt()

    def fused(
        self, x: Vectors, gain: Float[Tensor, " d"], bias: Float[Tensor, " d"] | None
    ) -> Vectors | None:
        """`rms_norm` of torch."""
        y = F.rms_norm(x, gain.shape, gain, self.eps)
        return y if bias is None else y + bias


class LayerNormMap(RMSNormMap):
    """LayerNorm: RMSNorm of the vector without its mean. (1607.06450)"""

    centred = True
    statistic = "standard deviation"

    def token_scale(self, x: Vectors) -> Scales:
        """The standard deviation, in one pass."""
        return (x.var(-1, keepdim=True, correction=0) + self.eps).sqrt()

    def fused(
        self, x: Vectors, gain: Float[Tensor, " d"], bias: Float[Tensor, " d"] | None
    ) -> Vectors | None:
        """`layer_norm` of torch."""
        return F.layer_norm(x, gain.shape, gain, bias, self.eps)


class CRMSNormMap(LiveMap):
    """CRMSNorm: RMSNorm of the zero-mean vector (x, -sum(x)), without its last entry. (2305.14858)

    For vectors of width d it is x / sqrt((sum(x^2) + sum(x)^2) / (d + 1) + eps).
    """

    statistic = "root mean square"

    def scale(self, x: Vectors) -> Scales:
        """The root mean square of the vector that x stands for."""
        square = x.pow(2).sum(-1, keepdim=True) + x.sum(-1, keepdim=True).pow(2)
        return (square / (x.shape[-1] + 1) + self.eps).sqrt()


class _Curve(LiveMap):
    """A curve that is applied to each entry alike, and divides by nothing."""

    pointwise = True

    def __init__(self, eps: float, alpha: float = 0.5):
        super().__init__(math.nan)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def scale(self, x: Vectors) -> Scales:
        """The root mean square of x over that of what the curve makes of it, beyond its value at
        zero, which no division gives."""
        tiny = torch.finfo(x.dtype).tiny
        bent = self(x) - self(torch.zeros_like(x[..., :1]))
        return (mean_square(x) / mean_square(bent).clamp(min=tiny)).sqrt()


class DynamicTanh(_Curve):
    """Dynamic tanh, DyT: tanh(alpha x), alpha a learned number for all entries. (2503.10622)"""

    def forward(self, x: Vectors) -> Vectors:
        """The curve."""
        return torch.tanh(self.alpha * x)

    def extra_repr(self) -> str:
        """Alpha."""
        return f"alpha={self.alpha.item():.4g}"


class DynamicErf(_Curve):
    """Derf: erf(alpha x + shift), both learned numbers for all entries. (2512.10938)"""

    def __init__(self, eps: float, alpha: float = 0.5):
        super().__init__(eps, alpha)
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Vectors) -> Vectors:
        """The curve."""
        return torch.erf(self.alpha * x + self.shift)

    def extra_repr(self) -> str:
        """Alpha and shift."""
        return f"alpha={self.alpha.item():.4g}, shift={self.shift.item():.4g}"


MAPS: dict[str, type[LiveMap]] = {
    "LayerNorm": LayerNormMap,
    "RMSNorm": RMSNormMap,
    "CRMSNorm": CRMSNormMap,
    "DyT": DynamicTanh,
    "Derf": DynamicErf,
}
"""Every map by the name that sidecars and error messages use."""


def make_map(name: str, eps: float) -> LiveMap:
    """A map by its name, with its initial numbers.

    Args:
        name: A key of `MAPS`.
        eps: Added under the root, in maps that have one.

    Raises:
        NormSiteError: if there is no such map, or eps is not a number that can be added.
    """
    if name not in MAPS:
        raise NormSiteError(f"{name!r} is no norm that is known here: {', '.join(MAPS)}")
    if not (math.isfinite(eps) and eps >= 0):
        raise NormSiteError(f"a norm cannot add eps={eps} under its root: pass a finite number")
    return MAPS[name](eps)


def map_name(live: LiveMap) -> str:
    """The name of a map, a key of `MAPS`."""
    return next(name for name, kind in MAPS.items() if type(live) is kind)


def centre(x: Vectors) -> Vectors:
    """Vectors without their mean."""
    return x - x.mean(-1, keepdim=True)


def mean_square(x: Vectors) -> Scales:
    """The mean of the squares of each vector's entries."""
    return x.pow(2).mean(-1, keepdim=True)
