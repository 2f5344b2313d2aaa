"""The two finished forms of an LN-free model, and how one becomes the other.

**Folded**: nothing is left of the norms, `normalization_type=None`. **Frozen**: the readers keep a
factor sigma and a `FrozenNorm` divides by it, `normalization_type="LNPre"`, or `"RMSPre"`, so that
the tools of TransformerLens that look for `hook_scale` run. Readers are centred in both.

The `cfg` of the frozen form alone describes a model whose norms are live. Its epsilon is NaN, so
that whoever builds a model from that `cfg`, without the constants, gets NaN in place of plausible
logits; the epsilon itself stays in the norms (`epsilon_of`).
"""

import math
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import replace

from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerBase

from lnfree_interp.errors import NormSiteError
from lnfree_interp.models.agreement import require_same_logits
from lnfree_interp.models.construct import copy_weights, hooked_transformer
from lnfree_interp.models.first_token import follow_first_tokens
from lnfree_interp.models.folding import (
    ConstantNorms,
    Form,
    fold_weights,
    frozen_firsts,
    frozen_scales,
    in_gauge,
    is_reader,
    require_foldable_behind,
    require_gates_without_bias,
    residual_gauge,
)
from lnfree_interp.models.linear_attention import linear_layers
from lnfree_interp.models.norm_map import NormMap
from lnfree_interp.models.norms import FrozenNorm
from lnfree_interp.models.running import require_hooked
from lnfree_interp.models.site_names import whole_norm
from lnfree_interp.models.sites import (
    has_norm_sites,
    list_norm_sites,
    list_scalers,
    norm_at,
    norm_path,
    sites_of,
)
from lnfree_interp.numerics import ROUNDING


def finished_model(
    cfg: HookedTransformerConfig,
    weights: MutableMapping[str, Tensor],
    norms: ConstantNorms,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    form: Form,
) -> HookedTransformer:
    """A model in one of the two finished forms.

    Args:
        cfg: Of the model with norms, with the epsilon that they had.
        weights: All weights but the norms' own; emptied on the way.
        norms: An affine norm for every site.
        tokenizer: Goes along.
        form: `"folded"` or `"frozen"`.
    """
    require_foldable_behind(norms)
    require_gates_without_bias(cfg, norms)
    if form == "folded":
        _require_one_constant(norms)
    scales = frozen_scales(norms)
    firsts = frozen_firsts(norms)
    rescaled = residual_gauge(norms, cfg.n_layers)
    centred = all(norm.centred for site, norm in norms.items() if whole_norm(site) in scales)
    centred = centred and rescaled is None  # readers centre by themselves
    kind = None if form == "folded" else "LNPre" if centred else "RMSPre"
    cfg = replace(
        cfg, normalization_type=kind, use_normalization_before_and_after=False, use_qk_norm=False
    )
    finished = fold_weights(weights, norms, form)
    if rescaled is not None:
        finished = in_gauge(finished, rescaled)
    if form == "folded":
        return hooked_transformer(cfg, finished, tokenizer)
    return frozen_transformer(cfg, finished, scales, tokenizer, firsts=firsts)


def _require_one_constant(norms: ConstantNorms) -> None:
    found = [site for site, norm in norms.items() if norm.first is not None]
    if found:
        raise NormSiteError(
            f"{len(found)} norm sites divide the first token of a prompt by a constant of its own, "
            f"which no weight can hold: {', '.join(found[:4])}{', ...' * (len(found) > 4)}. Use "
            "frozen_form(model), on which every analysis is exact, or freeze them with one "
            "constant, freeze_site(model, site, sigma)"
        )


