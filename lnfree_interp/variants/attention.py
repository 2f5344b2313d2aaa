"""Variants with another attention: linear, without a softmax."""

from collections.abc import Sequence

from transformer_lens import HookedTransformer

from lnfree_interp.errors import UnsupportedModelError
from lnfree_interp.models.inserting import set_linear_attention
from lnfree_interp.models.linear_attention import linear_layers
from lnfree_interp.variants.variant import Variant, made


def to_linear_attention(
    model: HookedTransformer,
    layers: Sequence[int] | None = None,
    *,
    feature_map: str = "elu",
    divide_by: str = "sum",
) -> Variant:
    """Causal linear attention in some blocks: phi(q) . phi(k) in the place of exp(q . k / scale).

    The parameters are those of the given attention. Weights of tokens are

        pattern[query, key] = phi(q) . phi(k) / divisor, for the keys that the query sees

    Args:
        model: Stock, or with norm sites.
        layers: The blocks, counted from 0; the others keep their softmax. Default: all.
        feature_map: phi: `"elu"`, elu(x) + 1; or `"softmax"`, the softmax over the entries of x and
            -x.
        divide_by: The divisor: `"sum"`, the sum of the weights before it, so that they add up to 1;
            or `"count"`, how many tokens the query sees. That is a constant, so that no token's
            weight depends on another token: what a head reads is a sum of what each token gives.

    Returns:
        A `Variant`, another function.

    Raises:
        UnsupportedModelError: for a model that can have no norm sites, or whose scores have a soft
            cap; if no layer is given, one twice, or one that is linear already.
        NormSiteError: if there is no such block, feature map or divisor.

    Source:
        arXiv 2006.16236; hybrids of both kinds: arXiv 2404.02684; the softmax of x and -x: arXiv
        2402.04347

    Examples:
        >>> hybrid = lf.to_linear_attention(model, layers=[0, 2])
        >>> hybrid.same_function, hybrid.steps
        (False, ('linear attention in blocks 0, 2: elu features, divided by their sum',))
    """
    chosen = list(range(model.cfg.n_layers) if layers is None else layers)
    if not chosen:
        raise UnsupportedModelError("no layer was given: name at least one block, or leave it out")
    if twice := [layer for layer in chosen if chosen.count(layer) > 1]:
        raise UnsupportedModelError(f"block {twice[0]} was given more than once")

    def change(sited: HookedTransformer) -> tuple[str, ...]:
        if linear := sorted({*linear_layers(sited)} & {*chosen}):
            raise UnsupportedModelError(
                f"the attention of block {linear[0]} is linear already: leave it out"
            )
        for layer in chosen:
            set_linear_attention(sited, layer, feature_map, divide_by)
        where = ", ".join(map(str, chosen))
        how = f"{feature_map} features, divided by their {divide_by}"
        return (f"linear attention in blocks {where}: {how}",)

    return made("linear attention", model, change, same_function=False)
