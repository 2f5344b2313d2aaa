"""Variants that put norms and factors where there are none: NormFormer, Sub-LN, Peri-LN.

None of them is the function before: a norm of a sublayer's output changes it, whatever its gain.
Factors of 1 do not.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from transformer_lens import HookedTransformer

from lnfree_interp.errors import UnsupportedModelError
from lnfree_interp.models.inserting import set_map, set_scaler
from lnfree_interp.models.maps import map_name
from lnfree_interp.models.sites import get_norm, list_norm_sites, list_scalers
from lnfree_interp.variants.variant import Variant, made

HeadScale = Literal["before W_O", "after W_O"]
"""Where NormFormer's factor of a head acts: on the head's output, as in the paper; or on a chunk of
d_model / n_heads channels of what W_O gives, as in fairseq."""


def to_normformer(
    model: HookedTransformer,
    *,
    attn_norm: bool = True,
    mlp_norm: bool = True,
    head_scale: HeadScale | None = "before W_O",
    resid_scale: bool = True,
) -> Variant:
    """NormFormer: a norm of what attention writes, one inside the MLP, and factors.

        resid_mid  = resid_pre + LN(heads, each times its factor, through W_O)
        resid_post = factor * resid_mid + MLP with LN between activation and W_out

    The factors start at 1, the norms at gain 1 and bias 0; they are of the kind of the model's own.

    Args:
        model: Stock, or with norm sites.
        attn_norm: Whether there is the norm of what attention writes, at `ln1_post`.
        mlp_norm: Whether there is the norm inside the MLP, at `mlp.inner`.
        head_scale: Where the factors of heads act; None: there are none. The two places are not
            equivalent: they agree while the factors are 1.
        resid_scale: Whether each channel of the stream that goes past the MLP has a factor.

    Returns:
        A `Variant`, the same function only without both norms.

    Raises:
        UnsupportedModelError: for parallel blocks, for a model that has one of these norms or
            factors already, if nothing is asked for, or there is no such place for factors.

    Source:
        arXiv 2110.09456; factors behind W_O: fairseq

    Examples:
        >>> lf.to_normformer(model).same_function
        False
        >>> scaled = lf.to_normformer(model, attn_norm=False, mlp_norm=False)
        >>> scaled.same_function, scaled.error.absolute < 1e-3
        (True, True)
    """
    if head_scale is not None and head_scale not in get_args(HeadScale):
        raise UnsupportedModelError(
            f"head_scale={head_scale!r} is no place for the factors of heads: pass "
            f"{' or '.join(map(repr, get_args(HeadScale)))}, or None"
        )
    if not (attn_norm or mlp_norm or head_scale or resid_scale):
        raise UnsupportedModelError("nothing of NormFormer was asked for: leave one part on")
    _require_sequential(model, "NormFormer")

    def change(sited: HookedTransformer) -> tuple[str, ...]:
        steps = []
        if attn_norm:
            steps.append(_norms(sited, ["ln1_post"], "of what attention writes"))
        if mlp_norm:
            steps.append(_norms(sited, ["mlp.inner"], "between activation function and W_out"))
        if head_scale:
            kind = "attn.head_scale" if head_scale == "before W_O" else "attn.chunk_scale"
            steps.append(_factors(sited, kind, f"for each head, {head_scale}"))
        if resid_scale:
            steps.append(_factors(sited, "resid_scale", "for each channel that passes the MLP"))
        return tuple(steps)

    norms = attn_norm or mlp_norm
    return made("NormFormer", model, change, same_function=not norms)


def to_sub_ln(model: HookedTransformer, *, initialise: bool = False) -> Variant:
    """Sub-LN (Magneto): a norm before W_O, over all heads, and one before W_out, in each block.

    Args:
        model: Stock, or with norm sites.
        initialise: Whether to multiply the weights that the paper's initialisation enlarges by
            sqrt(log(2 n_layers)), see `magneto_init`; for a model that is to be trained from
            scratch.

    Returns:
        A `Variant`, another function.

    Raises:
        UnsupportedModelError: for a model that can have no norm sites.

    Source:
        arXiv 2210.06423; microsoft/torchscale

    Examples:
        >>> variant = lf.to_sub_ln(model)
        >>> [str(site) for site in lf.list_norm_sites(variant.model)][2:5]
        ['blocks.0.attn.inner', 'blocks.0.ln2', 'blocks.0.mlp.inner']
    """

    def change(sited: HookedTransformer) -> tuple[str, ...]:
        steps = [_norms(sited, ["attn.inner"], "of all heads before W_O")]
        if not sited.cfg.attn_only:
            steps.append(_norms(sited, ["mlp.inner"], "between activation function and W_out"))
        if initialise:
            gain = magneto_init(sited)
            steps.append(
                f"W_V, W_O, {_first_weight(sited)} and W_out times {gain:.4g}, queries and keys as "
                "they were"
            )
        return tuple(steps)

    return made("Sub-LN", model, change, same_function=False)


MAGNETO = ("attn.W_V", "attn._W_V", "attn.W_O", "mlp.W_out")
"""What Magneto's initialisation enlarges, by the ends of names: `v_proj`, `out_proj` and `fc2` of
torchscale, weights alone, since biases start at zero. `fc1` is another weight in gated MLPs:
`_first_weight`."""


def magneto_init(model: HookedTransformer) -> float:
    """Multiply W_V, W_O, W_in and W_out by sqrt(log(2 n_layers)), in place; in gated MLPs W_gate
    and not W_in.

    Args:
        model: Freshly initialised, a decoder. The paper's initial weights do not become smaller
            with depth: `lf.untrained(..., scaled=False)`.

    Returns:
        The factor.

    Source:
        arXiv 2210.06423: the gain of models with an encoder or a decoder alone

    Examples:
        >>> round(lf.magneto_init(lf.to_sub_ln(model).model), 3)
        1.442
    """
    gain = math.sqrt(math.log(2 * model.cfg.n_layers))
    enlarged = (*MAGNETO, f"mlp.{_first_weight(model)}")
    with torch.no_grad():
        for name, W in model.named_parameters():
            if name.endswith(enlarged):
                W.mul_(gain)
    return gain


def _first_weight(model: HookedTransformer) -> str:
    """The weight of an MLP that the activation function reads, `fc1`."""
    return "W_gate" if model.cfg.gated_mlp else "W_in"


def to_peri_ln(model: HookedTransformer) -> Variant:
    """Peri-LN: a norm of what each sublayer writes, beside the one of what it reads.

    Args:
        model: Stock, or with norm sites.

    Returns:
        A `Variant`, another function.

    Raises:
        UnsupportedModelError: for a model that can have no norm sites, or has these norms.

    Source:
        arXiv 2502.02732; Gemma 2 has such norms

    Examples:
        >>> [str(site) for site in lf.list_norm_sites(lf.to_peri_ln(model).model)][2:5]
        ['blocks.0.ln1_post', 'blocks.0.ln2', 'blocks.0.ln2_post']
    """

    def change(sited: HookedTransformer) -> tuple[str, ...]:
        kinds = ["ln1_post"] if sited.cfg.attn_only else ["ln1_post", "ln2_post"]
        return (_norms(sited, kinds, "of what each sublayer writes"),)

    return made("Peri-LN", model, change, same_function=False)


def _require_sequential(model: HookedTransformer, name: str) -> None:
    if model.cfg.parallel_attn_mlp or model.cfg.attn_only:
        raise UnsupportedModelError(
            f"{name} is not defined for blocks whose MLP does not follow the attention"
        )


def _norms(model: HookedTransformer, kinds: Sequence[str], where: str) -> str:
    like = map_name(get_norm(model, "ln_final").map)
    if there := [site for site in list_norm_sites(model) if site.kind in kinds]:
        raise UnsupportedModelError(f"this model has a norm at {there[0]} already")
    for layer in range(model.cfg.n_layers):
        for kind in kinds:
            set_map(model, f"blocks.{layer}.{kind}", like)
    return f"{like} {where}, gain 1"


def _factors(model: HookedTransformer, kind: str, where: str) -> str:
    if there := [name for name in list_scalers(model) if name.endswith(kind)]:
        raise UnsupportedModelError(f"this model has factors at {there[0]} already")
    for layer in range(model.cfg.n_layers):
        set_scaler(model, f"blocks.{layer}.{kind}")
    return f"a factor {where}, 1 at first"
