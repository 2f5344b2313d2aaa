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
        weights: By TransformerLens' names, taken one by one, so that an iterator can free each.
            A bias that is missing is zero.
        tokenizer: The model gets a copy.
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
    """Copy weights into a model; every weight must have a place of its shape.

    Args:
        model: The model to fill.
        weights: By TransformerLens' names, taken one by one.
        zero_biases: Whether a bias may be missing, and stays what it is.

    Raises:
        CheckpointError: if a weight is missing, unexpected or of another shape.
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

    To make a tokenizer prepend BOS, TransformerLens opens it a second time by its name. That may
    give another revision, one without tokens that were added since, or fail without a network. A
    tokenizer that says that it prepends BOS is taken as it is; TransformerLens then tests whether
    it does, and prepends BOS itself if not.
    """
    if tokenizer is None:
        return None
    tokenizer = copy.deepcopy(original_tokenizer(tokenizer))
    tokenizer.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    # With padding on the left TransformerLens masks leading tokens that equal the padding token,
    # which transformers does not do to bare token ids, and which often is end-of-text.
    tokenizer.padding_side = "right"
    return tokenizer
