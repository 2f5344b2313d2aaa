"""Norms and factors where a model has none, another map at a site, another attention in a block.

The layout of a model with norm sites is all that its config does not say: which map stands at each
site, where factors are learned, and where attention has no softmax. `layout_of` gives it as plain
data, `lay_out` builds it.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformer_lens import HookedTransformer

from lnfree_interp.errors import NormSiteError
from lnfree_interp.models.block import InnerNormMLP, SiteGatedMLP
from lnfree_interp.models.folding import WITHIN
from lnfree_interp.models.forms import epsilon_of
from lnfree_interp.models.linear_attention import (
    LinearAttention,
    LinearGroupedQueryAttention,
    linear_attention,
    linear_layers,
)
from lnfree_interp.models.maps import make_map, map_name
from lnfree_interp.models.norm_map import require_positive
from lnfree_interp.models.norms import Norm, Scaler, SplitNorm
from lnfree_interp.models.site_names import SCALERS, NormSite, sites_in, whole_norm
from lnfree_interp.models.sites import (
    get_norm,
    has_norm_sites,
    list_norm_sites,
    list_scalers,
    module_at,
    sites_of,
)

Layout = dict[str, dict[str, Any]]
"""By path: `{"map": "RMSNorm", "bias": False, "factor": 1.0}` for a norm, `{"factors": 12}` for
factors, `{"feature_map": "elu", "divide_by": "sum"}` for linear attention."""


def set_map(
    model: HookedTransformer,
    site: NormSite | str,
    name: str,
    *,
    bias: bool | None = None,
    factor: float | None = None,
) -> Norm:
    """Put a map at a norm site, a new one where there is none.

    A site that exists keeps its gain and bias. One whose map changes is live again; one that has
    the map already keeps its state and all that the map has learned. Both halves of `ln1` change.

    Args:
        model: With norm sites; changed in place.
        site: A site, or its name.
        name: The map: a key of `lnfree_interp.models.maps.MAPS`, such as `"LayerNorm"`.
        bias: Whether it has a bias. Default: as before; at a new site as `ln_final` has.
        factor: What multiplies its output. Default: as before; at a new site 1.

    Returns:
        The norm. A new one has gain 1 and bias 0.

    Raises:
        NormSiteError: if there is no such place or map.
    """
    require_norm_sites(model)
    site = site if isinstance(site, NormSite) else NormSite.parse(site)
    given = module_at(model, site)
    before = given if isinstance(given, Norm) else None
    if before is None and site.kind not in WITHIN:
        get_norm(model, site)  # which says what there is
    if before is not None and map_name(before.map) == name:
        # One parameter for both halves.
        b = _bias(model, before.b, len(before.w), before.b is not None if bias is None else bias)
        factor = before.factor if factor is None else factor
        require_positive(factor)
        for half in sites_in(whole_norm(str(site))):
            norm = get_norm(model, half)
            norm.b, norm.factor = b, factor
        return before
    if before is None:
        like, factor_before = get_norm(model, "ln_final"), 1.0
        w, given_b = _parameter(model, 1.0, _width(model, site)), None
    else:
        like, factor_before, w, given_b = before, before.factor, before.w, before.b
    b = _bias(model, given_b, len(w), like.b is not None if bias is None else bias)
    live = make_map(name, epsilon_of(model)).to(model.W_E.device, model.W_E.dtype)
    norm = Norm(live, w, b, factor_before if factor is None else factor)
    _put(model, site, norm.to(model.W_E.device))
    model.setup()
    return get_norm(model, site)


def _bias(
    model: HookedTransformer, given: nn.Parameter | None, width: int, wanted: bool
) -> nn.Parameter | None:
    """The bias of a norm: the given one, a new one of zeros, or none."""
    if not wanted:
        return None
    return _parameter(model, 0.0, width) if given is None else given


def set_scaler(model: HookedTransformer, name: str, value: float = 1.0) -> Scaler:
    """Learn factors at a place: for each head, each chunk of attention's output, or each channel.

    Args:
        model: With norm sites; changed in place.
        name: `blocks.3.attn.head_scale`, `blocks.3.attn.chunk_scale` or `blocks.3.resid_scale`.
        value: What the factors are at first.

    Raises:
        NormSiteError: if there is no such place in the model.
    """
    require_norm_sites(model)
    path, _, kind = name.removeprefix("blocks.").partition(".")
    if kind not in SCALERS or not path.isdigit() or int(path) >= model.cfg.n_layers:
        raise NormSiteError(
            f"{name!r} is no place for factors: give 'blocks.0.' and one of {', '.join(SCALERS)}, "
            f"of the layers 0 to {model.cfg.n_layers - 1}"
        )
    cfg = model.cfg
    if kind == "resid_scale" and (cfg.attn_only or cfg.parallel_attn_mlp):
        raise NormSiteError(f"{name}: the blocks of this model have no residual branch for the MLP")
    if kind == "attn.chunk_scale" and cfg.d_model % cfg.n_heads:
        raise NormSiteError(
            f"{name}: d_model={cfg.d_model} cannot be cut into {cfg.n_heads} equal chunks"
        )
    count = cfg.d_model if kind == "resid_scale" else cfg.n_heads
    each = {"attn.head_scale": cfg.d_head, "attn.chunk_scale": cfg.d_model // cfg.n_heads}
    scaler = Scaler(_parameter(model, value, count), each.get(kind, 1))
    _assign(model, name, scaler)
    return scaler


def set_linear_attention(
    model: HookedTransformer, layer: int, feature_map: str = "elu", divide_by: str = "sum"
) -> LinearAttention | LinearGroupedQueryAttention:
    """Put linear attention in the place of a block's attention, with the same parameters.

    Args:
        model: With norm sites; changed in place.
        layer: The block, counted from 0.
        feature_map: A key of `lnfree_interp.models.linear_attention.FEATURE_MAPS`.
        divide_by: What weights are divided by: `"sum"` or `"count"`.

    Raises:
        NormSiteError: if there is no such block, feature map or divisor.
        UnsupportedModelError: if attention scores have a soft cap.
    """
    require_norm_sites(model)
    if not 0 <= layer < model.cfg.n_layers:
        raise NormSiteError(
            f"there is no block {layer}: the model has {model.cfg.n_layers} layers, counted from 0"
        )
    block: Any = model.blocks[layer]
    block.attn = linear_attention(block.attn, feature_map, divide_by)
    model.setup()
    return block.attn


def layout_of(model: HookedTransformer) -> Layout:
    """Which map stands at each site of a model with norm sites, where it learns factors, and where
    its attention is linear."""
    require_norm_sites(model)
    layout: Layout = {}
    for site in list_norm_sites(model):
        norm = get_norm(model, site)
        layout[str(site)] = {
            "map": map_name(norm.map), "bias": norm.b is not None, "factor": norm.factor,
        }  # fmt: skip
    for name in list_scalers(model):
        layout[name] = {"factors": len(cast(Scaler, module_at(model, name)).w)}
    for layer in linear_layers(model):
        attn = cast(Any, model.blocks[layer]).attn
        layout[f"blocks.{layer}.attn"] = {
            "feature_map": attn.feature_map, "divide_by": attn.divide_by,
        }  # fmt: skip
    return layout


def varied(model: HookedTransformer) -> str | None:
    """The first place where a model with norm sites has another norm than its config says, in
    words; None where there is none, or for a model in any other form."""
    if not has_norm_sites(model):
        return None
    kind = "RMSNorm" if model.cfg.normalization_type == "RMS" else "LayerNorm"
    plain = {"map": kind, "bias": kind == "LayerNorm", "factor": 1.0}
    config = set(map(str, sites_of(model.cfg)))
    for name, found in layout_of(model).items():
        if "factors" in found:
            return f"{name} holds factors"
        if "feature_map" in found:
            return f"{name} is linear"
        if name in config and found == plain:
            continue
        times = "" if found["factor"] == 1 else f" times {found['factor']:.4g}"
        return f"{name} is {found['map']}{times}"
    return None


def lay_out(model: HookedTransformer, layout: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a model with norm sites a layout, with new gains, biases and factors where it differs.

    Raises:
        NormSiteError: if it names a place or a map that does not exist, or leaves out a norm that
            the config has.
    """
    require_norm_sites(model)
    have = layout_of(model)
    if left_out := [name for name in have if name not in layout]:
        raise NormSiteError(f"the layout does not say what stands at {left_out[0]}")
    for name, wanted in layout.items():
        if dict(wanted) == have.get(name):
            continue
        if "factors" in wanted:
            set_scaler(model, name)
        elif "feature_map" in wanted:
            set_linear_attention(model, _layer_of(name), **wanted)
        else:
            set_map(model, name, wanted["map"], bias=wanted["bias"], factor=wanted["factor"])


