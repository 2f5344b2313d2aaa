"""What the fine-tuning minimises."""

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    reduction: str = "mean",
) -> Float[Tensor, "*targets"]:
    """Cross-entropy of the next token, in nats, in float32 whatever the logits' dtype.

    End-of-text targets count like any other. With `reduction="none"`: one value per target,
    [batch * (pos - 1)].
    """
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction
    )


def scale_anchor_loss(
    resid: Float[Tensor, "batch pos d_model"], ordinary: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Mean squared distance of each token's standard deviation from the batch's ordinary one.

    Applied to the input of ln_final. A live final norm makes the loss blind to the stream's scale;
    this keeps the scale together before and after that norm goes. The target carries no gradient
    and leaves out special tokens, which are thereby pulled to the rest (2507.02559, whose epsilon
    inside the root is kept).

    Args:
        resid: Input of ln_final.
        ordinary: False at position 0 and at end-of-text tokens.
    """
    sigma = (resid.float().var(-1, correction=0) + 1e-5).sqrt()
    target = sigma.detach()[ordinary].mean() if ordinary.any() else sigma.detach().mean()
    return (sigma - target).pow(2).mean()
