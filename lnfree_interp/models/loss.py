"""Next-token loss, the same in training and evaluation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lnfree_interp.numerics import wide


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    reduction: str = "mean",
) -> Float[Tensor, "*targets"]:
    """Cross-entropy of the next token, in nats, in float32 at least.

    End-of-text targets count like any other. With `reduction="none"`: one value per target,
    [batch * (pos - 1)].
    """
    return F.cross_entropy(
        wide(logits[:, :-1].flatten(0, 1)), tokens[:, 1:].flatten(), reduction=reduction
    )


def loss_of(
    log_p: Float[Tensor, "*token d_vocab"], targets: Int[Tensor, "*token"]
) -> Float[Tensor, "*token"]:
    """Cross-entropy of each target, in nats, from log-probabilities."""
    return -log_p.gather(-1, targets[..., None])[..., 0]


def entropy_of(log_p: Float[Tensor, "*token d_vocab"]) -> Float[Tensor, "*token"]:
    """Entropy of each prediction, in nats."""
    return torch.special.entr(log_p.exp()).sum(-1)
