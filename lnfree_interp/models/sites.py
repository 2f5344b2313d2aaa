"""Norm sites: the places where a normalisation acts, by name.

A site is named by TransformerLens' own module path, with `ln1` split by who reads it:
`blocks.0.ln1.qk`, `blocks.0.ln1.v`, `blocks.0.ln2`, ..., `ln_final`. Some architectures have more:
`attn.q_norm` and `attn.k_norm` on queries and keys (Qwen3), `ln1_post` and `ln2_post` on what the
sublayers write (Gemma 2); others are put where there was none: `attn.inner` on all heads' `hook_z`
before W_O, `mlp.inner` on `hook_post` before W_out (`models.inserting`). Whatever touches norms
does so through sites; which module a site's name means in a model is decided in `norm_path` alone.
"""

import copy
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.components import Unembed
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from lnfree_interp.errors import NormSiteError, UnsupportedModelError
from lnfree_interp.models.agreement import require_same_logits
from lnfree_interp.models.block import LookupEmbed, SiteBlock, TiedUnembed
from lnfree_interp.models.first_token import follow_first_tokens
from lnfree_interp.models.norm_map import NormMap
from lnfree_interp.models.norms import Norm, Scaler, SplitNorm, describe
from lnfree_interp.models.running import require_hooked
from lnfree_interp.models.site_names import (
    SCALERS,
    NormSite,
    SiteKind,
    SplitKind,
    stock_name,
    whole_norm,
)


def stock_weights(model: HookedTransformer) -> dict[str, Tensor]:
    """The weights by the names that they have in a stock model; tied or not, split or not."""
    # The two halves of a split ln1 share their parameters.
    weights = {
        stock_name(name): W.detach()
        for name, W in model.named_parameters(remove_duplicate=False)
        if name != "unembed.W_E"
    }
    weights["unembed.W_U"] = model.W_U.detach()
    weights["unembed.b_U"] = model.b_U.detach()
    return weights


def norm_path(model: HookedTransformer, site: NormSite | str) -> str:
    """The path of the module that a site means in this model.

    Args:
        model: In any form.
        site: A site, or its name.

    Returns:
        `blocks.0.ln1.qk` itself in a model with norm sites, `blocks.0.ln1` in one whose `ln1` is
            one module; every other name as it is.

    Raises:
        NormSiteError: if the model has no such block.
    """
    name = str(site)
    whole = whole_norm(name)
    if whole == name:
        return name
    try:
        ln1 = model.get_submodule(whole)
    except AttributeError as error:
        raise NormSiteError(
            f"no norm site {name!r}: the model has {model.cfg.n_layers} layers, counted from 0"
        ) from error
    return name if isinstance(ln1, SplitNorm) else whole


def norm_at(model: HookedTransformer, site: NormSite | str) -> NormMap:
    """What the norm at a site does, in a model that has norms.

    Raises:
        UnsupportedModelError: for a module that is not a norm known here.
    """
    return describe(model.get_submodule(norm_path(model, site)))


def sites_of(cfg: HookedTransformerConfig, whole_ln1: bool = False) -> tuple[NormSite, ...]:
    """The places where a model of this config normalises, in the order of computation.

    Args:
        cfg: Its `normalization_type` is not asked: a folded model has the same places, without
            norms.
        whole_ln1: Whether `ln1` is one site, read by queries, keys and values alike.
    """
    kinds: list[SiteKind] = ["ln1"] if whole_ln1 else ["ln1.qk", "ln1.v"]
    if cfg.use_qk_norm:
        kinds.extend(["attn.q_norm", "attn.k_norm"])
    if cfg.use_normalization_before_and_after:
        kinds.append("ln1_post")
    if not cfg.attn_only:
        kinds.append("ln2")
        if cfg.use_normalization_before_and_after:
            kinds.append("ln2_post")
    sites = [NormSite(kind, layer) for layer in range(cfg.n_layers) for kind in kinds]
    return (*sites, NormSite("ln_final"))


