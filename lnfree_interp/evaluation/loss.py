"""Cross-entropy of a model on a text."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.prompts import batches, read_sequences
from lnfree_interp.errors import DataError
from lnfree_interp.models.loss import next_token_loss
from lnfree_interp.models.running import run

TRIMMED = 0.01
"""The share of tokens that the trimmed mean leaves out at either end."""


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """Next-token cross-entropy over a text, in nats per token.

    A few tokens whose residual stream explodes can dominate the mean of an LN-free model
    (2507.02559: three sequences of 10,000 take GPT-2 XL from 2.4 to 130), so quantiles and a
    trimmed mean come with it.
    """

    per_token: Float[Tensor, "sequence target"]
    """[sequence, target], the loss of each token; targets are the positions from 1 to the last."""

    def __post_init__(self) -> None:
        if self.per_token.numel() == 0:
            raise DataError("no token was predicted: give sequences of at least two tokens")

    @property
    def mean(self) -> float:
        """The mean over all tokens."""
        return self.per_token.mean().item()

    @property
    def median(self) -> float:
        """The median over all tokens."""
        return self._quantiles[0]

    @property
    def p99(self) -> float:
        """The 99th percentile, which shows tokens of high loss that the mean hides."""
        return self._quantiles[1]

    @property
    def p99_9(self) -> float:
        """The 99.9th percentile."""
        return self._quantiles[2]

    @property
    def maximum(self) -> float:
        """The largest loss of a token."""
        return self.per_token.max().item()

    @cached_property
    def trimmed_mean(self) -> float:
        """The mean without the best and the worst hundredth of the tokens."""
        losses, cut = self._sorted, int(TRIMMED * self._sorted.size)
        return losses[cut : losses.size - cut].mean().item()

    @property
    def by_position(self) -> Float[Tensor, " target"]:
        """The mean over sequences, for each position."""
        return self.per_token.mean(0)

    def share_above(self, other: "CrossEntropy", threshold: float = 3.5) -> float:
        """The share of tokens whose loss is more than a threshold above another model's.

        Args:
            other: The losses of another model on the same text, such as the original's.
            threshold: The threshold in nats; 3.5 is that of 2507.02559.

        Raises:
            DataError: if the other losses are of another text.
        """
        if other.per_token.shape != self.per_token.shape:
            shapes = [list(x.per_token.shape) for x in (self, other)]
            raise DataError(
                f"these are losses of two texts, of shapes {shapes[0]} and {shapes[1]}: give two "
                "models' losses on the same text"
            )
        worse = self.per_token - other.per_token > threshold
        return (worse | ~self.per_token.isfinite()).double().mean().item()

    @property
    def share_not_finite(self) -> float:
        """The share of tokens whose loss is not a finite number."""
        return (~self.per_token.isfinite()).double().mean().item()

    @cached_property
    def _quantiles(self) -> tuple[float, float, float]:
        # This is NumPy's, because torch.quantile takes at most 16 million values.
        between = "linear" if np.isfinite(self._sorted[-1]) else "higher"  # inf - inf is nan
        found = np.quantile(self._sorted, [0.5, 0.99, 0.999], method=between).tolist()
        return found[0], found[1], found[2]

    @cached_property
    def _sorted(self) -> np.ndarray:
        """The losses in order; those that are not a number count as infinite."""
        return np.sort(np.nan_to_num(self.per_token.numpy(), nan=np.inf, posinf=np.inf), axis=None)

    def __repr__(self) -> str:
        return (
            f"CrossEntropy(mean {self.mean:.4f}, median {self.median:.4f}, p99.9 {self.p99_9:.3f}, "
            f"maximum {self.maximum:.3f}; {self.per_token.numel():,} tokens)"
        )


@torch.no_grad()
def evaluate_loss(
    model: HookedTransformer, tokens: Int[Tensor, "sequence pos"], batch: int = 16
) -> CrossEntropy:
    """Cross-entropy of every next token, including end-of-text tokens.

    Args:
        model: A `HookedTransformer` in any form.
        tokens: Token ids [sequence, pos], such as `pack(...)`.
        batch: How many sequences run at once; the result does not depend on it.

    Returns:
        A `CrossEntropy` of losses [sequence, target], in nats per token, on the CPU in float64.

    Raises:
        DataError: if the model cannot read the tokens.

    Source:
        arXiv 2507.02559 for the mean and the share of tokens that got worse. Ours: trimmed mean and
        quantiles, since a few exploding tokens can dominate the mean.

    Examples:
        >>> loss = lf.evaluate_loss(model, tokens)
        >>> loss.per_token.shape
        torch.Size([4, 63])
        >>> loss.mean < loss.p99 < loss.maximum
        True
    """
    tokens = read_sequences(model, tokens, packed=True)
    losses = [
        next_token_loss(run(model, chunk), chunk, reduction="none").cpu()
        for chunk in batches(tokens, batch)
    ]
    return CrossEntropy(torch.cat(losses).double().reshape(len(tokens), -1))
