"""Forward passes over whole rows of tokens, watched and edited by hooks of their own.

TransformerLens' own `forward` and `run_with_cache` write to the model while they compute: to the
tokenizer's padding side, to `cfg.default_prepend_bos`, to a list of hooks that all callers share.
Two threads then get each other's activations. Here a pass is the model's own modules called in
turn, and its hooks answer to the thread that set them.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.models.first_token import telling
from lnfree_interp.numerics import soft_cap

Edit = Callable[[Tensor], Tensor | None]
"""From an activation to what takes its place; None leaves it."""
Hook = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]
"""A function from a module's inputs and output to what replaces the output, or None."""


@contextmanager
def listening(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Hooks of modules that act in this thread only, and are removed afterwards."""
    thread = threading.get_ident()

    def answering(hook: Hook) -> Callable[..., Any]:
        # While a hook is added or removed, torch hands it no kwargs in another thread's pass.
        def answer(module: nn.Module, *given: Any) -> Any:
            return hook(*given) if threading.get_ident() == thread else None

        return answer

    handles: list[RemovableHandle] = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(answering(hook), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(
    model: nn.Module, names: Collection[str] = (), edits: Mapping[str, Edit] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Keep and change activations of whatever this thread runs inside the block.

    Args:
        model: With hook points.
        names: Hook names whose activations are kept, after every edit.
        edits: By hook name.

    Yields:
        The activations, by hook name, as they come in.

    Raises:
        UnsupportedModelError: if something else than a hook point stands at a name.
    """
    edits, found = edits or {}, {}

    def listen(name: str) -> Hook:
        def hook(args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            changed = edits[name](output) if name in edits else None
            if name in names:
                found[name] = output if changed is None else changed
            return changed

        return hook

    every = dict.fromkeys([*names, *edits])
    with listening([(_hook_point(model, name), listen(name)) for name in every]):
        yield found


def _hook_point(model: nn.Module, name: str) -> nn.Module:
    try:
        point = model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(f"the model has no hook point {name}") from error
    if not isinstance(point, HookPoint):
        raise UnsupportedModelError(
            f"a {type(point).__name__} is attached at {name}, so the stream there is no longer "
            "what the model's parts wrote: detach it first (reset_saes() for an SAE)"
        )
    return point


def require_hooked(model: Any) -> None:
    """Refuse a bridge of TransformerLens 4 where a `HookedTransformer` is needed.

    Raises:
        UnsupportedModelError: saying which call to use.
    """
    if any(kind.__name__ == "TransformerBridge" for kind in type(model).__mro__):
        raise UnsupportedModelError(BRIDGE)


BRIDGE = (
    "this call needs a HookedTransformer of TransformerLens 3.9, not a TransformerBridge: open the "
    "exported folder with lf.load(...) under transformer-lens 3.9. On a bridge use lf.trace, "
    "lf.attribute, lf.certify and the other analyses"
)


def is_watched(point: HookPoint) -> bool:
    """Whether anybody reads or changes the activation, with TransformerLens' hooks or torch's."""
    return bool(point._forward_hooks) or point.has_hooks()


def run(
    model: Any,
    tokens: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
    stop_at_layer: int | None = None,
    start_at_layer: int = 0,
) -> Float[Tensor, "batch pos _"]:
    """Logits of a `HookedTransformer`, or its stream before a layer.

    Nothing is taken for padding, so nothing is masked.

    Args:
        model: A `HookedTransformer`.
        tokens: Token ids; or the stream before `start_at_layer`.
        stop_at_layer: Stop before this block. Default: go on to the logits.
        start_at_layer: Where a stream enters.
    """
    require_hooked(model)
    n_layers = model.cfg.n_layers
    if tokens.is_floating_point():
        resid = tokens
    else:
        embed = model.hook_embed(model.embed(tokens.to(model.W_E.device)))
        resid = model.get_residual(embed, 0, prepend_bos=False, return_shortformer_pos_embed=False)
    for block in model.blocks[
        start_at_layer : n_layers if stop_at_layer is None else stop_at_layer
    ]:
        weight = next(block.parameters(), resid)
        resid = block(resid.to(weight.device))
    return resid if stop_at_layer is not None else to_logits(model, resid)


def to_logits(
    model: Any, resid: Float[Tensor, "*batch pos d_model"]
) -> Float[Tensor, "*batch pos d_vocab"]:
    """What the model's final norm, unembedding and soft cap make of a stream."""
    if model.cfg.normalization_type is not None:
        resid = model.ln_final(resid)
    return soft_cap(model.unembed(resid), model.cfg.output_logits_soft_cap)


def logits_at(
    model: Any, stream: Float[Tensor, "batch pos d_model"], at: slice
) -> Float[Tensor, "batch some d_vocab"]:
    """Logits at some positions of whole rows, from the stream after the last block."""
    position = torch.arange(stream.shape[1], device=stream.device)[at]
    with telling((position == 0).expand(len(stream), -1)):
        return to_logits(model, stream[:, at].to(model.W_U.dtype))


def run_and_keep(
    model: Any,
    tokens: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
    names: Iterable[str],
    stop_at_layer: int | None = None,
    start_at_layer: int = 0,
    edits: Mapping[str, Edit] | None = None,
) -> tuple[Float[Tensor, "batch pos _"], dict[str, Tensor]]:
    """As `run`, with the activations of some hooks, and some of them changed.

    Args:
        model: A `HookedTransformer`.
        tokens: As for `run`.
        names: Hook names to keep.
        stop_at_layer: As for `run`.
        start_at_layer: As for `run`.
        edits: What takes an activation's place, by hook name.
    """
    if not tokens.is_floating_point():
        for name, _ in model.named_modules():
            if name.rpartition(".")[2].startswith("hook_"):
                _hook_point(model, name)
    with watched(model, set(names), edits) as found:
        out = run(model, tokens, stop_at_layer, start_at_layer)
    return out, found


def require_tokens(model: Any, tokens: Int[Tensor, "*batch pos"]) -> None:
    """Refuse tokens that the model cannot read, before they become an index error.

    Raises:
        DataError: if they are no tensor, there are none, a row is longer than the context, or an id
            is outside the vocabulary.
    """
    if not isinstance(tokens, Tensor):
        raise DataError(f"token ids are a tensor, not a {type(tokens).__name__}: give lf.pack(...)")
    n_ctx, d_vocab = model.cfg.n_ctx, model.cfg.d_vocab
    if tokens.numel() == 0:
        raise DataError("there are no tokens: pass at least one")
    if tokens.shape[-1] > n_ctx:
        raise DataError(
            f"{tokens.shape[-1]} tokens in a row; the model's context is {n_ctx} tokens"
        )
    if tokens.min() < 0 or tokens.max() >= d_vocab:
        raise DataError(
            f"token ids go from {tokens.min()} to {tokens.max()}; the model has 0 to "
            f"{d_vocab - 1}. The text is tokenized for another model: use this model's tokenizer"
        )