def list_norm_sites(model: HookedTransformer) -> tuple[NormSite, ...]:
    """The model's norm sites in the order of computation.

    A stock model lists the sites at which its norms can be frozen, one by one; a model in the
    frozen form lists its norm modules (`blocks.0.ln1` is one again); a folded model has none.

    Args:
        model: Stock, with norm sites, in the frozen form or folded.

    Returns:
        The sites; `str(site)` is the module path.

    Examples:
        >>> [str(site) for site in lf.list_norm_sites(model)][:4]
        ['blocks.0.ln1.qk', 'blocks.0.ln1.v', 'blocks.0.ln2', 'blocks.1.ln1.qk']
        >>> lf.list_norm_sites(free)
        ()
    """
    require_hooked(model)
    if model.cfg.normalization_type is None:
        return ()
    if not has_norm_sites(model):
        return sites_of(model.cfg, whole_ln1=is_frozen_form(model))
    kinds = [kind for kind in get_args(SplitKind) if kind != "ln_final"]
    every = [NormSite(kind, layer) for layer in range(model.cfg.n_layers) for kind in kinds]
    every.append(NormSite("ln_final"))
    return tuple(site for site in every if isinstance(module_at(model, site), Norm))


def list_scalers(model: HookedTransformer) -> tuple[str, ...]:
    """The paths of the factors that a model with norm sites learns beside its norms.

    They are linear, so that every analysis is exact through them, and fold when the model does.

    Args:
        model: In any form; only one with norm sites has some.

    Returns:
        Paths such as `blocks.0.attn.head_scale`, in the order of computation.

    Examples:
        >>> lf.list_scalers(lf.to_normformer(model).model)[:2]
        ('blocks.0.attn.head_scale', 'blocks.0.resid_scale')
    """
    names = [f"blocks.{layer}.{kind}" for layer in range(model.cfg.n_layers) for kind in SCALERS]
    return tuple(name for name in names if isinstance(module_at(model, name), Scaler))


def module_at(model: HookedTransformer, site: NormSite | str) -> nn.Module | None:
    """The module at a path; None where there is none."""
    try:
        return model.get_submodule(str(site))
    except AttributeError:
        return None


def has_norm_sites(model: HookedTransformer) -> bool:
    """Whether the norms are `Norm` modules, which can be frozen one by one."""
    return all(isinstance(block, SiteBlock) for block in model.blocks)


def is_frozen_form(model: HookedTransformer) -> bool:
    """Whether the model is in the frozen form: stock blocks, and norms that are all affine."""
    if model.cfg.normalization_type is None or has_norm_sites(model):
        return False
    return all(norm_at(model, site).affine for site in sites_of(model.cfg, whole_ln1=True))


def _require_pre_norm(model: HookedTransformer) -> None:
    require_hooked(model)
    cfg = model.cfg
    unsupported = {
        f"normalization_type={cfg.normalization_type!r} (load it unprocessed, with load() or "
        "from_pretrained_no_processing)": cfg.normalization_type not in ("LN", "RMS"),
        "norms after the sublayers only": cfg.original_architecture in POST_NORM_ARCHITECTURES,
        "a norm after the embedding": cfg.post_embedding_ln,
        f"{cfg.positional_embedding_type!r} positions": cfg.positional_embedding_type
        not in ("standard", "rotary"),
        "bidirectional attention": cfg.attention_dir != "causal",
        "attention sinks": cfg.use_attention_sinks,
        "clipped queries, keys and values": cfg.clip_qkv is not None,
        "a norm inside the MLP": cfg.is_layer_norm_activation(),
        "an RMSNorm after LayerNorms": cfg.normalization_type == "LN" and cfg.final_rms,
        "several devices": cfg.n_devices > 1,
    }
    found = [what for what, is_so in unsupported.items() if is_so]
    if found:
        raise UnsupportedModelError(
            f"norms can be frozen one by one in blocks that normalise what a sublayer reads; this "
            f"model has {', '.join(found)}"
        )


def with_norm_sites(model: HookedTransformer, copy_weights: bool = True) -> HookedTransformer:
    """A copy of a stock model whose norms can be frozen one by one.

    Same function, same hook names, except that `blocks.{l}.ln1` is split into `ln1.qk` and `ln1.v`.
    An unembedding that equals the transposed embedding is tied to it, as in GPT-2. Hooks that were
    added to the model are not carried over.

    Args:
        model: A stock model, or one with norm sites already.
        copy_weights: False: the copy has the model's own parameters, and training it trains both.

    Returns:
        The copy; one of a stock model has been compared with it by logits on random tokens.

    Raises:
        UnsupportedModelError: for norms that do not stand before each sublayer, and for processed
            models.
        InexactError: if the copy's logits differ, as when a hook on the model changes them.

    Examples:
        >>> sited = lf.with_norm_sites(model)
        >>> len(lf.live_sites(sited))
        13
    """
    require_hooked(model)
    split = split_norms(model, copy_weights)
    if not has_norm_sites(model):
        require_same_logits(split, model, "model with norm sites against stock")
    return split


