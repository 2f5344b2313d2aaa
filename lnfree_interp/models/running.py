"""Forward passes over whole rows of tokens.

Where the tokenizer pads on the left, TransformerLens masks leading tokens that equal the padding
token, and the beginning-of-sequence token often does. No row here is padded, so none is masked.
"""

from collections.abc import Collection
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer


def run(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"], stop_at_layer: int | None = None
) -> Float[Tensor, "batch pos _"]:
    """The logits, or the residual stream before layer `stop_at_layer`."""
    return model(tokens, padding_side="right", stop_at_layer=stop_at_layer)


def run_and_keep(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
    names: Collection[str],
    stop_at_layer: int | None = None,
    start_at_layer: int | None = None,
) -> tuple[Float[Tensor, "batch pos _"], dict[str, Tensor]]:
    """The logits or the stream as from `run`, and the activations of the named hooks.

    With `start_at_layer`, `tokens` is the residual stream before that layer.
    """
    out, cache = model.run_with_cache(
        tokens,
        padding_side="right",
        start_at_layer=start_at_layer,
        stop_at_layer=stop_at_layer,
        names_filter=lambda name: name in names,
    )
    return cast(Tensor, out), dict(cache.items())


def run_hooked(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"],
    hooks: list[Any],
    stop_at_layer: int | None = None,
) -> Float[Tensor, "batch pos _"]:
    """The logits or the stream as from `run`, with hooks."""
    return model.run_with_hooks(
        tokens, padding_side="right", stop_at_layer=stop_at_layer, fwd_hooks=hooks
    )
