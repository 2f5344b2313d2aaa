"""Cross-entropy and KL divergence of logits that are never all in memory at once.

The logits, [tokens, d_vocab], are by far the largest activation of a small model. `logits_loss`
walks through the tokens in chunks and computes the gradient in the same pass: the gradient of
(1 - d) cross-entropy + d KL with respect to the logits is only  p - (1 - d) onehot - d p_original.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lnfree_interp.models.fixed_point import FixedPoint, fixed_point
from lnfree_interp.models.integer_layers import rounded_gradient
from lnfree_interp.models.integer_mode import IntegerArithmetic


@dataclass(frozen=True)
class LazyLogits:
    """Logits h W^T + b that are not computed yet."""

    h: Float[Tensor, "tokens d_model"]
    """The input of the unembedding."""
    W: Float[Tensor, "d_vocab d_model"]
    """The unembedding, transposed."""
    b: Float[Tensor, " d_vocab"] | None = None
    """Its bias, if it has one."""

    def of(self, tokens: slice) -> Float[Tensor, "_ d_vocab"]:
        """The logits of some of the tokens."""
        logits = self.h[tokens] @ self.W.T
        return logits if self.b is None else logits + self.b

    def add_gradients(
        self, p: Tensor, tokens: slice, dh: Tensor, dW: Tensor, db: Tensor | None
    ) -> None:
        """Put the gradients into `dh`, and add those of the weights, by that of some logits, p."""
        if db is not None:
            db += p.sum(0)
        p = p.to(self.h.dtype)
        torch.mm(p, self.W, out=dh[tokens])
        if self.W.dtype == dW.dtype:
            dW.addmm_(p.T, self.h[tokens])
        else:
            dW += p.T @ self.h[tokens]


@dataclass(frozen=True)
class _IntegerLogits:
    """The same whose three products are of integers (`models.integer_layers`); the gradient of each
    chunk of logits has an exponent of its own."""

    h: FixedPoint
    W: FixedPoint
    b: Tensor | None
    seed: int

    def of(self, tokens: slice) -> Tensor:
        logits = self.h[tokens] @ self.W.T
        return logits if self.b is None else logits.add_(self.b)

    def add_gradients(
        self, p: Tensor, tokens: slice, dh: Tensor, dW: Tensor, db: Tensor | None
    ) -> None:
        rounded = rounded_gradient(p, self.h.bits, self.seed + tokens.start)
        if db is not None:
            db += rounded.sum(0)
        dh[tokens] = rounded @ self.W
        dW += rounded.T @ self.h[tokens]


class _LogitsLoss(torch.autograd.Function):
    """Cross-entropy and KL divergence of one linear map's logits, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        W: Tensor,
        b: Tensor | None,
        targets: Tensor,
        original: LazyLogits | None,
        share: float,
        dtype: torch.dtype,
        with_gradient: bool,
        integers: IntegerArithmetic | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lazy: LazyLogits | _IntegerLogits
        if integers is None:
            lazy = LazyLogits(h.to(dtype), W.to(dtype), b)
        else:
            inputs, weights = (fixed_point(x, integers.bits) for x in (h, W))
            lazy = _IntegerLogits(inputs, weights, b, integers.draws.next())
        if original is not None:
            original = LazyLogits(original.h.to(dtype), original.W.to(dtype), original.b)
        dh, dW = torch.empty_like(h, dtype=dtype), torch.zeros_like(W)
        db = None if b is None else torch.zeros_like(b)
        rows = _rows(h.device.type, len(W))
        # One buffer for all chunks: fresh memory costs more.
        p_chunk = h.new_empty(min(rows, len(h)), len(W))
        q_chunk = None if original is None else torch.empty_like(p_chunk)
        ce, kl = h.new_zeros(2, dtype=torch.float64).unbind()
        for part in (slice(i, i + rows) for i in range(0, len(h), rows)):
            target = targets[part, None]
            logits = lazy.of(part)
            p, log_sum = _softmax(logits, p_chunk)
            ce += (log_sum - logits.gather(-1, target)).double().sum()
            if original is not None and q_chunk is not None:
                theirs = original.of(part)
                q, their_log_sum = _softmax(theirs, q_chunk)
                apart = torch.linalg.vecdot(q, theirs.to(q.dtype).sub_(logits))[:, None]
                kl += (apart - their_log_sum + log_sum).double().sum()
                p.sub_(q, alpha=share)
            if with_gradient:
                p.scatter_add_(-1, target, p.new_full((), share - 1).expand(target.shape))
                lazy.add_gradients(p, part, dh, dW, db)
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
        # In place, because they are as large as the weights and not used again.
        ours, ctx.gradients = ctx.gradients, None
        scale = grad_outputs[0] / ctx.n_tokens
        dh, dW, db = (None if gradient is None else gradient.mul_(scale) for gradient in ours)
        return dh, dW, db, None, None, None, None, None, None


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, written to `out`, and the logarithm of their denominators."""
    p = out[: len(logits)].copy_(logits)
    largest = p.amax(-1, keepdim=True)
    total = p.sub_(largest).exp_().sum(-1, keepdim=True)
    return p.div_(total), largest + total.log()


def _rows(device: str, d_vocab: int) -> int:
    """Tokens per chunk: few enough for the cache, enough for a fast matrix product."""
    return max(512, (2**26 if device == "cuda" else 2**21) // d_vocab)


def logits_loss(
    lazy: LazyLogits,
    targets: Int[Tensor, " tokens"],
    *,
    original: LazyLogits | None = None,
    share: float = 0.0,
    dtype: torch.dtype = torch.float32,
    integers: IntegerArithmetic | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy and KL divergence of logits, and their weighted sum, in nats per token.

    Args:
        lazy: The logits of the model in training.
        targets: The next tokens.
        original: The logits of the original model.
        share: The weight of the KL divergence; cross-entropy has the rest.
        dtype: The dtype of the matrix products; the softmax is float32 at least.
        integers: Computes the products of the model in training in integers instead.

    Returns:
        The weighted sum, which has a gradient; cross-entropy; KL divergence, 0 without an original.
    """
    h, W, b = lazy.h, lazy.W, lazy.b
    with torch.autocast(h.device.type, enabled=False):
        return _LogitsLoss.apply(
            h, W, b, targets, original, share, dtype, torch.is_grad_enabled(), integers
        )
