"""Affine norms merged into the weights around them.

For an affine norm with multiplier a (gain over sigma) and bias b, and a reader W, b_W of its
output, with C = I - 11^T/d (the identity for a norm that does not centre):

    ((x C) * a + b) W + b_W  =  x [C diag(a) W]  +  [b_W + b W]

and for one that stands behind a weight, on a sublayer's output or on queries and keys:

    ((x W + b_W) C) * a + b  =  x [W C diag(a)]  +  [(b_W C) * a + b]

Exact in real arithmetic, on every input. Nothing else that writes to the residual stream changes,
so its activations stay those of the model before. (2409.13710; docs/algebra.md)
"""

import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.errors import NormSiteError
from lnfree_interp.models.norms import NormMap
from lnfree_interp.models.site_names import whole_norm

Form = Literal["folded", "frozen"]
"""What is left of the norms: nothing, or division by a constant."""

# Which norm feeds a weight, and which norm its output goes through, by the weight's last name.
_BEFORE = {
    "W_Q": "ln1.qk",
    "W_K": "ln1.qk",
    "W_V": "ln1.v",
    "W_in": "ln2",
    "W_gate": "ln2",
    "W_U": "ln_final",
}
_AFTER = {"W_Q": "attn.q_norm", "W_K": "attn.k_norm", "W_O": "ln1_post", "W_out": "ln2_post"}

_CHUNK = 2**21
"""Elements that are folded in float64 at once, to keep the peak of memory low."""

ConstantNorms = Mapping[str, NormMap]
"""An affine norm for every site, by its name: `blocks.0.ln1.qk`, `blocks.0.ln1.v`, ..."""


def fold_weights(
    weights: MutableMapping[str, Tensor], norms: ConstantNorms, form: Form
) -> Iterator[tuple[str, Tensor]]:
    """TransformerLens weights with the norms merged in, one by one.

    Args:
        weights: All weights but the norms' own; emptied on the way.
        norms: An affine norm for every site.
        form: In the frozen form readers keep a factor sigma, which `FrozenNorm` divides by.
    """
    scales = frozen_scales(norms) if form == "frozen" else {}
    # The largest first: while there are few others, its copy is no peak.
    for name in sorted(weights, key=lambda name: -weights[name].numel()):
        prefix, _, leaf = name.rpartition(".")
        leaf = leaf.lstrip("_")
        if leaf.startswith("b_"):
            continue  # with its weight; biases without one follow below
        block = prefix.rpartition(".")[0]
        W = weights.pop(name)
        before, after = (_site(block, kinds.get(leaf)) for kinds in (_BEFORE, _AFTER))
        b_name = name.replace("W_", "b_")
        b = weights.pop(b_name, None) if b_name != name else None
        if before in norms:
            W, b = _fold_reader(norms[before], scales.get(whole_norm(before), 1.0), W, b)
        if after in norms:
            b = _no_bias(leaf, W) if b is None else b
            W, b = _fold_writer(norms[after], W), _fold_writer(norms[after], b, is_bias=True)
        yield name, W
        if b is not None:
            yield b_name, b
    yield from weights.items()


def frozen_scales(norms: ConstantNorms) -> dict[str, float]:
    """The `hook_scale` of each norm module of the frozen form, by its path.

    The two halves of `ln1` are one module there, which shows the constant of the values.
    """
    scales = {}
    for site, norm in norms.items():
        if reads_stream(site) and not site.endswith("ln1.qk"):
            assert norm.scale is not None
            scales[whole_norm(site)] = norm.scale
    return scales


def frozen_firsts(norms: ConstantNorms) -> dict[str, float]:
    """The `hook_scale` of first tokens in the frozen form, by the paths of the norms that have one.

    Raises:
        NormSiteError: for a norm that is merged with the weight before it; and where queries and
            keys would divide the first token by another multiple of their constant than values.
    """
    firsts: dict[str, float] = {}
    scales = frozen_scales(norms)
    for site, norm in norms.items():
        assert norm.scale is not None
        if not reads_stream(site):
            if norm.first is not None:
                raise NormSiteError(
                    f"{site} divides first tokens by a constant of their own, and stands behind a "
                    f"weight: freeze it with one constant, freeze_site(model, {site!r}, sigma)"
                )
            continue
        name = whole_norm(site)
        first = scales[name] * ((norm.first or norm.scale) / norm.scale)
        if not math.isclose(firsts.setdefault(name, first), first, rel_tol=1e-9):
            raise NormSiteError(
                f"the two halves of {name} divide first tokens by different multiples of their "
                "constants, and are one norm in this form: give both halves the same two constants"
            )
    return {name: first for name, first in firsts.items() if first != scales[name]}