def _layer_of(attention: str) -> int:
    _, number, leaf = attention.split(".")
    if leaf != "attn":
        raise NormSiteError(f"{attention} is no attention")
    return int(number)


def require_norm_sites(model: HookedTransformer) -> None:
    """Refuse a model in which norms are not `Norm` modules.

    Raises:
        NormSiteError: saying what to call.
    """
    if not has_norm_sites(model):
        raise NormSiteError("this needs a model with norm sites: call with_norm_sites(model) first")


def _parameter(model: HookedTransformer, value: float, width: int) -> nn.Parameter:
    W_E = model.W_E
    return nn.Parameter(torch.full((width,), value, dtype=W_E.dtype, device=W_E.device))


def _width(model: HookedTransformer, site: NormSite) -> int:
    cfg = model.cfg
    if site.layer is None or not 0 <= site.layer < cfg.n_layers:
        raise NormSiteError(
            f"no norm site {str(site)!r}: the model has {cfg.n_layers} layers, counted from 0"
        )
    if cfg.attn_only and site.kind in ("mlp.inner", "ln2_post"):
        raise NormSiteError(f"{site}: the blocks of this model have no MLP")
    if site.kind == "mlp.inner":
        assert cfg.d_mlp is not None
        return cfg.d_mlp
    return cfg.n_heads * cfg.d_head if site.kind == "attn.inner" else cfg.d_model


def _put(model: HookedTransformer, site: NormSite, norm: Norm) -> None:
    name = str(site)
    if whole_norm(name) != name:
        _assign(model, whole_norm(name), SplitNorm.of(norm))
        return
    if site.kind == "mlp.inner":
        block: Any = model.blocks[cast(int, site.layer)]
        if isinstance(block.mlp, SiteGatedMLP):
            block.mlp.inner = norm
        else:
            block.mlp = InnerNormMLP.from_stock(block.mlp, norm)
        return
    _assign(model, name, norm)


def _assign(model: HookedTransformer, name: str, module: nn.Module) -> None:
    """As `set_submodule`, also where there is none yet."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