def split_norms(model: HookedTransformer, copy_weights: bool = True) -> HookedTransformer:
    """The copy that `with_norm_sites` makes, without comparing logits."""
    if has_norm_sites(model):
        return _copied(model, copy_weights)
    _require_pre_norm(model)
    model = _copied(model, copy_weights)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = SiteBlock.from_stock(block, index)
    model.ln_final = Norm.from_stock(cast(Any, model.ln_final))
    model.embed = LookupEmbed(model.embed)
    if has_tied_unembedding(model):
        model.unembed = TiedUnembed(model.unembed, model.embed)
    follow_first_tokens(model)
    model.setup()
    return model


def has_tied_unembedding(model: HookedTransformer) -> bool:
    """Whether the unembedding is the transposed embedding, without a bias."""
    return torch.equal(model.W_U, model.W_E.T) and not bool(model.b_U.any())


def untie(model: HookedTransformer) -> None:
    """Give a model with norm sites an unembedding of its own, if it is tied to the embedding."""
    if isinstance(model.unembed, TiedUnembed):
        own = Unembed(model.cfg).to(model.W_E.device)
        own.W_U = nn.Parameter(model.W_E.detach().T.clone())
        model.unembed = own
        model.setup()


def _copied(model: HookedTransformer, copy_weights: bool) -> HookedTransformer:
    """A copy without hooks, which shares the parameters unless they are to be copied."""
    # deepcopy takes what is in its memo as copied already.
    own: dict[int, object] = {} if copy_weights else {id(p): p for p in model.parameters()}
    copied = copy.deepcopy(model, own)
    copied.reset_hooks(including_permanent=True)
    return copied


def first_constants(model: HookedTransformer) -> dict[str, float]:
    """The constants of norms that keep one for the first token of a prompt, by site."""
    norms = {str(site): norm_at(model, site) for site in list_norm_sites(model)}
    return {name: norm.first for name, norm in norms.items() if norm.first is not None}


def get_norm(model: HookedTransformer, site: NormSite | str) -> Norm:
    """The module at a site.

    Args:
        model: With norm sites, see `with_norm_sites`.
        site: A site, or its name.

    Returns:
        The `Norm`, with gain `w`, bias `b`, and `sigma` once it is frozen.

    Raises:
        NormSiteError: if the model has no such site.

    Examples:
        >>> lf.get_norm(lf.with_norm_sites(model), "blocks.0.ln2").w.shape
        torch.Size([192])
    """
    name, norm = str(site), module_at(model, site)
    if not isinstance(norm, Norm):
        known = ", ".join(map(str, list_norm_sites(model))) or "none: its norms are folded"
        stock = not has_norm_sites(model) and live_sites(model)
        hint = "; call with_norm_sites(model) first" if stock else ""
        raise NormSiteError(f"no norm site {name!r}; the model's sites: {known}{hint}")
    return norm


def freeze_site(
    model: HookedTransformer, site: NormSite | str, sigma: float, first: float | None = None
) -> None:
    """Turn a live site into the affine map that divides by `sigma`.

    Args:
        model: With norm sites; changed in place.
        site: A site, or its name.
        sigma: What it divides by from then on, in place of each token's standard deviation
            (RMSNorm: root mean square). A frozen site gets the new one.
        first: What the first token of each prompt is divided by, the first that is not masked: in
            many models its norm is a multiple of all others'. Default: `sigma`. The map is affine
            at every position, so every analysis is exact on it, but `fold` cannot merge it.

    Raises:
        NormSiteError: if there is no such site, or a constant is not positive and finite.

    Examples:
        >>> sited = lf.with_norm_sites(model)
        >>> lf.freeze_site(sited, "ln_final", sigma=2.0)
        >>> len(lf.live_sites(sited))
        12
    """
    get_norm(model, site).freeze(sigma, first=first)


def live_sites(model: HookedTransformer) -> tuple[NormSite, ...]:
    """The sites that still normalise. Empty: everything reads the stream by an affine map.

    Args:
        model: Stock, with norm sites, in the frozen form or folded.

    Returns:
        Those of `list_norm_sites` that are not frozen.

    Examples:
        >>> len(lf.live_sites(model)), lf.live_sites(free)
        (13, ())
    """
    return tuple(site for site in list_norm_sites(model) if not norm_at(model, site).affine)
