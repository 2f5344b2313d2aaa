"""The two finished forms of an LN-free model, and how one becomes the other.

**Folded**: nothing is left of the norms, `normalization_type=None`. **Frozen**: the readers keep a
factor sigma and a `FrozenNorm` divides by it, `normalization_type="LNPre"`, or `"RMSPre"`, so that
the tools of TransformerLens that look for `hook_scale` run. Readers are centred in both.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerBase

from lnfree_interp.errors import NormSiteError
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.construct import copy_weights, hooked_transformer
from lnfree_interp.models.folding import (
    ConstantNorm,
    ConstantNorms,
    Form,
    fold_weights,
    sigma_of,
)
from lnfree_interp.models.norms import FrozenNorm, Norm
from lnfree_interp.models.sites import get_norm, has_norm_sites, list_norm_sites, live_sites
from lnfree_interp.numerics import ROUNDING


def finished_model(
    cfg: HookedTransformerConfig,
    weights: MutableMapping[str, Tensor],
    norms: ConstantNorms,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    centred: bool,
    form: Form,
) -> HookedTransformer:
    """A model in one of the two finished forms.

    Args:
        cfg: Of the model with norms.
        weights: As for `fold_weights`.
        norms: As for `fold_weights`.
        tokenizer: Goes along.
        centred: As for `fold_weights`.
        form: `"folded"` or `"frozen"`.
    """
    kind = None if form == "folded" else "LNPre" if centred else "RMSPre"
    cfg = replace(
        cfg, normalization_type=kind, use_normalization_before_and_after=False, use_qk_norm=False
    )
    finished = fold_weights(weights, norms, centred, form)
    if form == "folded":
        return hooked_transformer(cfg, finished, tokenizer)
    scales = {"ln_final": norms["ln_final"].sigma}
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        scales[f"{block}.ln1"] = sigma_of(norms, block, "W_V")
        scales[f"{block}.ln2"] = sigma_of(norms, block, "W_in")
    return frozen_transformer(cfg, finished, scales, tokenizer)


def frozen_transformer(
    cfg: HookedTransformerConfig,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    scales: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    complete: bool = True,
) -> HookedTransformer:
    """A stock model of type LNPre or RMSPre whose norms divide by constants.

    Args:
        cfg: With `normalization_type` `"LNPre"` or `"RMSPre"`.
        weights: Its weights as they are.
        scales: sigma by norm, `blocks.0.ln1`, `blocks.0.ln2`, ..., `ln_final`.
        tokenizer: Goes along.
        complete: As for `hooked_transformer`.
    """
    model = hooked_transformer(cfg, {}, tokenizer, complete=False)
    for name, sigma in scales.items():
        norm = FrozenNorm(sigma, cfg.normalization_type == "LNPre", cfg.dtype)
        model.set_submodule(name, norm.to(cfg.device))
    model.setup()
    if complete:
        copy_weights(model, weights)
    return model.eval()


def is_frozen_form(model: HookedTransformer) -> bool:
    """Whether the model is in the frozen form: every norm module a `FrozenNorm`."""
    sites = list_norm_sites(model)
    return bool(sites) and all(
        site.kind in ("ln1", "ln2", "ln_final")
        and isinstance(model.get_submodule(site.name), FrozenNorm)
        for site in sites
    )


def reads_mean(model: HookedTransformer) -> str | None:
    """The name of a weight that reads the mean of the residual stream, or None."""
    tolerance = ROUNDING[model.cfg.dtype]
    blocks = cast(Iterable[Any], model.blocks)
    readers = {"W_Q": model.W_Q, "W_K": model.W_K, "W_V": model.W_V, "W_in": model.W_in}
    if model.cfg.gated_mlp:
        readers["W_gate"] = torch.stack([block.mlp.W_gate for block in blocks])
    for name, W in (readers | {"W_U": model.W_U}).items():
        if W.mean(-2).abs().max() > tolerance * W.abs().max():
            return name
    return None


def constant_norms(model: HookedTransformer) -> tuple[dict[str, ConstantNorm], bool]:
    """The constant norms of an LN-free model in any form, and whether they subtract the mean.

    A folded model has none left; it is described as dividing by one.

    Raises:
        NormSiteError: if a norm is live.
    """
    if not has_norm_sites(model):
        if model.cfg.normalization_type is None:
            names = ["ln_final"]
            blocks = range(model.cfg.n_layers)
            names += [f"blocks.{i}.{ln}" for i in blocks for ln in ("ln1", "ln2")]
            one = ConstantNorm(torch.ones(model.cfg.d_model, device=model.W_E.device), None, 1.0)
            # final_rms is kept from the model with norms; rounding cannot tell in bfloat16.
            centred = not model.cfg.final_rms and reads_mean(model) is None
            return dict.fromkeys(names, one), centred
        if is_frozen_form(model):
            norms = {}
            for name, norm in model.named_modules():
                if isinstance(norm, FrozenNorm):
                    sigma = norm.sigma.item()
                    gain = torch.full_like(model.W_E[0], 1 / sigma, dtype=torch.float64)
                    norms[name] = ConstantNorm(gain, None, sigma)
            return norms, _centres(model)
        raise NormSiteError(
            "nothing to fold: the model has no frozen norm sites; remove_norms(...).model has"
        )
    if live := live_sites(model):
        names = ", ".join(map(str, live[:4])) + (", ..." if len(live) > 4 else "")
        raise NormSiteError(f"{len(live)} norm sites are still live and cannot be folded: {names}")
    norms = {}
    for site in list_norm_sites(model):
        norm = get_norm(model, site)
        gain = norm.w.detach().double() / norm.sigma.double()
        bias = None if norm.b is None else norm.b.detach()
        norms[str(site)] = ConstantNorm(gain, bias, norm.constant)
    return norms, _centres(model)


def _centres(model: HookedTransformer) -> bool:
    return cast(Norm | FrozenNorm, model.ln_final).centred


def _weights_around_norms(model: HookedTransformer) -> dict[str, Tensor]:
    norm = (".ln", "ln_final", "_norm.")
    state = {k: v for k, v in model.state_dict().items() if not any(part in k for part in norm)}
    state.pop("unembed.W_E", None)  # present when tied
    state["unembed.W_U"] = model.W_U.detach()
    return state


def fold(model: HookedTransformer) -> HookedTransformer:
    """The same function as a stock `HookedTransformer` with `normalization_type=None`.

    Args:
        model: A model whose norms are all constant: `remove_norms(...).model`, or the frozen form.

    Returns:
        A new model with no class of this package in it. Its logits have been compared with the
            given model's on random tokens; `compare_logits` gives the number.

    Raises:
        NormSiteError: if a norm is still live, or there is none to fold.
        InexactError: if the logits differ by more than rounding in the model's dtype explains.

    Examples:
        >>> sited = lf.with_norm_sites(model)
        >>> for site in lf.list_norm_sites(sited):
        ...     lf.freeze_site(sited, site, sigma=1.0)
        >>> lf.fold(sited).cfg.normalization_type is None
        True
    """
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
        A new model; its logits have been compared with the given model's on random tokens.

    Raises:
        NormSiteError: if a norm is still live, or sigma names a norm that the model does not have,
            or is not a number for each.
        InexactError: as `fold`.

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
    norms, centred = constant_norms(model)
    if sigma:
        norms = with_sigma(norms, sigma)
    finished = finished_model(
        model.cfg,
        _weights_around_norms(model),
        norms,
        model.tokenizer,
        centred=centred,
        form=form,
    )
    compare_logits(finished, model).require(f"{form} against the given model's logits")
    return finished


def with_sigma(norms: ConstantNorms, sigma: Mapping[str, float]) -> dict[str, ConstantNorm]:
    """The same norms with other constants to show.

    Raises:
        NormSiteError: for a name that is not among them.
    """

    def whole(name: str) -> str:  # blocks.0.ln1.qk is a part of blocks.0.ln1
        return name.removesuffix(".qk").removesuffix(".v")

    known = dict.fromkeys(map(whole, norms))
    if unknown := sorted(set(sigma) - set(known)):
        raise NormSiteError(f"no norm {unknown[0]!r}; the model's norms: {', '.join(known)}")
    try:
        return {
            name: replace(norm, sigma=float(sigma.get(whole(name), norm.sigma)))
            for name, norm in norms.items()
        }
    except (TypeError, ValueError) as error:
        raise NormSiteError(f"sigma must be one number for each norm: {error}") from error
