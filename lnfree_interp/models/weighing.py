"""How attention weighs tokens: words, which need no generation of TransformerLens."""

from typing import Any, Literal

Divisor = Literal["sum", "count"]
"""What weights of features are divided by: their sum, or how many tokens the query sees, a
constant."""

Weighing = Literal["softmax", Divisor]
"""How a layer weighs tokens: by a softmax, whose weights add up to one; or by features, divided."""


def weighing_of(attn: Any) -> Weighing:
    """How an attention weighs tokens, of whatever class it is."""
    return getattr(attn, "divide_by", "softmax")
