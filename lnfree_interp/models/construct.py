"""The one place where a `HookedTransformer` is built from a config and weights."""

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerBase

from lnfree_interp.errors import CheckpointError

_ORIGINAL = "original_tokenizer"

# Made by the constructor from the config.
_BUFFERS = ("attn.mask", "attn.IGNORE", "attn.rotary_sin", "attn.rotary_cos")


def hooked_transformer(
    cfg: HookedTransformerConfig,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    complete: bool = True,
) -> HookedTransformer:
    """A stock `HookedTransformer` with exactly these weights, unprocessed.

    TransformerLens loads with `strict=False`, so a key that does not fit vanishes unnoticed; here
    it is an error.

    Args:
        cfg: As for `HookedTransformer`.
        weights: By TransformerLens' names; consumed one by one, so that an iterator need not hold
            two copies of the model. Biases may be missing: they are zero then.
        tokenizer: Goes along, a copy.
        complete: Copy the weights. False: leave them uninitialised, for `copy_weights` later.

    Raises:
        CheckpointError: if a weight is missing, unexpected or of another shape.
    """
    # TransformerLens would open a tokenizer by its name, running code from it if asked to.
    cfg = replace(cfg, trust_remote_code=False)
    if tokenizer is None:
        cfg = replace(cfg, tokenizer_name=None)
    with warnings.catch_warnings():
        # HookedTransformer is what this package is for; its deprecation is known.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, tokenizer=_copy_for_transformer_lens(tokenizer))
    if tokenizer is not None and model.tokenizer is not None:
        model.tokenizer.init_kwargs = dict(tokenizer.init_kwargs)
        setattr(model.tokenizer, _ORIGINAL, original_tokenizer(tokenizer))
    if complete:
        copy_weights(model, weights)
    return model.eval()


def original_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer as it was before TransformerLens gave it a padding and a BOS token."""
    return getattr(tokenizer, _ORIGINAL, tokenizer)


def copy_weights(
    model: HookedTransformer,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    zero_biases: bool = True,
) -> None:
    """Copy weights into a model, each into its place or not at all.

    Args:
        model: Where to.
        weights: As for `hooked_transformer`.
        zero_biases: Whether biases may be missing.

    Raises:
        CheckpointError: as `hooked_transformer`.
    """
    places: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        pairs: Any = weights.items() if isinstance(weights, Mapping) else weights
        for name, W in pairs:
            if name.endswith(_BUFFERS):
                continue
            place = places.pop(name, None)
            if place is None:
                raise CheckpointError(f"weights do not fit the config: unexpected {name}")
            if place.shape != W.shape:
                raise CheckpointError(
                    f"weights do not fit the config: {name} is {list(W.shape)}, "
                    f"the config says {list(place.shape)}"
                )
            place.copy_(W)
    if missing := [name for name in places if not (zero_biases and _is_bias(name))]:
        raise CheckpointError(f"weights do not fit the config: missing {', '.join(missing[:3])}")


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2].lstrip("_").startswith("b_")


def _copy_for_transformer_lens(
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedTokenizerBase | None:
    """A copy that TransformerLens takes as it is.

    It would open the tokenizer a second time from its name, to make it prepend BOS: from another
    revision or cache, without tokens added since, or not at all. Told that it prepends BOS already,
    TransformerLens takes this one, finds out whether it does, and else prepends by itself.
    """
    if tokenizer is None:
        return None
    tokenizer = copy.deepcopy(original_tokenizer(tokenizer))
    tokenizer.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    # With padding on the left TransformerLens masks leading tokens that equal the padding token,
    # which transformers does not do to bare token ids, and which often is end-of-text.
    tokenizer.padding_side = "right"
    return tokenizer
