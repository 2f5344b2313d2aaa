"""What the fine-tuning minimises: cross-entropy, distillation, and an anchor for the scale.

    loss = (1 - d) CE(next token) + d KL(original || model) + a A

The first two need the logits, [tokens, d_vocab], by far the largest activation of a small model.
`logits_loss` never holds them: it walks through the tokens in chunks and computes the gradient in
the same pass, since that of cross-entropy and KL is only  p - (1 - d) onehot - d p_original.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformer_lens import HookedTransformer

from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.sites import norm_at
from lnfree_interp.removal.statistics import TokenGroups


@dataclass(frozen=True)
class Reading:
    """Logits h W^T + b that are not computed yet."""

    h: Float[Tensor, "tokens d_model"]
    """What the unembedding reads."""
    W: Float[Tensor, "d_vocab d_model"]
    """The unembedding, transposed."""
    b: Float[Tensor, " d_vocab"] | None = None
    """Its bias; None for none."""

    def logits(self, tokens: slice) -> Float[Tensor, "_ d_vocab"]:
        """Of some of the tokens."""
        logits = self.h[tokens] @ self.W.T
        return logits if self.b is None else logits + self.b


def distillation_loss(
    logits: Float[Tensor, "batch pos d_vocab"], teacher: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, ""]:
    """KL divergence of the model's next-token distribution from the teacher's, in nats per token.

    Over the positions that have a next token, as `next_token_loss`. (Hinton et al., 1503.02531, at
    temperature 1.)
    """
    ours, theirs = (x[:, :-1].flatten(0, 1).float().log_softmax(-1) for x in (logits, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def scale_anchor_loss(
    resid: Float[Tensor, "batch pos d_model"],
    ordinary: Bool[Tensor, "batch pos"],
    target: float | None = None,
    centred: bool = True,
) -> Float[Tensor, ""]:
    """Mean squared distance of each token's standard deviation from the ordinary one.

    Applied to the input of ln_final. A live final norm makes the loss blind to the stream's scale;
    this keeps the scale together before and after that norm goes. The target carries no gradient
    and leaves out special tokens, which are thereby pulled to the rest (2507.02559, whose epsilon
    inside the root is kept).

    Args:
        resid: Input of ln_final.
        ordinary: False at position 0 and at end-of-text tokens.
        target: The ordinary standard deviation. Default: the batch's mean (2507.02559); a fixed
            one is 2602.10408's.
        centred: Standard deviation, or root mean square for a model with RMSNorms.
    """
    resid = resid.float()
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


class _LogitsLoss(torch.autograd.Function):
    """Cross-entropy and KL of one linear map's logits, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        W: Tensor,
        b: Tensor | None,
        targets: Tensor,
        teacher: Reading | None,
        share: float,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        reading = Reading(h.to(dtype), W.to(dtype), b)
        if teacher is not None:
            teacher = Reading(teacher.h.to(dtype), teacher.W.to(dtype), teacher.b)
        dh, dW = torch.empty_like(reading.h), torch.zeros_like(W)
        db = None if b is None else torch.zeros_like(b)
        rows = _rows(h.device.type, len(W))
        p_chunk = h.new_empty(min(rows, len(h)), len(W))  # one buffer: fresh pages cost more
        q_chunk = None if teacher is None else torch.empty_like(p_chunk)
        ce, kl = h.new_zeros(2, dtype=torch.float64).unbind()
        for part in (slice(i, i + rows) for i in range(0, len(h), rows)):
            target = targets[part, None]
            logits = reading.logits(part)
            p, log_sum = _softmax(logits, p_chunk)
            ce += (log_sum - logits.gather(-1, target)).double().sum()
            if teacher is not None and q_chunk is not None:
                theirs = teacher.logits(part)
                q, their_log_sum = _softmax(theirs, q_chunk)
                apart = torch.linalg.vecdot(q, theirs.to(q.dtype).sub_(logits))[:, None]
                kl += (apart - their_log_sum + log_sum).double().sum()
                p.sub_(q, alpha=share)
            if with_gradient:
                p.scatter_add_(-1, target, p.new_full((), share - 1).expand(target.shape))
                if db is not None:
                    db += p.sum(0)
                p = p.to(dtype)
                torch.mm(p, reading.W, out=dh[part])
                if dtype == W.dtype:
                    dW.addmm_(p.T, reading.h[part])
                else:
                    dW += p.T @ reading.h[part]
        ctx.gradients, ctx.n_tokens = (dh, dW, db), len(h)
        ce, kl = (x.to(h.dtype) / len(h) for x in (ce, kl))
        total = torch.lerp(ce, kl, share)
        ctx.mark_non_differentiable(ce, kl)
        return total, ce, kl

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        # In place: they are as large as the weights, and nobody else has them.
        ours, ctx.gradients = ctx.gradients, None
        scale = grad_outputs[0] / ctx.n_tokens
        dh, dW, db = (None if gradient is None else gradient.mul_(scale) for gradient in ours)
        return dh, dW, db, None, None, None, None, None


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, in `out`, and the logarithm of what they were divided by."""
    p = out[: len(logits)].copy_(logits)
    largest = p.amax(-1, keepdim=True)
    total = p.sub_(largest).exp_().sum(-1, keepdim=True)
    return p.div_(total), largest + total.log()


def _rows(device: str, d_vocab: int) -> int:
    """Tokens whose logits are held at once: few enough for a cache, enough for a product."""
    return max(512, (2**26 if device == "cuda" else 2**21) // d_vocab)


def logits_loss(
    reading: Reading,
    targets: Int[Tensor, " tokens"],
    *,
    teacher: Reading | None = None,
    share: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy and KL divergence of logits h W^T + b that are never all there at once.

    Args:
        reading: What the unembedding reads, and the unembedding.
        targets: The next tokens.
        teacher: The original's.
        share: Weight of the KL divergence; cross-entropy has the rest.
        dtype: Of the matrix products; the softmax is float32 at least.

    Returns:
        The weighted sum, which has a gradient; cross-entropy; KL divergence (0 without teacher).
        In nats per token.
    """
    h, W, b = reading.h, reading.W, reading.b
    with torch.autocast(h.device.type, enabled=False):
        return _LogitsLoss.apply(h, W, b, targets, teacher, share, dtype, torch.is_grad_enabled())


