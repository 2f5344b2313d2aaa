"""Variants with another attention: linear, without a softmax."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.positions import whole_number
from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.models.inserting import set_linear_attention
from lnfree_interp.models.linear_attention import linear_layers
from lnfree_interp.models.running import require_hooked, require_tokens, run, watched
from lnfree_interp.variants.variant import Variant, made


def to_linear_attention(
    model: HookedTransformer,
    layers: int | Sequence[int] | None = None,
    *,
    feature_map: str = "elu",
    divide_by: str = "sum",
    tokens: Int[Tensor, "sequence pos"] | None = None,
) -> Variant:
    """Causal linear attention in some blocks: phi(q) . phi(k) in the place of exp(q . k / scale).

    The parameters are those of the given attention. Weights of tokens are

        pattern[query, key] = phi(q) . phi(k) / divisor, for the keys that the query sees

    Args:
        model: Stock, or with norm sites.
        layers: The blocks, counted from 0, or one; the others keep their softmax. Default: all.
        feature_map: phi: `"elu"`, elu(x) + 1; or `"softmax"`, the softmax over the entries of x and
            -x.
        divide_by: The divisor: `"sum"`, the sum of the weights before it, so that they add up to 1;
            or `"count"`, how many tokens the query sees. That is a constant, so that no token's
            weight depends on another token: what a head reads is a sum of what each token gives.
        tokens: For `"count"`: text on which the mean sum of each head's weights is measured; its
            W_O is divided by that, so that it writes about as much as before. Default: W_O stays.

    Returns:
        A `Variant`, another function.

    Raises:
        UnsupportedModelError: for a model that can have no norm sites, or whose scores have a soft
            cap; if no layer is given, one twice, or one that is linear already; if there are tokens
            and weights are divided by their sum, or a norm stands before W_O.
        NormSiteError: if there is no such block, feature map or divisor.
        DataError: if a block is no whole number, or the model cannot read the tokens.

    Source:
        arXiv 2006.16236; hybrids of both kinds: arXiv 2404.02684; the softmax of x and -x: arXiv
        2402.04347

    Examples:
        >>> hybrid = lf.to_linear_attention(model, layers=[0, 2])
        >>> hybrid.same_function, hybrid.steps
        (False, ('linear attention in blocks 0, 2: elu features, divided by their sum',))
    """
    require_hooked(model)
    chosen = [*range(model.cfg.n_layers)] if layers is None else _read_layers(layers)
    if tokens is not None and divide_by != "count":
        raise UnsupportedModelError(
            "tokens say how large weights are that are divided by the count: "
            f"divide_by={divide_by!r} needs none"
        )

    def change(sited: HookedTransformer) -> tuple[str, ...]:
        if linear := sorted({*linear_layers(sited)} & {*chosen}):
            raise UnsupportedModelError(
                f"the attention of block {linear[0]} is linear already: leave it out"
            )
        for layer in chosen:
            set_linear_attention(sited, layer, feature_map, divide_by)
        where = ", ".join(map(str, chosen))
        if tokens is not None:
            _scale_W_O(sited, sorted(chosen), tokens)
        how = f"{feature_map} features, divided by their {divide_by}"
        return (f"linear attention in blocks {where}: {how}",)

    return made("linear attention", model, change, same_function=False)


def _read_layers(layers: Any) -> list[int]:
    one = isinstance(layers, str) or not isinstance(layers, Iterable)
    chosen = [whole_number(layer, "a block") for layer in ([layers] if one else layers)]
    if not chosen:
        raise UnsupportedModelError("no layer was given: name at least one block, or leave it out")
    if twice := [layer for layer in chosen if chosen.count(layer) > 1]:
        raise UnsupportedModelError(f"block {twice[0]} was given more than once")
    return chosen


def _scale_W_O(model: HookedTransformer, layers: list[int], tokens: Tensor) -> None:
    """Divide each head's W_O by the mean sum of its weights, block by block, as the text comes."""
    require_tokens(model, tokens)
    if tokens.ndim != 2:
        raise DataError(f"text is token ids, [sequence, pos], not {list(tokens.shape)}")
    tokens = tokens.to(model.W_E.device)
    for layer in layers:
        attn = cast(Any, model.blocks[layer]).attn
        if attn.inner is not None:
            raise UnsupportedModelError(
                f"block {layer} has a norm before W_O, which undoes any scale of the weights: "
                "leave tokens out"
            )
        name = f"blocks.{layer}.attn.hook_pattern"
        sums = [_sums(model, rows, layer, name) for rows in tokens.split(4)]
        mean = sum(sums[1:], sums[0]) / tokens.numel()
        if not (mean.isfinite() & (mean > 0)).all():
            raise UnsupportedModelError(
                f"heads of block {layer} have weights that add up to {mean.tolist()}: W_O cannot "
                "be divided by that"
            )
        attn.W_O.div_(mean[:, None, None])


def _sums(model: HookedTransformer, rows: Tensor, layer: int, name: str) -> Tensor:
    with watched(model, [name]) as found:
        run(model, rows, stop_at_layer=layer + 1)
    return found[name].sum((0, 2, 3))
