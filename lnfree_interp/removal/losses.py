"""What the fine-tuning minimises: a sum of named terms, each with a weight.

    (1 - d) cross_entropy + d distillation + a scale_anchor + the recipe's further `losses`

A new term is a function of a `ForwardPass` and a line in `TERMS`; a recipe gives it a weight.
Cross-entropy and distillation are computed together, because both need the logits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens import HookedTransformer

from lnfree_interp.errors import RecipeError
from lnfree_interp.models.integer_mode import IntegerArithmetic
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.running import watched
from lnfree_interp.models.sites import get_norm, list_norm_sites, norm_at
from lnfree_interp.numerics import soft_cap, wide
from lnfree_interp.removal.chunked_loss import LazyLogits, logits_loss
from lnfree_interp.removal.statistics import TokenGroups, find_outliers


@dataclass(frozen=True)
class ForwardPass:
    """What a term of the loss may read of one forward pass in training."""

    model: HookedTransformer
    """The model in training, with norm sites."""
    tokens: Int[Tensor, "batch pos"]
    """The text."""
    streams: Sequence[Float[Tensor, "batch pos d_model"]]
    """The residual stream behind each block; the last is the final one, which ln_final reads. It is
    the only one if the recipe has no further `losses`."""
    original_streams: Sequence[Float[Tensor, "batch pos d_model"]] | None
    """The original model's, if the recipe distils at this step."""
    ordinary: Bool[Tensor, "batch pos"]
    """False at position 0 and at end-of-text tokens."""
    inputs: Mapping[str, Float[Tensor, "batch pos *head d"]] = field(default_factory=dict)
    """What each norm site reads, by its name, if the recipe weighs `scales`."""
    first_apart: bool = False
    """Whether first tokens keep a constant of their own."""
    anchor_target: float | None = None
    """The scale to which `scale_anchor` holds the stream, if it is fixed."""

    @property
    def resid(self) -> Float[Tensor, "batch pos d_model"]:
        """The final residual stream."""
        return self.streams[-1]

    @property
    def original_resid(self) -> Float[Tensor, "batch pos d_model"] | None:
        """The original model's."""
        return None if self.original_streams is None else self.original_streams[-1]


Term = Callable[[ForwardPass], Float[Tensor, ""]]
"""A term of the loss: one number, with a gradient."""


def distillation_loss(
    logits: Float[Tensor, "batch pos d_vocab"], original: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, ""]:
    """KL divergence of the model's next-token distribution from the original's, nats per token.

    The mean over the positions that have a next token. (Hinton et al., 1503.02531, at
    temperature 1.)
    """
    ours, theirs = (wide(x[:, :-1].flatten(0, 1)).log_softmax(-1) for x in (logits, original))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def scale_anchor_loss(
    resid: Float[Tensor, "batch pos d_model"],
    ordinary: Bool[Tensor, "batch pos"],
    target: float | None = None,
    centred: bool = True,
) -> Float[Tensor, ""]:
    """Mean squared distance of the tokens' standard deviations from a common target.

    While the final norm is live, cross-entropy does not depend on the scale of the residual stream.
    This term holds the scale together before and after that norm is frozen. The target has no
    gradient. Special tokens do not count in the target, but are pulled to it. (2507.02559, whose
    epsilon inside the root is kept.)

    Args:
        resid: Input of ln_final.
        ordinary: False at position 0 and at end-of-text tokens.
        target: The target. Default: the mean of the batch (2507.02559); 2602.10408 fixes it.
        centred: Standard deviation; False: root mean square, for a model with RMSNorms.
    """
    resid = wide(resid)
    squares = resid.var(-1, correction=0) if centred else resid.pow(2).mean(-1)
    sigma = (squares + 1e-5).sqrt()
    if target is None:
        weights = ordinary.to(sigma.dtype)
        count = weights.sum()
        mean = (sigma.detach() * weights).sum() / count.clamp(min=1)
        aim = torch.where(count > 0, mean, sigma.detach().mean())
    else:
        aim = sigma.new_tensor(target)
    return (sigma - aim).pow(2).mean()


def scale_anchor(seen: ForwardPass) -> Float[Tensor, ""]:
    """`scale_anchor_loss` of the final residual stream."""
    centred = norm_at(seen.model, "ln_final").centred
    return scale_anchor_loss(seen.resid, seen.ordinary, seen.anchor_target, centred)


