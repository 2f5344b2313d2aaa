"""Forward passes over whole rows of tokens.

Where the tokenizer pads on the left, TransformerLens masks what it takes for padding, and a leading
beginning-of-sequence token often looks like it. Nothing here is padded, so nothing is masked.
"""

from collections.abc import Collection
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer


def run(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"], stop_at_layer: int | None = None
) -> Float[Tensor, "batch pos _"]:
    """Logits, or the stream before a layer."""
    return model(tokens, padding_side="right", stop_at_layer=stop_at_layer)


def run_and_keep(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
    names: Collection[str],
    stop_at_layer: int | None = None,
    start_at_layer: int | None = None,
) -> tuple[Float[Tensor, "batch pos _"], dict[str, Tensor]]:
    """The same, and the activations of some hooks; from a stream on if there is a first layer."""
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
    """Logits, or the stream before a layer, with hooks."""
    return model.run_with_hooks(
        tokens, padding_side="right", stop_at_layer=stop_at_layer, fwd_hooks=hooks
    )
