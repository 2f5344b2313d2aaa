"""Affine norms merged into the weights around them.

For an affine norm with multiplier a (gain over sigma) and bias b, and a reader W, b_W of its
output, with C = I - 11^T/d (the identity for a norm that does not centre):

    ((x C) * a + b) W + b_W  =  x [C diag(a) W]  +  [b_W + b W]

and for one that stands behind a weight, on a sublayer's output or on queries and keys:

    ((x W + b_W) C) * a + b  =  x [W C diag(a)]  +  [(b_W C) * a + b]

A factor for each channel on the residual branch, s -> g * s + f(s), is a change of the stream's
units: all behind it is read times g, and written divided by g.

Exact in real arithmetic, on every input. Nothing else that writes to the residual stream changes,
so its activations stay those of the model before. (2409.13710; docs/algebra.md)
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformerConfig

from lnfree_interp.errors import NormSiteError
from lnfree_interp.models.norm_map import NormMap
from lnfree_interp.models.site_names import whole_norm

Form = Literal["folded", "frozen"]
"""What is left of the norms: nothing, or division by a constant."""

# Which norm feeds a weight that reads the stream, by the weight's last name.
_STREAM = {
    "W_Q": "ln1.qk",
    "W_K": "ln1.qk",
    "W_V": "ln1.v",
    "W_in": "ln2",
    "W_gate": "ln2",
    "W_U": "ln_final",
}
# All that feeds a weight, and all that its output goes through, from the weight outwards.
_BEFORE = {leaf: (kind,) for leaf, kind in _STREAM.items()} | {
    "W_O": ("attn.inner", "attn.head_scale"),
    "W_out": ("mlp.inner",),
}
_AFTER = {
    "W_Q": ("attn.q_norm",),
    "W_K": ("attn.k_norm",),
    "W_O": ("attn.chunk_scale", "ln1_post"),
    "W_out": ("ln2_post",),
}

WRITERS = ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out")
"""What writes to the residual stream, by the weight's last name."""

WITHIN = ("attn.inner", "mlp.inner", "ln1_post", "ln2_post")
"""The kinds of norms between what a sublayer computes and the stream: they stand around W_O and
W_out, so that the parts of the stream are linear in heads and neurons only once they are affine."""

_CHUNK = 2**21
"""Elements that are folded in float64 at once, to keep the peak of memory low."""

ConstantNorms = Mapping[str, NormMap]
"""An affine norm for every site, by its name: `blocks.0.ln1.qk`, `blocks.0.ln1.v`, ...; and what
the scalers multiply by, in the same words."""


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
        b_name = name.replace("W_", "b_")
        b = weights.pop(b_name, None) if b_name != name else None
        shape = W.shape
        for before in _sites(block, _BEFORE.get(leaf, ())):
            if before in norms:
                rows = W.flatten(0, 1) if leaf == "W_O" else W  # one norm for all heads
                rows, b = _fold_reader(norms[before], scales.get(whole_norm(before), 1.0), rows, b)
                W = rows.view(shape)
        for after in _sites(block, _AFTER.get(leaf, ())):
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
        NormSiteError: where queries and keys would divide the first token by another multiple of
            their constant than values.
    """
    firsts: dict[str, float] = {}
    scales = frozen_scales(norms)
    for site, norm in norms.items():
        assert norm.scale is not None
        if not reads_stream(site):
            continue
        name = whole_norm(site)
        first = scales[name] * ((norm.first or norm.scale) / norm.scale)
        if not math.isclose(firsts.setdefault(name, first), first, rel_tol=1e-9):
            raise NormSiteError(
                f"the two halves of {name} divide first tokens by different multiples of their "
                "constants, and are one norm in this form: give both halves the same two constants"
            )
    return {name: first for name, first in firsts.items() if first != scales[name]}


def require_foldable_behind(norms: ConstantNorms) -> None:
    """Refuse norms that no form can hold: those that are merged with a weight, and divide the
    first token by a constant of its own.

    Raises:
        NormSiteError: naming the first one.
    """
    for site, norm in norms.items():
        if norm.first is not None and not reads_stream(site):
            raise NormSiteError(
                f"{site} divides first tokens by a constant of their own, and stands behind a "
                f"weight: freeze it with one constant, freeze_site(model, {site!r}, sigma)"
            )


def require_gates_without_bias(cfg: HookedTransformerConfig, norms: Mapping[str, NormMap]) -> None:
    """Refuse a norm with a bias before a gated MLP: no weight of a stock model can hold what the
    gate reads of it.

    Raises:
        NormSiteError: naming the first one.
    """
    for site, norm in norms.items():
        if cfg.gated_mlp and site.endswith(".ln2") and norm.bias is not None:
            raise NormSiteError(
                f"{site} has a bias and stands before a gated MLP, whose gate has none, so that it "
                "can be frozen and not folded: choose a map without a bias, lf.to_map(..., "
                "bias=False)"
            )


def residual_gauge(norms: ConstantNorms, n_layers: int) -> list[Float[Tensor, " d_model"]] | None:
    """What the stream before each block, and behind the last, is multiplied by through all the
    `resid_scale` before it; None for a model without any.

    Raises:
        NormSiteError: if a factor is zero, so that a channel of the stream ends there.
    """
    found = {layer: norms.get(f"blocks.{layer}.resid_scale") for layer in range(n_layers)}
    every = [norm.multiplier for norm in found.values() if norm is not None]
    if not every:
        return None
    gauge = [torch.ones_like(every[0])]
    for layer, norm in found.items():
        factors = torch.ones_like(every[0]) if norm is None else norm.multiplier
        if not factors.all():
            raise NormSiteError(
                f"blocks.{layer}.resid_scale multiplies {int((factors == 0).sum())} channels by "
                "zero, and no weight can say that in its place: give them another factor"
            )
        gauge.append(gauge[-1] * factors)
    return gauge


def in_gauge(
    weights: Iterable[tuple[str, Tensor]], gauge: Sequence[Float[Tensor, " d_model"]]
) -> Iterator[tuple[str, Tensor]]:
    """Weights of a model whose stream is divided by `residual_gauge`, so that nothing scales it.

    Exact where the stream is read by affine maps alone; a live norm would read another stream.
    """
    for name, W in weights:
        leaf = name.rpartition(".")[2].lstrip("_")
        match = re.match(r"blocks\.(\d+)\.", name)
        layer = int(match[1]) if match else len(gauge) - 1
        if leaf in ("W_O", "b_O", "W_out", "b_out"):  # an MLP writes behind its block's resid_scale
            factors = gauge[layer + leaf.endswith("out")].to(W.device)
            yield name, (W.double() / factors).to(W.dtype)
        elif is_reader(name):
            yield name, (W.double() * gauge[layer].to(W.device)[:, None]).to(W.dtype)
        else:
            yield name, W


def reads_stream(site: str) -> bool:
    """Whether the norm at a site stands before weights that read the stream."""
    return site.endswith(tuple(_STREAM.values()))


def is_reader(name: str) -> bool:
    """Whether a weight of that name reads the stream through a norm."""
    return name.rpartition(".")[2].lstrip("_") in _STREAM


def writes_to_stream(name: str) -> bool:
    """Whether a parameter writes to the residual stream, by its name."""
    return name.rpartition(".")[2].lstrip("_") in WRITERS


def _sites(block: str, kinds: Sequence[str]) -> list[str]:
    """The names of places in a block; of those outside of blocks for none."""
    return [f"{block}.{kind}" if block else kind for kind in kinds]


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