def stream_distance(seen: ForwardPass) -> Float[Tensor, ""]:
    """How far the residual stream is from the original's: squared distance over the original's
    square, its mean over blocks and tokens but the first; plus, for first tokens, the squared
    distance of the two directions, its mean over blocks.

    First tokens count for themselves, because all heads with nothing to do look at them. Their
    scale does not: in many models it is massive, and a norm reads the direction alone. Other tokens
    that are outliers in the original's stream do not count.
    """
    assert seen.original_streams is not None  # a recipe with this term always distils
    found = []
    for ours, theirs in zip(seen.streams, seen.original_streams, strict=True):
        square = wide(theirs).pow(2).sum(-1)
        far = find_outliers(square.sqrt(), seen.ordinary)
        apart = (wide(ours) - theirs).pow(2).sum(-1) / square.clamp(min=1e-12)
        cosine = torch.cosine_similarity(wide(ours[:, 0]), wide(theirs[:, 0]), -1)
        found.append(apart[:, 1:][~far[:, 1:]].mean() + (2 - 2 * cosine).mean())
    return torch.stack(found).mean()


def site_scales(seen: ForwardPass) -> Float[Tensor, ""]:
    """How far tokens are from what a norm site divides by: with  q = log(scale / sigma)^2,  the
    mean over sites and tokens but the first of  q (1 + `TAIL` min(q, 1)),  plus `FIRST` times that
    over first tokens, unless they keep a constant of their own.

    The scale is what a live norm there divides by, sigma the site's constant; at a live site, the
    median scale. Where all tokens are near the constant, a norm does nothing that the constant does
    not do.
    """
    found = []
    for name, x in seen.inputs.items():
        norm = get_norm(seen.model, name)
        scale = norm.token_sigma(x)
        sigma = scale[:, 1:].detach().median() if norm.live else norm.constant
        q = (scale / sigma).log().pow(2)
        q = q * (1 + TAIL * q.clamp(max=1))
        apart = seen.first_apart or norm.first is not None
        first = 0.0 if apart else FIRST * q[:, 0].mean()
        found.append(q[:, 1:].mean() + first)
    return torch.stack(found).mean()


TAIL = 10.0
"""How much more a token counts whose scale is e times the constant, in the term `scales`."""
FIRST = 1 / 32
"""The weight of first tokens there, beside the mean over the others."""

_FINAL = {"cross_entropy", "distillation", "scale_anchor"}
"""The terms that read the final stream alone."""

TERMS: dict[str, Term] = {
    "scale_anchor": scale_anchor,
    "stream": stream_distance,
    "scales": site_scales,
}
"""The terms of the loss by name, beside `cross_entropy` and `distillation`."""


def require_terms(names: Iterable[str]) -> None:
    """Refuse a name that is not in `TERMS`.

    Raises:
        RecipeError: if there is one.
    """
    for name in names:
        if name not in TERMS:
            raise RecipeError(
                f"no loss term {name!r}; there are {', '.join(TERMS)}. Add a function to "
                "lnfree_interp.removal.losses.TERMS to have another one"
            )


@dataclass(frozen=True)
class Losses:
    """The loss of some sequences."""

    total: Float[Tensor, ""]
    """The weighted sum, which is minimised."""
    terms: Mapping[str, Float[Tensor, ""]]
    """Each term by name, before its weight and without gradient."""


