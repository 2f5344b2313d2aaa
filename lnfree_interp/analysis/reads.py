"""How a sublayer reads the stream: through a norm, which is a linear map where its scale is held.

    x  ->  (C x / scale) * gain + bias        (C subtracts the mean, or is left out)

A folded model reads the stream as it is. A frozen norm's scale is a constant, so the map is the
same for every input. A live norm's scale is each token's own: the map then describes one forward
pass, and nothing that is changed in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.components import LayerNorm, LayerNormPre, RMSNorm, RMSNormPre

from lnfree_interp.errors import InexactError, UnsupportedModelError
from lnfree_interp.models.norms import FrozenNorm, Norm
from lnfree_interp.models.sites import live_sites

Activations = Mapping[str, Tensor] | ActivationCache
"""By hook name."""


@dataclass(frozen=True, eq=False)
class Read:
    """The linear map between the stream and what a sublayer gets."""

    scale: Float[Tensor, "*batch one"] | float = 1.0
    gain: Float[Tensor, " d_model"] | None = None
    bias: Float[Tensor, " d_model"] | None = None
    centred: bool = False

    def at(self, positions: slice | list[int]) -> "Read":
        """The same at some of the positions."""
        if isinstance(self.scale, Tensor):
            return replace(self, scale=self.scale[:, positions])
        return self

    def back(self, direction: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """A direction behind the map, carried to the stream."""
        direction = self.back_unscaled(direction)
        if isinstance(self.scale, Tensor) or self.scale != 1.0:
            return direction / self.scale
        return direction

    def back_unscaled(
        self, direction: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """As `back`, before the division by the scale, which may vary by token."""
        if self.gain is not None:
            direction = direction * self.gain
        return direction - direction.mean(-1, keepdim=True) if self.centred else direction

    def back_weighted(
        self, weights: Float[Tensor, " pos"], direction: Float[Tensor, " d_model"]
    ) -> tuple[Float[Tensor, " pos"], Float[Tensor, " d_model"]]:
        """As `back` for one direction that is read at every position with a weight."""
        direction = self.back_unscaled(direction)
        if isinstance(self.scale, Tensor):
            return weights / self.scale[0, :, 0], direction
        return weights, direction / self.scale

    def weights_back(
        self, W: Float[Tensor, "*head d_model out"]
    ) -> Float[Tensor, "*head d_model out"]:
        """As `back` for the columns of a matrix, but for the scale, which may vary by token."""
        if self.gain is not None:
            W = W * self.gain[:, None]
        return W - W.mean(-2, keepdim=True) if self.centred else W

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """A part of the stream through the map, the bias apart."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        x = x / self.scale
        return x if self.gain is None else x * self.gain


def norm_name(layer: int | None, kind: str) -> str:
    """`ln_final`, or `blocks.{layer}.ln1` and so on."""
    return kind if layer is None else f"blocks.{layer}.{kind}"


def read_names(model: HookedTransformer, names: list[str]) -> list[str]:
    """The cached activations that `read` needs for norms of these names: live scales."""
    return [f"{_path(model, name)}.hook_scale" for name in names if _is_live(_module(model, name))]


def read(model: HookedTransformer, cache: Activations, name: str) -> Read:
    """How the norm of that name reads the stream.

    Args:
        model: In any form.
        cache: With the `hook_scale` of a live norm.
        name: `ln_final`, `blocks.0.ln1.qk`, `blocks.0.ln1.v`, `blocks.0.ln2`; for a model whose
            `ln1` is one norm, both of its names mean that.
    """
    norm = _module(model, name)
    if norm is None:
        return Read()
    gain, bias = getattr(norm, "w", None), getattr(norm, "b", None)
    if isinstance(norm, FrozenNorm):
        return Read(norm.sigma.item(), gain, bias, norm.centred)
    if isinstance(norm, Norm) and norm.frozen:
        return Read(norm.constant, gain, bias, norm.centred)
    scale = cache[f"{_path(model, name)}.hook_scale"]
    centred = norm.centred if isinstance(norm, Norm) else isinstance(norm, LayerNorm | LayerNormPre)
    return Read(scale, gain, bias, centred)


def _path(model: HookedTransformer, name: str) -> str:
    """The module that a site's name means in this model."""
    parent, _, leaf = name.rpartition(".")
    if leaf in ("qk", "v") and not hasattr(model.get_submodule(parent), leaf):
        return parent
    return name


def _module(model: HookedTransformer, name: str) -> torch.nn.Module | None:
    if model.cfg.normalization_type is None:
        return None
    norm = model.get_submodule(_path(model, name))
    known = (FrozenNorm, Norm, LayerNorm, LayerNormPre, RMSNorm, RMSNormPre)
    if not isinstance(norm, known):
        raise UnsupportedModelError(f"{name} is a {type(norm).__name__}, which is not linear")
    return norm


def _is_live(norm: torch.nn.Module | None) -> bool:
    return not (
        norm is None or isinstance(norm, FrozenNorm) or (isinstance(norm, Norm) and norm.frozen)
    )


def held(model: HookedTransformer, frozen_scale: bool, names: list[str] | None = None) -> list[str]:
    """What an analysis has to hold at the value it had, because it is not linear.

    Args:
        model: In any form.
        frozen_scale: Whether holding is what the caller wants.
        names: Norms that the analysis reads through. Default: all.

    Returns:
        Live norms, and `"the soft cap"`; empty if the analysis is exact.

    Raises:
        InexactError: if there is something, and `frozen_scale` is False.
    """
    if names is None:
        found = [str(site) for site in live_sites(model)]
    else:
        found = [name for name in names if _is_live(_module(model, name))]
    if model.cfg.output_logits_soft_cap > 0 and (names is None or "ln_final" in names):
        found.append("the soft cap on the logits")
    if found and not frozen_scale:
        raise InexactError(
            f"not linear here: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}. No part "
            "of the stream has a share of its own: remove the norms first, or pass "
            "frozen_scale=True to hold what is not linear at the value it had"
        )
    return found
