"""Constant norms merged into the weights around them.

For a constant norm with gain a (the pretrained gain over sigma) and bias b, and a reader W, b_W of
its output, with C = I - 11^T/d (absent for RMSNorm):

    ((x C) * a + b) W + b_W  =  x [C diag(a) W]  +  [b_W + b W]

and for a constant RMSNorm (without bias) on a sublayer's output or on queries and keys, W diag(a),
b_W * a. Exact in real arithmetic, on every input. Nothing else that writes to the residual stream
changes, so its activations stay those of the model before. (2409.13710; docs/algebra.md)
"""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Form = Literal["folded", "frozen"]
"""What is left of the norms: nothing, or division by a constant."""

# Which norm feeds a weight, and which norm its output goes through, by the weight's last name.
_BEFORE = {
    "W_Q": "ln1.qk",
    "W_K": "ln1.qk",
    "W_V": "ln1.v",
    "W_in": "ln2",
    "W_gate": "ln2",
}
_AFTER = {"W_Q": "attn.q_norm", "W_K": "attn.k_norm", "W_O": "ln1_post", "W_out": "ln2_post"}

_CHUNK = 2**21
"""Elements that are folded in float64 at once, to keep the peak of memory low."""


@dataclass(frozen=True)
class ConstantNorm:
    """A norm that divides by a constant: x -> (x C) * gain + bias."""

    gain: Float[Tensor, " d"]
    """What each channel is multiplied by: the pretrained gain over sigma."""
    bias: Float[Tensor, " d"] | None
    sigma: float
    """The constant shown as `hook_scale` in the frozen form; any positive number is exact."""


ConstantNorms = Mapping[str, ConstantNorm]
"""By site, `blocks.0.ln1.qk`, or by norm, `blocks.0.ln1`, where both paths share one."""


def fold_weights(
    weights: MutableMapping[str, Tensor], norms: ConstantNorms, centred: bool, form: Form
) -> Iterator[tuple[str, Tensor]]:
    """TransformerLens weights with the norms merged in, one by one.

    Args:
        weights: All weights but the norms' own; emptied on the way.
        norms: A constant norm for every site.
        centred: Whether the norms subtract the mean (LayerNorm) or not (RMSNorm).
        form: In the frozen form readers keep a factor sigma, which `FrozenNorm` divides by.
    """
    # The largest first: while there are few others, its copy is no peak.
    for name in sorted(weights, key=lambda name: -weights[name].numel()):
        prefix, _, leaf = name.rpartition(".")
        leaf = leaf.lstrip("_")
        if leaf.startswith("b_"):
            continue  # with its weight; b_O and the like follow below
        block = prefix.rpartition(".")[0]
        W = weights.pop(name)
        before = _norm_at(norms, block, "ln_final" if leaf == "W_U" else _BEFORE.get(leaf))
        after = _norm_at(norms, block, _AFTER.get(leaf))
        b_name = name.replace("W_", "b_")
        b = weights.pop(b_name, None) if b_name != name else None
        if before is not None:
            scale = sigma_of(norms, block, leaf) if form == "frozen" else 1.0
            W, b = _fold_reader(before, centred, scale, W, b)
        if after is not None:
            W = _scaled_outputs(after, W)
            b = None if b is None else _scaled_outputs(after, b)
        yield name, W
        if b is not None:
            yield b_name, b
    yield from weights.items()


def _norm_at(norms: ConstantNorms, block: str, kind: str | None) -> ConstantNorm | None:
    if kind is None:
        return None
    name = f"{block}.{kind}" if block else kind
    if name not in norms and kind.startswith("ln1."):
        name = f"{block}.ln1"
    return norms.get(name)


def sigma_of(norms: ConstantNorms, block: str, leaf: str) -> float:
    """The `hook_scale` that a reader meets: one per norm module, that of the values for `ln1`."""
    kind = {"W_U": "ln_final", "W_in": "ln2", "W_gate": "ln2"}.get(leaf, "ln1.v")
    norm = _norm_at(norms, block, kind)
    assert norm is not None
    return norm.sigma


def _fold_reader(
    norm: ConstantNorm,
    centred: bool,
    scale: float,
    W: Float[Tensor, "*head d_model out"],
    b: Float[Tensor, "*head out"] | None,
) -> tuple[Float[Tensor, "*head d_model out"], Float[Tensor, "*head out"] | None]:
    """Weight and bias that do on x C / scale what W, b do on the norm's output, in W's dtype."""
    # In float64: the only rounding left is the last one, back to the model's dtype.
    gain = norm.gain.double()
    folded = torch.empty_like(W, memory_format=torch.contiguous_format)
    bias = None if norm.bias is None else norm.bias.double()
    b64 = None if bias is None else W.new_zeros(*W.shape[:-2], W.shape[-1], dtype=torch.float64)
    columns = max(1, _CHUNK // (W.numel() // W.shape[-1]))
    for start in range(0, W.shape[-1], columns):
        part = W[..., start : start + columns].double()
        if bias is not None and b64 is not None:
            b64[..., start : start + columns] = bias @ part
        part = part * (gain * scale)[:, None]
        if centred:
            part -= part.mean(-2, keepdim=True)
        folded[..., start : start + columns] = part
    if b64 is None:
        return folded, b
    return folded, (b64 if b is None else b64 + b.double()).to(W.dtype)


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
        W, b = weights[W_name].double(), weights[b_name]
        if bias is not None:
            weights[b_name] = (b.double() + (1 - ratio) * (bias.double() @ W)).to(b.dtype)
        weights[W_name] = (W * ratio).to(b.dtype)


def _scaled_outputs(norm: ConstantNorm, W: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    return (W.double() * norm.gain.double()).to(W.dtype)
