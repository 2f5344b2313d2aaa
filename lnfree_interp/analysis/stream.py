"""The residual stream: its places, and how what reads it sees it."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.utilities import get_act_name

Stream = Float[Tensor, "batch pos d_model"]
First = Bool[Tensor, "batch pos"] | None


@dataclass(frozen=True, eq=False)
class Read:
    """The affine map between the stream and what a sublayer reads.

        x  ->  (C x / scale) * gain + bias        (C subtracts the mean, or is left out)

    In a folded model the map is the identity. A frozen norm's scale is a constant. A live norm has
    a scale for each token, so the map describes one forward pass in which nothing is changed.
    """

    scale: Float[Tensor, "*batch one"] | float = 1.0
    gain: Float[Tensor, " d_model"] | None = None
    bias: Float[Tensor, " d_model"] | None = None
    centred: bool = False

    def back(self, direction: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """A direction behind the map, carried back to the stream."""
        direction = self.back_unscaled(direction)
        if isinstance(self.scale, Tensor) or self.scale != 1.0:
            return divided(direction, self.scale)
        return direction

    def back_unscaled(
        self, direction: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """As `back`, without the division by the scale, which may vary by token."""
        if self.gain is not None:
            direction = direction * self.gain
        return direction - direction.mean(-1, keepdim=True) if self.centred else direction

    def back_weighted(
        self, weights: Float[Tensor, "*batch pos"], direction: Float[Tensor, "*batch d_model"]
    ) -> tuple[Float[Tensor, "*batch pos"], Float[Tensor, "*batch d_model"]]:
        """As `back`, for one direction that is read with a weight at every position."""
        direction = self.back_unscaled(direction)
        if isinstance(self.scale, Tensor):
            return divided(weights, self.scale[..., 0]), direction
        return weights, direction / self.scale

    def weights_back(
        self, W: Float[Tensor, "*head d_model out"]
    ) -> Float[Tensor, "*head d_model out"]:
        """As `back_unscaled`, for the columns of a matrix."""
        if self.gain is not None:
            W = W * self.gain[:, None]
        return W - W.mean(-2, keepdim=True) if self.centred else W

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """A part of the stream after the map, without its bias."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        x = divided(x, self.scale)
        return x if self.gain is None else x * self.gain


def divided(x: Float[Tensor, "*any"], scale: Tensor | float) -> Float[Tensor, "*any"]:
    """x / scale in x's dtype. A norm's scale is float32 in a bfloat16 model too."""
    return (x / scale).to(x.dtype)


@dataclass(frozen=True)
class Place:
    """A point of the residual stream.

    Examples:
        >>> lf.Place(2).hook, lf.Place(2, mid=True).hook
        ('blocks.1.hook_resid_post', 'blocks.2.hook_resid_mid')
    """

    layer: int
    """The number of blocks before it."""
    mid: bool = False
    """Whether it comes after the next block's attention as well."""

    @property
    def order(self) -> float:
        """A number that grows from place to place in the order of computation."""
        return self.layer + 0.5 * self.mid

    @property
    def hook(self) -> str:
        """Its hook name."""
        if self.mid:
            return get_act_name("resid_mid", self.layer)
        if self.layer == 0:
            return get_act_name("resid_pre", 0)
        return get_act_name("resid_post", self.layer - 1)
