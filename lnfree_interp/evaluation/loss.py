"""How well a model predicts text."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.models.agreement import require_tokens
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.running import run


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """Next-token cross-entropy over a text, in nats per token."""

    mean: float
    median: float
    p99: float
    """99th percentile: what the mean hides when a few tokens go wrong."""
    per_token: Float[Tensor, " targets"]
    """Block by block, position 1 to the last."""


@torch.no_grad()
def evaluate_loss(
    model: HookedTransformer, tokens: Int[Tensor, "blocks pos"], batch: int = 16
) -> CrossEntropy:
    """Cross-entropy of every next token, end-of-text targets included.

    Args:
        model: Any `HookedTransformer`.
        tokens: [blocks, pos], such as `pack(...)`.
        batch: Blocks per forward pass; the result does not depend on it.

    Raises:
        DataError: if the model cannot read the tokens.
    """
    require_tokens(model, tokens)
    device = model.W_E.device
    losses = torch.cat(
        [
            next_token_loss(run(model, chunk.to(device)), chunk.to(device), reduction="none").cpu()
            for chunk in tokens.split(batch)
        ]
    ).double()
    # NumPy's, because torch.quantile refuses more than 16 million values.
    median, p99 = np.quantile(losses.numpy(), [0.5, 0.99]).tolist()
    return CrossEntropy(losses.mean().item(), median, p99, losses)
