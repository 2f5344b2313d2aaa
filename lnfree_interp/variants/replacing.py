"""Variants with another map at a model's norm sites: scaled by depth, a curve, another norm."""

import math
from collections.abc import Mapping
from typing import get_args

from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.models.inserting import set_map
from lnfree_interp.models.maps import MAPS, map_name
from lnfree_interp.models.running import require_tokens
from lnfree_interp.models.site_names import SiteKind
from lnfree_interp.models.sites import get_norm, list_norm_sites
from lnfree_interp.removal.statistics import measure_sigma
from lnfree_interp.variants.variant import Variant, made


def to_layernorm_scaling(model: HookedTransformer, *, keep_function: bool = True) -> Variant:
    """LayerNorm Scaling: what the norms before a block's sublayers give, divided by sqrt(layer).

    Layers count from 1, the final norm is as it was. The factor is a constant, so that a model with
    it is the model without it with smaller gains and biases: it changes how a model trains, not
    what it can compute.

    Args:
        model: Stock, or with norm sites.
        keep_function: Whether gains and biases are multiplied by sqrt(layer) in turn, so that
            nothing changes. False: they stay, for a model that is to be trained from scratch.

    Returns:
        A `Variant`, the same function if asked.

    Raises:
        UnsupportedModelError: for a model that can have no norm sites, or whose norms are
            multiplied by such factors already.

    Source:
        arXiv 2502.05795

    Examples:
        >>> scaled = lf.to_layernorm_scaling(model)
        >>> scaled.same_function, lf.get_norm(scaled.model, "blocks.3.ln2").factor
        (True, 0.5)
    """

    def change(sited: HookedTransformer) -> tuple[str, ...]:
        for site in list_norm_sites(sited):
            if site.kind not in ("ln1.qk", "ln2") or site.layer is None:
                continue  # ln1.v shares all with ln1.qk
            root = math.sqrt(site.layer + 1)
            norm = get_norm(sited, site)
            if norm.factor != 1:
                raise UnsupportedModelError(
                    f"{site} is multiplied by {norm.factor:.4g} already: a second factor would not "
                    "be 1 / sqrt(layer)"
                )
            norm = set_map(sited, site, map_name(norm.map), factor=1 / root)
            for parameter in (norm.w, norm.b) if keep_function else ():
                if parameter is not None:
                    parameter.mul_(root)
        kept = "gains and biases times sqrt(layer)" if keep_function else "gains and biases stay"
        return ("norms before sublayers divided by sqrt(layer)", kept)

    return made("LayerNorm Scaling", model, change, same_function=keep_function)


def to_dyt(
    model: HookedTransformer,
    *,
    alpha: float | Mapping[str, float] = 0.5,
    tokens: Int[Tensor, "sequence pos"] | None = None,
) -> Variant:
    """Dynamic tanh (DyT) in place of every norm: gain * tanh(alpha x) + bias.

    Args:
        model: Stock, or with norm sites.
        alpha: The initial alpha; or one by kind of site, such as `{"ln1": 0.8, "ln2": 0.2,
            "ln_final": 0.2}`, which the authors use for LLaMA 7B.
        tokens: Text on which each norm's mean scale is measured; alpha is then one over it, so
            that small entries come out as before, whatever is given. Default: alpha as given.

    Returns:
        A `Variant`, another function.

    Raises:
        UnsupportedModelError: for a model that can have no norm sites.
        DataError: if an alpha is not positive, or a site has none.

    Source:
        arXiv 2503.10622

    Examples:
        >>> lf.get_norm(lf.to_dyt(model).model, "ln_final").map
        DynamicTanh(alpha=0.5)
    """
    return _to_curve("DyT", model, alpha, tokens)


def to_derf(
    model: HookedTransformer,
    *,
    alpha: float | Mapping[str, float] = 0.5,
    tokens: Int[Tensor, "sequence pos"] | None = None,
) -> Variant:
    """Derf in place of every norm: gain * erf(alpha x + shift) + bias, shift 0 at first.

    Args:
        model: As for `to_dyt`.
        alpha: As for `to_dyt`.
        tokens: As for `to_dyt`; erf is steeper than tanh, which alpha takes into account.

    Returns:
        A `Variant`, another function.

    Raises:
        UnsupportedModelError: for a model that can have no norm sites.
        DataError: if an alpha is not positive, or a site has none.

    Source:
        arXiv 2512.10938

    Examples:
        >>> lf.get_norm(lf.to_derf(model).model, "ln_final").map
        DynamicErf(alpha=0.5, shift=0)
    """
    return _to_curve("Derf", model, alpha, tokens)


def to_map(model: HookedTransformer, name: str, *, bias: bool | None = None) -> Variant:
    """Another map at every norm site, which keeps its gain and bias.

    Args:
        model: Stock, or with norm sites.
        name: `"LayerNorm"`, `"RMSNorm"`, `"CRMSNorm"`, `"DyT"` or `"Derf"`.
        bias: Whether norms have a bias. Default: as before.

    Returns:
        A `Variant`, another function: for the same one see `to_rms` and `to_crms`.

    Raises:
        UnsupportedModelError: for a model that can have no norm sites, or an unknown map.

    Source:
        RMSNorm: arXiv 1910.07467; CRMSNorm: arXiv 2305.14858; the others: see `to_dyt`, `to_derf`

    Examples:
        >>> lf.to_map(model, "RMSNorm", bias=False).same_function
        False
    """
    if name not in MAPS:
        raise UnsupportedModelError(f"{name!r} is no map that is known here: {', '.join(MAPS)}")

    def change(sited: HookedTransformer) -> tuple[str, ...]:
        for site in list_norm_sites(sited):
            set_map(sited, site, name, bias=bias)
        return (f"{name} at every norm site",)

    return made(name, model, change, same_function=False)


_SLOPE = {"DyT": 1.0, "Derf": 2 / math.sqrt(math.pi)}
"""The slope of each curve at zero, for alpha 1."""


def _to_curve(
    name: str,
    model: HookedTransformer,
    alpha: float | Mapping[str, float],
    tokens: Int[Tensor, "sequence pos"] | None,
) -> Variant:
    def change(sited: HookedTransformer) -> tuple[str, ...]:
        sites = list_norm_sites(sited)
        if tokens is None:
            start = {str(site): _alpha(alpha, site.kind) for site in sites}
        else:
            require_tokens(sited, tokens)
            sigma = measure_sigma(sited, sites, tokens)
            start = {site: 1 / (_SLOPE[name] * mean) for site, mean in sigma.items()}
        for site in sites:
            curve: Tensor = set_map(sited, site, name).map.get_parameter("alpha")
            curve.fill_(start[str(site)])
        low, high = min(start.values()), max(start.values())
        from_text = "" if tokens is None else ", from the norms' mean scales"
        return (f"{name} at every norm site, alpha {low:.4g} to {high:.4g}{from_text}",)

    return made(name, model, change, same_function=False)


def _alpha(alpha: float | Mapping[str, float], kind: str) -> float:
    if isinstance(alpha, Mapping):
        known = {*get_args(SiteKind)}
        if unknown := [name for name in alpha if name not in known]:
            raise DataError(f"alpha names {unknown[0]}, which is no kind of norm site")
        found = alpha.get(kind, alpha.get(kind.partition(".")[0]))
        if found is None:
            raise DataError(f"alpha names no number for {kind}; it has {', '.join(alpha)}")
        alpha = found
    if not 0 < alpha < math.inf:
        raise DataError(f"alpha={alpha} is not a positive number")
    return float(alpha)
