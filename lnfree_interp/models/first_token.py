"""Which tokens of a stream come first in their prompt.

A frozen norm may divide the first token of each prompt by a constant of its own. That is position 0
of the stream, except behind padding on the left, and in a pass that continues earlier ones from
their keys and values. TransformerLens tells its blocks of both; hooks on the blocks tell the norms
inside, and what a block returns carries it to `ln_final`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lnfree_interp.errors import NormSiteError

_ARGUMENTS = ("resid_pre", "shortformer_pos_embed", "past_kv_cache_entry", "attention_mask")
"""Of `TransformerBlock.forward`, in order."""

_CARRIED = "_lnfree_first_tokens"
"""Attribute of the stream that a block returns, where position 0 may not be the first token."""

# Each thread has its own value.
_told: ContextVar[Bool[Tensor, "batch pos"] | None] = ContextVar("first tokens", default=None)


@contextmanager
def telling(first: Bool[Tensor, "batch pos"] | None) -> Iterator[None]:
    """Tell the norms that run inside which tokens come first; None: those at position 0."""
    before = _told.set(first)
    try:
        yield
    finally:
        _told.reset(before)


def first_tokens(x: Float[Tensor, "*batch d"]) -> Bool[Tensor, "batch pos *ones"]:
    """Whether each token of a stream [batch, pos, ..., d] comes first in its prompt.

    Raises:
        NormSiteError: if the stream has no positions.
    """
    if x.ndim < 3:
        raise NormSiteError(
            f"this norm has a constant of its own for the first token of a prompt, and a tensor of "
            f"shape {list(x.shape)} does not say where that is: pass [batch, pos, d_model]"
        )
    first = _told.get()
    if first is None:
        first = getattr(x, _CARRIED, None)
    if first is None:
        first = (torch.arange(x.shape[1], device=x.device) == 0).expand(x.shape[:2])
    return first.to(x.device)[(...,) + (None,) * (x.ndim - 2)]


def follow_first_tokens(model: Any) -> None:
    """Let the norms of a model know the first token behind padding and in a continued pass."""
    for block in model.blocks:
        block.register_forward_pre_hook(_enter, with_kwargs=True)
        block.register_forward_hook(_leave, always_call=True)


def _enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    past, mask = given.get("past_kv_cache_entry"), given.get("attention_mask")
    if past is None and mask is None:
        return
    resid = given["resid_pre"]
    start = 0 if past is None else past.past_keys.shape[1]
    position = start + torch.arange(resid.shape[1], device=resid.device)
    first = 0 if mask is None else mask.to(resid.device).long().argmax(1, keepdim=True)
    _told.set((position == first).expand(resid.shape[:2]))


def _leave(block: nn.Module, args: Any, output: Any) -> None:
    first = _told.get()
    if first is not None:
        _told.set(None)
        if isinstance(output, Tensor):
            setattr(output, _CARRIED, first)
