"""What the fine-tuning minimises: cross-entropy, distillation, and an anchor for the scale.

    loss = (1 - d) CE(next token) + d KL(original || model) + a A

The first two need the logits, [tokens, d_vocab], by far the largest activation of a small model.
`logits_loss` never holds them: it walks through the tokens in chunks and computes the gradient in
the same pass, since that of cross-entropy and KL is only  p - (1 - d) onehot - d p_original.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens import HookedTransformer

from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.removal.statistics import TokenGroups

_CHUNK = {"cpu": 2**22, "cuda": 2**26}
"""Logits held at once."""


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
        b: Tensor,
        targets: Tensor,
        teacher: tuple[Tensor, Tensor, Tensor] | None,
        share: float,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_tokens = len(h)
        low, W_low = h.to(dtype), W.to(dtype)
        if teacher is not None:
            teacher_h, teacher_W, teacher_b = teacher
            teacher_h, teacher_W = teacher_h.to(dtype), teacher_W.to(dtype)
        dh = torch.empty_like(low) if with_gradient else None
        dW = torch.zeros_like(W) if with_gradient else None
        db = torch.zeros_like(b) if with_gradient else None
        ce, kl = h.new_zeros((), dtype=torch.float64), h.new_zeros((), dtype=torch.float64)
        rows = max(1, _CHUNK.get(h.device.type, 2**22) // len(W))
        for part in (slice(i, i + rows) for i in range(0, n_tokens, rows)):
            target = targets[part, None]
            logits = _logits(low[part], W_low, b)
            log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
            ce -= log_p.gather(-1, target).sum().double()
            p = log_p.exp() if teacher is not None else log_p.exp_()
            if teacher is not None:
                log_q = _logits(teacher_h[part], teacher_W, teacher_b)
                log_q.sub_(log_q.logsumexp(-1, keepdim=True))
                q = log_q.exp()
                kl += (q * log_q.sub_(log_p)).sum().double()
                if with_gradient:
                    p.sub_(q, alpha=share)
            if with_gradient:
                p.scatter_add_(-1, target, p.new_full((), share - 1).expand(target.shape))
                p.div_(n_tokens)
                db += p.sum(0)
                p = p.to(dtype)
                torch.mm(p, W_low, out=dh[part])
                if dtype == W.dtype:
                    dW.addmm_(p.T, low[part])
                else:
                    dW += p.T @ low[part]
        ctx.gradients = (dh, dW, db)
        ce, kl = (x.to(h.dtype) / n_tokens for x in (ce, kl))
        return torch.lerp(ce, kl, share), ce, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # In place: they are as large as the weights, and nobody else has them.
        ours, ctx.gradients = ctx.gradients, None
        dh, dW, db = (gradient.mul_(gradients[0]) for gradient in ours)
        return dh, dW, db, None, None, None, None, None


def _logits(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """In float32 (float64 for double), whatever the product was taken in."""
    logits = h @ W.T
    return (logits if logits.dtype == torch.float64 else logits.float()) + b


def logits_loss(
    h: Float[Tensor, "tokens d_model"],
    W: Float[Tensor, "d_vocab d_model"],
    b: Float[Tensor, " d_vocab"],
    targets: Int[Tensor, " tokens"],
    *,
    teacher: tuple[Tensor, Tensor, Tensor] | None = None,
    share: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy and KL divergence of logits h W^T + b that are never all there at once.

    Args:
        h: What the unembedding reads.
        W: The unembedding, transposed.
        b: Its bias.
        targets: The next tokens.
        teacher: h, W and b of the original.
        share: Weight of the KL divergence; cross-entropy has the rest.
        dtype: Of the matrix products; the softmax is float32 at least.

    Returns:
        The weighted sum, which has a gradient; cross-entropy; KL divergence (0 without teacher).
        In nats per token.
    """
    with torch.autocast(h.device.type, enabled=False):
        return _LogitsLoss.apply(
            h, W, b, targets, teacher, share, dtype, torch.is_grad_enabled()
        )  # fmt: skip


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

    @property
    def teacher(self) -> HookedTransformer | None:
        """The original."""
        return self._teacher[0]

    def forward(
        self, tokens: Int[Tensor, "batch pos"], distillation: float, anchor: float
    ) -> Losses:
        """The loss of some blocks.

        Args:
            tokens: [batch, pos].
            distillation: Share of the KL divergence.
            anchor: Weight of the scale anchor.
        """
        self.groups.mark(tokens)
        resid = self._residual(self.model, tokens)
        teacher = self.teacher if distillation else None
        with torch.no_grad():
            taught = None if teacher is None else self._residual(teacher, tokens)
        total, ce, kl = self._logits_loss(resid, taught, tokens, distillation)
        anchored = scale_anchor_loss(
            resid if anchor else resid.detach(),
            self.groups.of["ordinary"],
            self.anchor_target,
            cast(bool, self.model.ln_final.centred),
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
                    theirs = _reader(teacher.ln_final(taught), teacher)
        h, W, b = _reader(model.unembed.hook_in(normalised), model)
        targets = tokens[:, 1:].flatten()
        return logits_loss(h, W, b, targets, teacher=theirs, share=distillation, dtype=self.dtype)

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


def _reader(h: Tensor, model: HookedTransformer) -> tuple[Tensor, Tensor, Tensor]:
    """What is read at the positions that have a next token, by which weight and bias."""
    return h[:, :-1].flatten(0, 1), model.unembed.W_U.T, model.unembed.b_U


def _capped(model: HookedTransformer, logits: Tensor) -> Tensor:
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products are native there; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False
