"""Exact conversions between norms: LayerNorm to RMSNorm, RMSNorm to CRMSNorm.

No LayerNorm ever sees the mean of the residual stream. So the weights that write to the stream can
be centred, after which its mean is zero, and LayerNorm without gain and bias is RMSNorm. And a
zero-mean stream in d dimensions needs only d - 1 numbers. (Pre-RMSNorm and Pre-CRMSNorm
Transformers, arXiv 2305.14858; the orthonormal basis is ours.)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.components import LayerNorm, RMSNormPre
from transformer_lens.hook_points import HookPoint

from lnfree_interp.errors import UnsupportedModelError
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.construct import copy_weights, hooked_transformer
from lnfree_interp.models.folding import ConstantNorm, fold_weights
from lnfree_interp.models.sites import has_norm_sites
from lnfree_interp.numerics import ROUNDING, MeasuredError

Basis = Literal["orthonormal", "drop"]

_WRITERS = ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out")
_READERS = ("W_Q", "W_K", "W_V", "W_in", "W_gate", "W_U")

_Narrowing = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NormConversion:
    """A converted model and what was done to it."""

    model: HookedTransformer
    """The converted one; the given model is as it was."""
    steps: tuple[str, ...]
    """What was done, in order."""
    error: MeasuredError
    """The largest logit difference from the model before."""
    d_model: tuple[int, int]
    """Width of the residual stream, before and after."""
    parameters: tuple[int, int]
    """Number of parameters, before and after."""

    def __str__(self) -> str:
        lines = [
            *self.steps,
            f"d_model {self.d_model[0]} -> {self.d_model[1]}",
            f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,}",
            f"largest logit difference: {self.error}",
        ]
        return "\n".join(lines)


class CRMSNormPre(nn.Module):
    """RMSNorm of a zero-mean vector of which the last entry is left out.

    x in d - 1 dimensions stands for (x, -sum(x)) in d: x / sqrt((sum x^2 + (sum x)^2) / d + eps).
    """

    def __init__(self, d: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.d = d
        self.eps = eps
        self.dtype = dtype
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        """As `RMSNormPre.forward`, over the vector that x stands for."""
        x = x if x.dtype == torch.float64 else x.float()
        square = x.pow(2).sum(-1, keepdim=True) + x.sum(-1, keepdim=True).pow(2)
        scale = self.hook_scale((square / self.d + self.eps).sqrt())
        return self.hook_normalized(x / scale).to(self.dtype)


def install_crms(model: HookedTransformer) -> None:
    """Put a `CRMSNormPre` of width d_model + 1 wherever the model has an `RMSNormPre`."""
    cfg = model.cfg
    for name, module in list(model.named_modules()):
        if isinstance(module, RMSNormPre):
            model.set_submodule(name, CRMSNormPre(cfg.d_model + 1, cfg.eps, cfg.dtype))
    model.setup()


def to_rms(model: HookedTransformer) -> NormConversion:
    """LayerNorms turned into RMSNorms, exactly: a stock model of type `"RMSPre"`.

    Gains and biases are folded into the weights that read them, what writes to the stream is
    centred, and epsilon stays. The stream loses its mean, which nothing read.

    Args:
        model: Stock, with live LayerNorms before each sublayer.

    Returns:
        A `NormConversion`; its `.error` is measured on random tokens.

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
    if has_norm_sites(model):
        raise UnsupportedModelError("convert the stock model, before with_norm_sites")
    cfg = model.cfg
    after = cfg.use_normalization_before_and_after or cfg.post_embedding_ln
    if cfg.normalization_type != "LN" or cfg.final_rms or after or cfg.use_qk_norm:
        raise UnsupportedModelError(
            "only a model with LayerNorms before its sublayers can be converted to RMSNorm, not "
            f"normalization_type={cfg.normalization_type!r}"
            + (" with norms after the sublayers or the embedding" if after else "")
        )
    norms = {
        name: ConstantNorm(norm.w.detach(), norm.b.detach(), 1.0)
        for name, norm in model.named_modules()
        if isinstance(norm, LayerNorm)
    }
    weights = {name: W.detach() for name, W in model.named_parameters() if name[:-2] not in norms}
    folded = dict(fold_weights(weights, norms, centred=False, form="folded"))
    centred = {name: _centred(W) if writes_to_stream(name) else W for name, W in folded.items()}
    rms = replace(cfg, normalization_type="RMSPre", final_rms=True, tie_word_embeddings=False)
    converted = hooked_transformer(rms, centred, model.tokenizer)
    steps = (
        "folded the gains and biases of LayerNorm into the weights that read them",
        "centred the weights that write to the residual stream",
        f"RMSNorm in place of LayerNorm, epsilon {cfg.eps:g} as before",
    )
    return _measured(model, converted, steps, "RMSNorm against LayerNorm")