def reads_stream(site: str) -> bool:
    """Whether the norm at a site stands before weights that read the stream."""
    return site.endswith(tuple(_BEFORE.values()))


def is_reader(name: str) -> bool:
    """Whether a weight of that name reads the stream through a norm."""
    return name.rpartition(".")[2].lstrip("_") in _BEFORE


def _site(block: str, kind: str | None) -> str:
    """The name of a site, or one that no site has."""
    if kind is None:
        return ""
    return f"{block}.{kind}" if block else kind


def _fold_reader(
    norm: NormMap,
    scale: float,
    W: Float[Tensor, "*head d_model out"],
    b: Float[Tensor, "*head out"] | None,
) -> tuple[Float[Tensor, "*head d_model out"], Float[Tensor, "*head out"] | None]:
    """Weight and bias that do on x C / scale what W, b do on the norm's output, in W's dtype."""
    # In float64: the only rounding left is the last one, back to the model's dtype.
    multiplier = (norm.multiplier * scale).to(W.device)
    folded = torch.empty_like(W, memory_format=torch.contiguous_format)
    bias = None if norm.bias is None else norm.bias.detach().double()
    b64 = None if bias is None else W.new_zeros(*W.shape[:-2], W.shape[-1], dtype=torch.float64)
    columns = max(1, _CHUNK // (W.numel() // W.shape[-1]))
    for start in range(0, W.shape[-1], columns):
        part = W[..., start : start + columns].double()
        if bias is not None and b64 is not None:
            b64[..., start : start + columns] = bias @ part
        part = part * multiplier[..., None]
        if norm.centred:
            part -= part.mean(-2, keepdim=True)
        folded[..., start : start + columns] = part
    if b64 is None:
        return folded, b
    return folded, (b64 if b is None else b64 + b.double()).to(W.dtype)


def _no_bias(leaf: str, W: Float[Tensor, "*head d_in out"]) -> Tensor:
    """The zero bias of a weight that came without one; b_O is one for all heads."""
    heads = () if leaf == "W_O" else W.shape[:-2]
    return W.new_zeros(*heads, W.shape[-1])


def _fold_writer(
    norm: NormMap, W: Float[Tensor, "*rows d"], is_bias: bool = False
) -> Float[Tensor, "*rows d"]:
    """Weight or bias of what writes into a norm, with the norm merged in, in its own dtype."""
    folded = W.double()
    if norm.centred:
        folded = folded - folded.mean(-1, keepdim=True)
    folded = folded * norm.multiplier.to(W.device)
    if is_bias and norm.bias is not None:
        folded = folded + norm.bias.detach()
    return folded.to(W.dtype)


def rescale_queries_and_keys(
    weights: MutableMapping[str, Tensor],
    block: str,
    ratio: float,
    bias: Float[Tensor, " d_model"] | None,
) -> None:
    """W_Q and W_K replaced by ones that read a norm that divides by `ratio` times the constant.

    So that queries, keys and values can share one norm: with r = ratio and a norm's gain a and
    bias b,  (x a + b) W + b_W  =  (x a / r + b) (r W) + [b_W + (1 - r) b W].
    A second call with 1 / ratio undoes it.
    """
    for leaf in ("Q", "K"):
        grouped = f"{block}.attn._W_{leaf}" in weights
        W_name, b_name = (f"{block}.attn.{'_' * grouped}{kind}_{leaf}" for kind in "Wb")
        given = weights[W_name]
        W = given.double()
        weights[W_name] = (W * ratio).to(given.dtype)
        if bias is not None:
            b = weights.get(b_name, _no_bias(W_name, given)).double()
            weights[b_name] = (b + (1 - ratio) * (bias.double() @ W)).to(given.dtype)
