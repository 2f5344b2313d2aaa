"""Which operations a forward pass in integers takes, by kind."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.components import LayerNorm, RMSNorm

from lnfree_interp.models.integer_mode import integer_arithmetic
from lnfree_interp.models.running import require_hooked, require_tokens, run
from lnfree_interp.models.sites import with_norm_sites
from lnfree_interp.tables import Table

KINDS = (
    "products, linear layers",
    "products, norms and scalers",
    "square roots, norms",
    "divisions, norms",
    "curves, norms",
    "rows, embeddings",
    "roundings, activations",
    "in floating point: exponentials, softmax",
)
"""What is counted: multiplications with their additions; roots and divisions, of each vector that
a live norm divides; entries that a pointwise norm bends; rows that embeddings read; activations
that are rounded to integers; and, of what stays in floating point, the scores that the softmax
reads."""


@dataclass(frozen=True)
class IntegerOperations:
    """How many operations of each kind a forward pass takes."""

    bits: int
    """The width of the integers."""
    tokens: int
    """How many tokens were read."""
    counts: Mapping[str, int]
    """By kind, for all tokens together."""

    @property
    def norms_divide(self) -> bool:
        """Whether a norm takes a square root, a division, or a curve."""
        return any(self.counts[kind] for kind in KINDS if kind.endswith(", norms"))

    def __str__(self) -> str:
        rows = [
            (kind, f"{count:,}", f"{count / self.tokens:,.1f}")
            for kind, count in self.counts.items()
        ]
        return Table((f"integers of {self.bits} bits", "in all", "per token"), rows).to_text()


@torch.no_grad()
def integer_operations(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"], bits: int = 8
) -> IntegerOperations:
    """Run a model in integers, and count what its layers do.

    A live norm takes a square root and a division for each vector that it reads, which integer
    arithmetic has no product for. A frozen one multiplies; a folded one is not there.

    Args:
        model: In any form. One with TransformerLens' norms is run with norm sites in their place.
        tokens: Token ids, [batch, pos].
        bits: The width of the integers, 2 to 16; the counts do not depend on it.

    Returns:
        The counts, by kind.

    Raises:
        DataError: if the model cannot read the tokens, or there is no such width.
        UnsupportedModelError: for what `integer_arithmetic` refuses.

    Source:
        arXiv 2209.09815; the count is ours.

    Examples:
        >>> lf.integer_operations(model, tokens).counts["square roots, norms"]  # 9 for a token
        2304
        >>> lf.integer_operations(free, tokens).norms_divide
        False
    """
    require_hooked(model)
    require_tokens(model, tokens)
    if any(isinstance(module, LayerNorm | RMSNorm) for module in model.modules()):
        model = with_norm_sites(model, copy_weights=False)
    with integer_arithmetic(model, bits) as arithmetic:
        run(model, tokens)
    counts = {kind: arithmetic.counts[kind] for kind in KINDS}
    return IntegerOperations(bits, tokens.numel(), counts)