def to_crms(model: HookedTransformer, basis: Basis = "orthonormal") -> NormConversion:
    """A zero-mean residual stream kept in d_model - 1 dimensions, exactly.

    Args:
        model: With LayerNorms (converted by `to_rms` first), or what `to_rms` gives.
        basis: `"orthonormal"`: coordinates in an orthonormal basis of the zero-mean vectors, an
            isometry; the result is a stock model of type `"RMSPre"`, with epsilon and readers
            scaled for the one dimension less. `"drop"`: the last coordinate is left out, and
            `CRMSNormPre` restores its square.

    Returns:
        A `NormConversion`, of a model with d_model - 1 numbers in the residual stream.

    Raises:
        UnsupportedModelError: if gains are not folded, the stream is not zero-mean, as in models
            that were trained with RMSNorm, or there is no such basis; and as `to_rms`.
        InexactError: as `to_rms`.

    Source:
        arXiv 2305.14858, whose CRMSNorm is `"drop"`; the orthonormal basis is ours: it needs no
        norm of its own.

    Examples:
        >>> conversion = lf.to_crms(model)
        >>> conversion.d_model
        (192, 191)
    """
    if basis not in get_args(Basis):
        raise UnsupportedModelError(f"basis {basis!r} is none of {get_args(Basis)}")
    steps: tuple[str, ...] = ()
    original = model
    if model.cfg.normalization_type == "LN":
        first = to_rms(model)
        model, steps = first.model, first.steps
    _require_zero_mean_stream(model)
    cfg = model.cfg
    d = cfg.d_model
    if d < 2:
        raise UnsupportedModelError("a residual stream of one dimension has none to spare")
    writer, reader = _orthonormal(d) if basis == "orthonormal" else _dropping()
    weights: dict[str, Tensor] = {}
    for name, W in model.named_parameters():
        W64 = W.detach().double()
        if writes_to_stream(name):
            weights[name] = writer(W64).to(W.dtype)
        elif reads_stream(name):
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
    return _measured(original, converted, steps, "CRMSNorm against the model before")


def _require_zero_mean_stream(model: HookedTransformer) -> None:
    if model.cfg.normalization_type != "RMSPre" or any(
        not isinstance(norm, RMSNormPre) for name, norm in model.named_modules() if _is_norm(name)
    ):
        raise UnsupportedModelError(
            "CRMSNorm needs RMSNorms with folded gains (to_rms of a LayerNorm model), not "
            f"normalization_type={model.cfg.normalization_type!r}"
        )
    for name, W in model.named_parameters():
        if writes_to_stream(name) and W.numel():
            tolerance = ROUNDING[W.dtype] * W.abs().max()
            if W.double().mean(-1).abs().max() > tolerance:
                raise UnsupportedModelError(
                    f"{name} writes a mean into the residual stream, which CRMSNorm has no room "
                    "for: only models converted from LayerNorm have a zero-mean stream"
                )


def _measured(
    before: HookedTransformer, after: HookedTransformer, steps: tuple[str, ...], what: str
) -> NormConversion:
    error = compare_logits(after, before).require(what)
    widths = (before.cfg.d_model, after.cfg.d_model)
    return NormConversion(after, steps, error, widths, (_count(before), _count(after)))


def _count(model: HookedTransformer) -> int:
    return sum(W.numel() for W in model.parameters())


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].lstrip("_")


def writes_to_stream(name: str) -> bool:
    """Whether a parameter writes to the residual stream, by its name."""
    return _leaf(name) in _WRITERS


def reads_stream(name: str) -> bool:
    """Whether a parameter reads the residual stream, by its name."""
    return _leaf(name) in _READERS


def _is_norm(name: str) -> bool:
    return name.rpartition(".")[2] in ("ln1", "ln2", "ln_final")


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
    """As `_orthonormal`: the last coordinate of writers left out, of readers subtracted."""
    return (lambda W: W[..., :-1]), (lambda W: W[..., :-1] - W[..., -1:])
