"""Norm sites: the places where a normalisation acts, by name.

A site is named by TransformerLens' own module path, with `ln1` split by who reads it:
`blocks.0.ln1.qk`, `blocks.0.ln1.v`, `blocks.0.ln2`, ..., `ln_final`. Some architectures have more:
`attn.q_norm` and `attn.k_norm` on queries and keys (Qwen3), `ln1_post` and `ln2_post` on what the
sublayers write (Gemma 2). Whatever touches norms does so through sites.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from transformer_lens import HookedTransformer
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from lnfree_interp.errors import NormSiteError, UnsupportedModelError
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.block import LookupEmbed, SiteBlock, TiedUnembed
from lnfree_interp.models.norms import FrozenNorm, Norm

SiteKind = Literal[
    "ln1.qk",
    "ln1.v",
    "ln1",
    "attn.q_norm",
    "attn.k_norm",
    "ln1_post",
    "ln2",
    "ln2_post",
    "ln_final",
]


@dataclass(frozen=True)
class NormSite:
    """The name of a place where a norm acts."""

    kind: SiteKind
    """Which norm of the block, e.g. `"ln1.qk"`; or `"ln_final"`."""
    layer: int | None = None
    """Block index; None for `ln_final`."""

    @property
    def name(self) -> str:
        """The module path, e.g. `blocks.3.ln1.qk`."""
        return self.kind if self.layer is None else f"blocks.{self.layer}.{self.kind}"

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str) -> "NormSite":
        """The site of that name.

        Raises:
            NormSiteError: if no model has such a site.
        """
        kind, layer = name, None
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            layer, kind = int(match[1]), match[2]
        if kind not in get_args(SiteKind) or (layer is None) != (kind == "ln_final"):
            raise NormSiteError(f"{name!r} is not the name of a norm site")
        return cls(cast(SiteKind, kind), layer)


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
    cfg = model.cfg
    if cfg.normalization_type is None:
        return ()
    one_ln1 = isinstance(model.ln_final, FrozenNorm)
    kinds: list[SiteKind] = []
    kinds.extend(["ln1"] if one_ln1 else ["ln1.qk", "ln1.v"])
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


def has_norm_sites(model: HookedTransformer) -> bool:
    """Whether the norms are `Norm` modules, which can be frozen one by one."""
    return all(isinstance(block, SiteBlock) for block in model.blocks)


def _require_pre_norm(model: HookedTransformer) -> None:
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
            f"freezing norms one by one needs blocks that normalise what a sublayer reads; this "
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
    if has_norm_sites(model):
        return _copied(model, copy_weights)
    split = split_norms(model, copy_weights)
    compare_logits(split, model).require("model with norm sites against stock")
    return split


def split_norms(model: HookedTransformer, copy_weights: bool = True) -> HookedTransformer:
    """As `with_norm_sites` of a stock model, without comparing logits."""
    _require_pre_norm(model)
    model = _copied(model, copy_weights)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = SiteBlock.from_stock(block, index)
    model.ln_final = Norm(cast(Any, model.ln_final))
    model.embed = LookupEmbed(model.embed)
    if torch.equal(model.W_U, model.W_E.T) and not model.b_U.any():
        model.unembed = TiedUnembed(model.unembed, model.embed)
    model.setup()
    return model


def _copied(model: HookedTransformer, copy_weights: bool) -> HookedTransformer:
    """Without hooks. deepcopy takes what its memo holds for copied already."""
    own: dict[int, object] = {} if copy_weights else {id(p): p for p in model.parameters()}
    copied = copy.deepcopy(model, own)
    copied.reset_hooks(including_permanent=True)
    return copied


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
    name = str(site)
    try:
        norm: nn.Module | None = model.get_submodule(name)
    except AttributeError:
        norm = None
    if not isinstance(norm, Norm):
        known = ", ".join(map(str, list_norm_sites(model))) or "none: its norms are folded"
        stock = not has_norm_sites(model) and live_sites(model)
        hint = "; call with_norm_sites(model) first" if stock else ""
        raise NormSiteError(f"no norm site {name!r}; the model's sites: {known}{hint}")
    return norm


def freeze_site(model: HookedTransformer, site: NormSite | str, sigma: float) -> None:
    """Turn a live site into the affine map that divides by `sigma`.

    Args:
        model: With norm sites; changed in place.
        site: A site, or its name.
        sigma: What it divides by from then on, in place of each token's standard deviation
            (RMSNorm: root mean square). A frozen site gets the new one.

    Raises:
        NormSiteError: if there is no such site, or sigma is not positive and finite.

    Examples:
        >>> sited = lf.with_norm_sites(model)
        >>> lf.freeze_site(sited, "ln_final", sigma=2.0)
        >>> len(lf.live_sites(sited))
        12
    """
    get_norm(model, site).freeze(sigma)


def live_sites(model: HookedTransformer) -> tuple[NormSite, ...]:
    """The sites that still normalise. Empty: everything reads the stream by an affine map.

    Args:
        model: As for `list_norm_sites`.

    Returns:
        Those of `list_norm_sites` that are not frozen.

    Examples:
        >>> len(lf.live_sites(model)), lf.live_sites(free)
        (13, ())
    """
    sites = list_norm_sites(model)
    if not has_norm_sites(model):
        return tuple(site for site in sites if not _is_frozen_module(model, site))
    return tuple(site for site in sites if not get_norm(model, site).frozen)


def _is_frozen_module(model: HookedTransformer, site: NormSite) -> bool:
    return site.kind in ("ln1", "ln2", "ln_final") and isinstance(
        model.get_submodule(site.name), FrozenNorm
    )