def frozen_transformer(
    cfg: HookedTransformerConfig,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    scales: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    firsts: Mapping[str, float] | None = None,
    complete: bool = True,
) -> HookedTransformer:
    """A stock model of type LNPre or RMSPre whose norms divide by constants.

    Args:
        cfg: With `normalization_type` `"LNPre"` or `"RMSPre"`, and the epsilon that the norms had.
        weights: Its weights as they are.
        scales: sigma by norm, `blocks.0.ln1`, `blocks.0.ln2`, ..., `ln_final`.
        tokenizer: Goes along.
        firsts: The sigma of first tokens, for norms where it is another one.
        complete: Copy the weights. False: leave them uninitialised, for `copy_weights` later.
    """
    model = hooked_transformer(cfg, {}, tokenizer, complete=False)
    firsts = firsts or {}
    for name, sigma in scales.items():
        norm = FrozenNorm(sigma, cfg.normalization_type == "LNPre", cfg.eps, firsts.get(name))
        model.set_submodule(name, norm.to(cfg.device))
    if firsts:
        follow_first_tokens(model)
    model.cfg.eps = math.nan
    model.setup()
    if complete:
        copy_weights(model, weights)
    return model.eval()


def epsilon_of(model: HookedTransformer) -> float:
    """What the norms add to the variance, or added while they were live."""
    eps = float(getattr(getattr(model, "ln_final", None), "eps", math.nan))
    return float(model.cfg.eps) if math.isnan(eps) else eps  # folded, or a curve


def reads_mean(model: HookedTransformer) -> str | None:
    """The name of a weight that reads the mean of the residual stream, or None."""
    tolerance = ROUNDING[model.cfg.dtype]
    for name, W in model.named_parameters():
        if is_reader(name) and W.mean(-2).abs().max() > tolerance * W.abs().max():
            return name
    return None


def constant_norms(model: HookedTransformer) -> dict[str, NormMap]:
    """The affine norms of an LN-free model in any form, by site, and its scalers.

    A folded model has none left; it is described as dividing by one.

    Raises:
        NormSiteError: if a norm is live.
    """
    require_hooked(model)
    sites = sites_of(model.cfg)
    if model.cfg.normalization_type is None:
        # final_rms is kept from the model with norms; rounding cannot tell in bfloat16.
        centred = not model.cfg.final_rms and reads_mean(model) is None
        return {str(site): NormMap(centred, statistic=None, scale=1.0) for site in sites}
    if has_norm_sites(model):
        sites = (*list_norm_sites(model), *list_scalers(model))
    norms = {str(site): norm_at(model, site) for site in sites}
    if live := [name for name, norm in norms.items() if not norm.affine]:
        if not has_norm_sites(model):
            raise NormSiteError(
                "nothing to fold: the norms of this model are live. Remove them with "
                "remove_norms(model, recipe, data) and fold the .model of what it returns"
            )
        names = ", ".join(live[:4]) + (", ..." if len(live) > 4 else "")
        raise NormSiteError(
            f"{len(live)} norm sites are still live, and a live norm cannot be folded: {names}. "
            "Freeze them first (remove_norms or freeze_site)"
        )
    return norms


def weights_around_norms(model: HookedTransformer) -> dict[str, Tensor]:
    """The weights of a model but those of norms and scalers, by the names of the stock model."""
    sites = list_norm_sites(model) if has_norm_sites(model) else sites_of(model.cfg)
    norms = {*(norm_path(model, site) for site in sites), *list_scalers(model)}
    state = {
        name: W
        for name, W in model.state_dict().items()
        if name.rpartition(".")[0].removesuffix(".map") not in norms
    }
    state.pop("unembed.W_E", None)  # present when tied
    state["unembed.W_U"] = model.W_U.detach()
    return state


