"""Exact conversions between norms: LayerNorm to RMSNorm, RMSNorm to CRMSNorm.

No LayerNorm ever sees the mean of the residual stream. So the weights that write to the stream can
be centred, after which its mean is zero, and LayerNorm without gain and bias is RMSNorm. And a
zero-mean stream in d dimensions needs only d - 1 numbers. (Pre-RMSNorm and Pre-CRMSNorm
Transformers, arXiv 2305.14858; the orthonormal basis is ours.)
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.errors import UnsupportedModelError
from lnfree_interp.models.construct import copy_weights, hooked_transformer
from lnfree_interp.models.crms import install_crms, is_crms
from lnfree_interp.models.folding import fold_weights, is_reader, writes_to_stream
from lnfree_interp.models.forms import weights_around_norms
from lnfree_interp.models.running import require_hooked
from lnfree_interp.models.sites import has_norm_sites, live_sites, norm_at, sites_of
from lnfree_interp.numerics import ROUNDING
from lnfree_interp.variants.variant import Variant, kept

Basis = Literal["orthonormal", "drop"]

_Narrowing = Callable[[Tensor], Tensor]


def to_rms(model: HookedTransformer) -> Variant:
    """LayerNorms turned into RMSNorms, exactly: a stock model of type `"RMSPre"`.

    Gains and biases are folded into the weights that read them, what writes to the stream is
    centred, and epsilon stays. The stream loses its mean, which nothing read.

    Args:
        model: Stock, with live LayerNorms before each sublayer.

    Returns:
        A `Variant` of the same function; its `.error` is measured on random tokens.

    Raises:
        UnsupportedModelError: for norms after the sublayers or the embedding, or other than
            LayerNorm.
        InexactError: if the logits differ by more than rounding explains.

    Source:
        arXiv 2305.14858

    Examples:
        >>> conversion = lf.to_rms(model)
        >>> conversion.model.cfg.normalization_type
        'RMSPre'
    """
    require_hooked(model)
    if has_norm_sites(model):
        raise UnsupportedModelError(
            "a model with norm sites cannot be converted: convert the stock model, then call "
            "with_norm_sites"
        )
    cfg = model.cfg
    after = cfg.use_normalization_before_and_after or cfg.post_embedding_ln
    if cfg.normalization_type != "LN" or cfg.final_rms or after or cfg.use_qk_norm:
        raise UnsupportedModelError(
            "only a model with LayerNorms before its sublayers can be converted to RMSNorm, not "
            f"normalization_type={cfg.normalization_type!r}"
            + (" with norms after the sublayers or the embedding" if after else "")
        )
    # Gain and bias alone: the norm that stays centres and divides.
    norms = {
        str(site): replace(norm_at(model, site), centred=False, statistic=None, scale=1.0)
        for site in sites_of(cfg)
    }
    folded = dict(fold_weights(weights_around_norms(model), norms, form="folded"))
    centred = {name: _centred(W) if writes_to_stream(name) else W for name, W in folded.items()}
    rms = replace(cfg, normalization_type="RMSPre", final_rms=True, tie_word_embeddings=False)
    converted = hooked_transformer(rms, centred, model.tokenizer)
    steps = (
        "folded the gains and biases of LayerNorm into the weights that read them",
        "centred the weights that write to the residual stream",
        f"RMSNorm in place of LayerNorm, epsilon {cfg.eps:g} as before",
    )
    return kept("Pre-RMSNorm", model, converted, steps)


def to_crms(model: HookedTransformer, basis: Basis = "orthonormal") -> Variant:
    """A zero-mean residual stream kept in d_model - 1 dimensions, exactly.

    Args:
        model: With LayerNorms (converted by `to_rms` first), or what `to_rms` gives.
        basis: `"orthonormal"`: coordinates in an orthonormal basis of the zero-mean vectors, an
            isometry; the result is a stock model of type `"RMSPre"`, with epsilon and readers
            scaled for the one dimension less. `"drop"`: the last coordinate is left out, and
            `CRMSNormPre` restores its square.

    Returns:
        A `Variant`, of a model with d_model - 1 numbers in the residual stream.

    Raises:
        UnsupportedModelError: if gains are not folded, the stream is not zero-mean, as in models
            that were trained with RMSNorm, or there is no such basis; for norms after the
            sublayers or the embedding.
        InexactError: if the logits differ by more than rounding explains.

    Source:
        arXiv 2305.14858, whose CRMSNorm is `"drop"`; the orthonormal basis is ours: it needs no
        norm of its own.

    Examples:
        >>> conversion = lf.to_crms(model)
        >>> conversion.d_model
        (192, 191)
    """
    require_hooked(model)
    if basis not in get_args(Basis):
        raise UnsupportedModelError(
            f"basis={basis!r} does not exist: pass {' or '.join(map(repr, get_args(Basis)))}"
        )
    steps: tuple[str, ...] = ()
    original = model
    if model.cfg.normalization_type == "LN":
        first = to_rms(model)
        model, steps = first.model, first.steps
    _require_zero_mean_stream(model)
    cfg = model.cfg
    d = cfg.d_model
    if d < 2:
        raise UnsupportedModelError(
            "d_model=1: CRMSNorm leaves out one dimension, so the residual stream needs at least 2"
        )
    writer, reader = _orthonormal(d) if basis == "orthonormal" else _dropping()
    weights: dict[str, Tensor] = {}
    for name, W in model.named_parameters():
        W64 = W.detach().double()
        if writes_to_stream(name):
            weights[name] = writer(W64).to(W.dtype)
        elif is_reader(name):
            weights[name] = reader(W64.transpose(-1, -2)).transpose(-1, -2).to(W.dtype)
        else:
            weights[name] = W.detach()
    if basis == "orthonormal":
        narrow = replace(cfg, d_model=d - 1, eps=cfg.eps * d / (d - 1))
        converted = hooked_transformer(narrow, weights, model.tokenizer)
        steps += (f"stream in an orthonormal basis of the {d - 1} zero-mean dimensions",)
    else:
        converted = hooked_transformer(
            replace(cfg, d_model=d - 1), {}, model.tokenizer, complete=False
        )
        install_crms(converted)
        copy_weights(converted, weights)
        converted.eval()
        steps += ("dropped the last coordinate, CRMSNorm restores its square",)
    return kept("Pre-CRMSNorm", original, converted, steps)


def _require_zero_mean_stream(model: HookedTransformer) -> None:
    if model.cfg.normalization_type != "RMSPre" or is_crms(model) or live_sites(model) == ():
        raise UnsupportedModelError(
            "CRMSNorm needs RMSNorms with folded gains (to_rms of a LayerNorm model), not "
            f"normalization_type={model.cfg.normalization_type!r}"
        )
    for name, W in model.named_parameters():
        if writes_to_stream(name) and W.numel():
            tolerance = ROUNDING[W.dtype] * W.abs().max()
            if W.double().mean(-1).abs().max() > tolerance:
                raise UnsupportedModelError(
                    f"{name} writes a mean into the residual stream, and CRMSNorm needs a stream "
                    "of zero mean, as models converted from LayerNorm have"
                )


def _centred(W: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    W64 = W.double()
    return (W64 - W64.mean(-1, keepdim=True)).to(W.dtype)


def _orthonormal(d: int) -> tuple[_Narrowing, _Narrowing]:
    """What takes writers and (transposed) readers, [..., d], to d - 1 dimensions.

    The basis is that of the Householder reflection that takes the last axis to 1 / sqrt(d).
    """

    def reflect(W: Tensor) -> Tensor:
        v = torch.full((d,), -(d**-0.5), dtype=W.dtype, device=W.device)
        v[-1] += 1
        return (W - 2 / (v @ v) * (W @ v)[..., None] * v)[..., :-1]

    # x / sqrt(|x|^2 / d + eps) is RMSNorm over d - 1 entries times sqrt(d / (d - 1)).
    return reflect, lambda W: reflect(W) * (d / (d - 1)) ** 0.5


def _dropping() -> tuple[_Narrowing, _Narrowing]:
    """What takes writers and (transposed) readers, [..., d], to d - 1 dimensions.

    The last coordinate of writers is left out, that of readers is subtracted from the others.
    """
    return (lambda W: W[..., :-1]), (lambda W: W[..., :-1] - W[..., -1:])
