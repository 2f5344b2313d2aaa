"""What a norm does to a vector, in one description for every norm: what folds and analyses ask."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.errors import NormSiteError
from lnfree_interp.models.maps import Statistic


@dataclass(frozen=True, eq=False)
class NormMap:
    """What a norm does to a vector: x -> (C x / scale) * factor * gain + bias.

    Code that handles norms asks this description, never the class of the module.
    """

    centred: bool
    """Whether C subtracts the mean; else C is the identity."""
    statistic: Statistic | None
    """What it computes from each token and divides by; None where it divides by a constant."""
    scale: float | None = None
    """The constant that it divides by; None while it is live. A norm on its way from live to
    frozen has both a statistic and a constant."""
    first: float | None = None
    """The constant that divides the first token of a prompt; None where it is that of all."""
    factor: float = 1.0
    """A constant that multiplies all channels alike."""
    pointwise: bool = False
    """Whether a function of each entry, such as tanh, takes the place of the division."""
    gain: Float[Tensor, " d"] | None = None
    """What each channel is multiplied by; None for ones."""
    bias: Float[Tensor, " d"] | None = None
    """What is added at the end; None for zeros."""

    @property
    def affine(self) -> bool:
        """Whether the map is affine: no token is divided by what is computed from itself."""
        return self.scale is not None and self.statistic is None and not self.pointwise

    @property
    def multiplier(self) -> Float[Tensor, "*d"]:
        """What an affine map multiplies each centred channel by, in float64: [d], or a scalar where
        all channels are multiplied alike. A first token with a constant of its own is left out."""
        assert self.affine
        assert self.scale is not None
        if self.gain is None:
            return torch.tensor(self.factor / self.scale, dtype=torch.float64)
        return self.gain.detach().double() * (self.factor / self.scale)

    def showing(self, scale: float) -> "NormMap":
        """The same affine map, written as a division by another constant.

        Raises:
            NormSiteError: if the constant is not positive and finite.
        """
        require_positive(scale)
        assert self.scale is not None
        ratio = scale / self.scale
        first = None if self.first is None else self.first * ratio
        return replace(self, scale=scale, first=first, factor=self.factor * ratio)


def require_positive(sigma: float) -> None:
    """Refuse a constant that no norm can divide by.

    Raises:
        NormSiteError: if it is not positive and finite.
    """
    if not 0 < sigma < float("inf"):
        raise NormSiteError(
            f"a norm cannot divide by sigma={sigma}: pass a positive and finite number"
        )