def fold(model: HookedTransformer) -> HookedTransformer:
    """The same function as a stock `HookedTransformer` with `normalization_type=None`.

    Args:
        model: A model whose norms are all constant: `remove_norms(...).model`, or the frozen form.

    Returns:
        A new model with no class of this package in it. Its logits have been compared with the
            given model's on random tokens; `measured_agreement` gives the difference.

    Raises:
        NormSiteError: if a norm is still live, has a constant of its own for first tokens, or there
            is none to fold; or if attention is linear somewhere.
        InexactError: if the logits differ by more than rounding in the model's dtype explains, or
            are not finite.

    Examples:
        >>> sited = lf.with_norm_sites(model)
        >>> for site in lf.list_norm_sites(sited):
        ...     lf.freeze_site(sited, site, sigma=1.0)
        >>> lf.fold(sited).cfg.normalization_type is None
        True
    """
    require_hooked(model)
    if model.cfg.normalization_type is None:
        raise NormSiteError("nothing to fold: the model has no norms")
    return _in_form(model, "folded", None)


def frozen_form(
    model: HookedTransformer, sigma: Mapping[str, float] | None = None
) -> HookedTransformer:
    """The same function in the form that TransformerLens' own tools understand, and are exact on.

    A stock `HookedTransformer` of type `"LNPre"` (`"RMSPre"` for a model that was freed from
    RMSNorms) in which every norm divides by a constant `hook_scale`. Where a tool divides by the
    cached scale, it now divides by a constant, which is no approximation.

    Args:
        model: An LN-free model: folded, or with frozen norm sites.
        sigma: The constants to show, by norm (`blocks.0.ln1`, `blocks.0.ln2`, `ln_final`). Any
            positive numbers are exact. Default: those the model knows; 1 for a folded one.

    Returns:
        A new model; its logits have been compared with the given model's on random tokens, and
            `measured_agreement` gives the difference. Save it with `export`: its `cfg.eps` is NaN,
            so a model that is built from its `cfg` and weights alone, whose norms would be live,
            gives NaN.

    Raises:
        NormSiteError: if a norm is still live, attention is linear somewhere, or sigma names a norm
            that the model does not have, or is not a number for each.
        InexactError: if the logits differ by more than rounding in the model's dtype explains, or
            are not finite.

    Examples:
        >>> token = free.to_single_token(" range")
        >>> logits, cache = lf.frozen_form(free).run_with_cache("for i in")
        >>> parts = cache.logit_attrs(cache.decompose_resid(), token)
        >>> (parts.sum(0) + free.b_U[token] - logits[..., token]).abs().max().item() < 1e-2
        True
    """
    return _in_form(model, "frozen", sigma)


def _in_form(
    model: HookedTransformer, form: Form, sigma: Mapping[str, float] | None
) -> HookedTransformer:
    norms = constant_norms(model)
    if layers := linear_layers(model):
        raise NormSiteError(
            f"attention in {len(layers)} blocks, from block {layers[0]} on, is linear, which no "
            "stock HookedTransformer computes: the model with frozen norm sites is finished, every "
            "analysis is exact on it as it is, and lf.export keeps it"
        )
    if sigma:
        norms = _with_scales(norms, sigma)
    finished = finished_model(
        replace(model.cfg, eps=epsilon_of(model)),
        weights_around_norms(model),
        norms,
        model.tokenizer,
        form=form,
    )
    require_same_logits(finished, model, f"{form} against the given model's logits")
    return finished


def _with_scales(norms: ConstantNorms, sigma: Mapping[str, float]) -> dict[str, NormMap]:
    """The same norms, written as divisions by other constants.

    Raises:
        NormSiteError: for a name that is not a norm of the frozen form, or a value that is not a
            positive number.
    """
    known = frozen_scales(norms)
    if unknown := sorted(set(sigma) - set(known)):
        raise NormSiteError(
            f"sigma names {unknown[0]!r}, which is not a norm of this model's frozen form. Its "
            f"norms are {', '.join(known)}"
        )
    shown = {}
    for site, norm in norms.items():
        value = sigma.get(whole_norm(site))
        try:
            shown[site] = norm if value is None else norm.showing(float(value))
        except (TypeError, ValueError) as error:
            raise NormSiteError(f"sigma of {site} is not a number: {value!r}") from error
    return shown
