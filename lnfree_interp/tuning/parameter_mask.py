"""A choice among a model's parameters, entry by entry."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lnfree_interp.errors import RecipeError


class ParameterMask:
    """Which entries of a model's parameters are chosen.

    `lf.select_parameters` makes one by the names of components, `lf.random_subset` by chance; or
    give a mask for each parameter, by its name in a stock model.

    Args:
        chosen: By parameter, such as `blocks.0.ln1.w`: True for each entry that is chosen, in the
            parameter's shape. A parameter that is not named has none.

    Raises:
        RecipeError: if a mask is not boolean.

    Examples:
        >>> import torch
        >>> mask = lf.ParameterMask({"blocks.0.ln2.w": torch.arange(192) < 10})
        >>> mask
        10 entries of 1 parameter
    """

    def __init__(self, chosen: Mapping[str, Tensor]):
        for name, mask in chosen.items():
            if mask.dtype != torch.bool:
                raise RecipeError(f"the mask of {name} is {mask.dtype}, and it must be torch.bool")
        self.chosen = {name: mask.cpu() for name, mask in chosen.items() if mask.any()}

    @property
    def count(self) -> int:
        """How many entries are chosen."""
        return sum(int(mask.sum()) for mask in self.chosen.values())

    def keep(self, places: Int[Tensor, " kept"]) -> "ParameterMask":
        """Some of the chosen entries.

        Args:
            places: Which of them, counted parameter by parameter in the order of `chosen`.
        """
        among = torch.zeros(self.count, dtype=torch.bool)
        among[places] = True
        sizes = [int(mask.sum()) for mask in self.chosen.values()]
        kept = {}
        for (name, mask), part in zip(self.chosen.items(), among.split(sizes), strict=True):
            kept[name] = torch.zeros(mask.shape, dtype=torch.bool)
            kept[name][mask] = part
        return ParameterMask(kept)

    def __or__(self, other: "ParameterMask") -> "ParameterMask":
        """What either has chosen."""
        both = self.chosen.keys() & other.chosen.keys()
        return ParameterMask(
            self.chosen | other.chosen | {n: self.chosen[n] | other.chosen[n] for n in both}
        )

    def __sub__(self, other: "ParameterMask") -> "ParameterMask":
        """What this one has chosen and the other has not."""
        both = self.chosen.keys() & other.chosen.keys()
        return ParameterMask(self.chosen | {n: self.chosen[n] & ~other.chosen[n] for n in both})

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ParameterMask)
            and self.chosen.keys() == other.chosen.keys()
            and all(torch.equal(mask, other.chosen[name]) for name, mask in self.chosen.items())
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        n = len(self.chosen)
        return f"{self.count:,} entries of {n} parameter{'s' * (n != 1)}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes the mask again: a bit for each entry of a
        parameter that is not chosen whole."""
        return {name: _packed(mask) for name, mask in self.chosen.items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "ParameterMask":
        """The mask that `to_json` described."""
        return cls({name: _unpacked(**packed) for name, packed in plain.items()})


Trainable = str | tuple[str, ...] | ParameterMask
"""What `Recipe.trainable` may be: words of `lf.select_parameters`, or a mask."""


def every(shape: Sequence[int]) -> Tensor:
    """The mask of all entries of a parameter, which takes no memory."""
    return torch.ones((), dtype=torch.bool).expand(torch.Size(shape))


def _packed(mask: Tensor) -> dict[str, Any]:
    shape = {"shape": list(mask.shape)}
    if mask.all():
        return shape
    bits = mask.flatten().to(torch.uint8)
    octets = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    raw = (octets * powers).sum(1, dtype=torch.uint8).numpy().tobytes()
    return shape | {"bits": base64.b64encode(zlib.compress(raw)).decode("ascii")}


def _unpacked(shape: list[int], bits: str | None = None) -> Tensor:
    if bits is None:
        return every(shape)
    raw = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(bits))), dtype=torch.uint8)
    each = raw[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    size = torch.Size(shape).numel()
    return each.flatten()[:size].bool().view(shape)