@dataclass(frozen=True)
class Losses:
    """The parts of the loss of some blocks, in nats per token but for the anchor."""

    total: Float[Tensor, ""]
    """What to descend."""
    cross_entropy: Float[Tensor, ""]
    distillation: Float[Tensor, ""]
    anchor: Float[Tensor, ""]
    """Before its weight."""


class Objective(nn.Module):
    """From tokens to the loss: the model's forward pass with its hooks, and what follows.

    One module, so that what wraps it (DDP, FSDP) sees every use of a parameter.
    """

    def __init__(
        self,
        model: HookedTransformer,
        teacher: HookedTransformer | None,
        dtype: torch.dtype,
        groups: TokenGroups,
    ):
        """An objective without weights; each forward gets them.

        Args:
            model: With norm sites.
            teacher: The original; not trained, and no part of this module.
            dtype: Of the matrix products.
            groups: Knows ordinary from special tokens.
        """
        super().__init__()
        self.model, self.dtype, self.groups = model, dtype, groups
        self._teacher = (teacher,)  # in a tuple: its parameters are not ours
        self.anchor_target: float | None = None
        self._biased = model.unembed.b_U.requires_grad or bool(model.unembed.b_U.any())

    @property
    def teacher(self) -> HookedTransformer | None:
        """The original."""
        return self._teacher[0]

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        distillation: float,
        anchor: float,
        loss: bool = True,
    ) -> Losses | None:
        """The loss of some blocks.

        Args:
            tokens: [batch, pos].
            distillation: Share of the KL divergence.
            anchor: Weight of the scale anchor.
            loss: False: only pass every norm site, for those who measure there.
        """
        self.groups.mark(tokens)
        if not loss:
            self.model(tokens, return_type=None)
            return None
        resid = self._residual(self.model, tokens)
        teacher = self.teacher if distillation else None
        with torch.no_grad():
            taught = None if teacher is None else self._residual(teacher, tokens)
        total, ce, kl = self._logits_loss(resid, taught, tokens, distillation)
        anchored = scale_anchor_loss(
            resid if anchor else resid.detach(),
            self.groups.of["ordinary"],
            self.anchor_target,
            norm_at(self.model, "ln_final").centred,
        )
        if anchor:
            total = total + anchor * anchored
        return Losses(total, ce.detach(), kl.detach(), anchored.detach())

    def _residual(self, model: HookedTransformer, tokens: Tensor) -> Tensor:
        """The final residual stream, before `ln_final`."""
        with self._autocast():
            return model(tokens, stop_at_layer=model.cfg.n_layers)

    def _autocast(self) -> torch.autocast:
        device = self.model.W_E.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _logits_loss(
        self, resid: Tensor, taught: Tensor | None, tokens: Tensor, distillation: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        model, teacher = self.model, self.teacher
        with self._autocast():
            normalised = model.ln_final(resid)
            if model.unembed.hook_out.has_hooks() or model.cfg.output_logits_soft_cap > 0:
                return self._explicit(normalised, taught, tokens, distillation)
            theirs = None
            if taught is not None and teacher is not None:
                with torch.no_grad():
                    theirs = self._reading(teacher.ln_final(taught), teacher)
        ours = self._reading(model.unembed.hook_in(normalised), model)
        targets = tokens[:, 1:].flatten()
        return logits_loss(ours, targets, teacher=theirs, share=distillation, dtype=self.dtype)

    def _reading(self, h: Tensor, model: HookedTransformer) -> Reading:
        """At the positions that have a next token."""
        b_U = model.unembed.b_U if self._biased else None
        return Reading(h[:, :-1].flatten(0, 1), model.unembed.W_U.T, b_U)

    def _explicit(
        self, normalised: Tensor, taught: Tensor | None, tokens: Tensor, distillation: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With all logits at once: somebody looks at them, or they are capped."""
        logits = _capped(self.model, self.model.unembed(normalised))
        ce = next_token_loss(logits, tokens)
        if taught is None or self.teacher is None:
            return ce, ce, torch.zeros_like(ce)
        with torch.no_grad():
            theirs = _capped(self.teacher, self.teacher.unembed(self.teacher.ln_final(taught)))
        kl = distillation_loss(logits, theirs)
        return torch.lerp(ce, kl, distillation), ce, kl


def _capped(model: HookedTransformer, logits: Tensor) -> Tensor:
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits
