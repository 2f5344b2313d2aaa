"""What the fine-tuning minimises beside the next-token loss (`models.loss`)."""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


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