class Objective(nn.Module):
    """From tokens to the loss: the forward pass of the model with its hooks, and the terms.

    It is one module, so that what wraps it (DDP, FSDP) sees every use of a parameter.
    """

    def __init__(
        self,
        model: HookedTransformer,
        original: HookedTransformer | None,
        dtype: torch.dtype,
        groups: TokenGroups,
        first_apart: bool = False,
        bits: int | None = None,
    ):
        """An objective; each forward pass is given the weights.

        Args:
            model: The model in training, with norm sites.
            original: The model to distil from; it is not trained and not part of this module.
            dtype: The dtype of the matrix products.
            groups: Knows ordinary from special tokens.
            first_apart: Whether first tokens keep a constant of their own.
            bits: The width of the integers of which the model's products are; None: of `dtype`. The
                original's are never.

        Raises:
            UnsupportedModelError: if the model's products cannot be of integers.
        """
        super().__init__()
        self.model, self.dtype, self.groups = model, dtype, groups
        self.first_apart = first_apart
        self.integers = None if bits is None else IntegerArithmetic(model, bits)
        self._original = (original,)  # in a tuple, so that its parameters are not ours
        self.anchor_target: float | None = None
        biases = [one.unembed.b_U for one in (model, original) if one is not None]
        self._biased = any(b_U.requires_grad or bool(b_U.any()) for b_U in biases)

    @property
    def original(self) -> HookedTransformer | None:
        """The model to distil from."""
        return self._original[0]

    def forward(
        self, tokens: Int[Tensor, "batch pos"], weights: Mapping[str, float] | None
    ) -> Losses | None:
        """The loss of some sequences.

        Args:
            tokens: [batch, pos].
            weights: The weight of each term to compute. `distillation` is a share: cross-entropy
                has the rest. None: only run the model, for the hooks on its norm sites.
        """
        self.groups.mark(tokens)
        if weights is None:
            self.model(tokens, return_type=None)
            return None
        share = weights.get("distillation", 0.0)
        every = bool(weights.keys() - _FINAL)
        sites = list_norm_sites(self.model) if "scales" in weights else ()
        before_the_last = [f"{site}.hook_in" for site in sites if site.layer is not None]
        with watched(self.model, before_the_last) as found:
            streams = self._streams(self.model, tokens, every)
        inputs = {name.removesuffix(".hook_in"): x for name, x in found.items()}
        inputs |= {str(site): streams[-1] for site in sites if site.layer is None}
        original = self.original if share else None
        with torch.no_grad():
            taught = None if original is None else self._streams(original, tokens, every)
        final = None if taught is None else taught[-1]
        total, ce, kl = self._logits_loss(streams[-1], final, tokens, share)
        values = {"cross_entropy": ce.detach()}
        if "distillation" in weights:
            values["distillation"] = kl.detach()
        ordinary = self.groups.of["ordinary"]
        seen = ForwardPass(
            self.model, tokens, streams, taught, ordinary, inputs, self.first_apart,
            self.anchor_target,
        )  # fmt: skip
        for name, weight in weights.items():
            if name in values:
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
                value = TERMS[name](seen)
            if weight:
                total = total + weight * value
            values[name] = value.detach()
        return Losses(total, values)

    def _streams(self, model: HookedTransformer, tokens: Tensor, every: bool) -> list[Tensor]:
        """The residual stream behind each block, or behind the last alone."""
        inner = range(model.cfg.n_layers - 1 if every else 0)
        names = [f"blocks.{layer}.hook_resid_post" for layer in inner]
        with self._autocast(), self._in_integers(model), watched(model, names) as found:
            final = model(tokens, stop_at_layer=model.cfg.n_layers)
        return [*(found[name] for name in names), final]

    def _autocast(self) -> torch.autocast:
        device = self.model.W_E.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _in_integers(self, model: HookedTransformer) -> AbstractContextManager[object]:
        """A context for the model in training, if its products are of integers."""
        if self.integers is None or model is not self.model:
            return nullcontext()
        return self.integers

    def _logits_loss(
        self, resid: Tensor, taught: Tensor | None, tokens: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        model, original = self.model, self.original
        with self._autocast():
            with self._in_integers(model):
                normalised = model.ln_final(resid)
            capped = any(one is not None and _cap(one) > 0 for one in (model, original))
            if capped or model.unembed.hook_out.has_hooks():
                return self._from_all_logits(normalised, taught, tokens, share)
            theirs = None
            if taught is not None and original is not None:
                with torch.no_grad():
                    theirs = self._lazy_logits(original.ln_final(taught), original)
        ours = self._lazy_logits(model.unembed.hook_in(normalised), model)
        targets = tokens[:, 1:].flatten()
        return logits_loss(
            ours, targets, original=theirs, share=share, dtype=self.dtype, integers=self.integers
        )

    def _lazy_logits(self, h: Tensor, model: HookedTransformer) -> LazyLogits:
        """At the positions that have a next token."""
        b_U = model.unembed.b_U if self._biased else None
        return LazyLogits(h[:, :-1].flatten(0, 1), model.unembed.W_U.T, b_U)

    def _from_all_logits(
        self, normalised: Tensor, taught: Tensor | None, tokens: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With all logits in memory: a hook reads them, or they are capped."""
        with self._in_integers(self.model):
            logits = soft_cap(self.model.unembed(normalised), _cap(self.model))
        ce = next_token_loss(logits, tokens)
        if taught is None or self.original is None:
            return ce, ce, torch.zeros_like(ce)
        with torch.no_grad():
            theirs = self.original.unembed(self.original.ln_final(taught))
            theirs = soft_cap(theirs, _cap(self.original))
        kl = distillation_loss(logits, theirs)
        return torch.lerp(ce, kl, share), ce, kl


def _cap(model: HookedTransformer) -> float:
    """What its logits are capped at; 0 or less for none."""
    return model.cfg.output_logits_soft_cap
