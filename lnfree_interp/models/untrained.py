"""Models before training: the shape of a given one, other sizes, GPT-2's initial weights."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from lnfree_interp.errors import UnsupportedModelError
from lnfree_interp.models.construct import hooked_transformer
from lnfree_interp.models.running import require_hooked
from lnfree_interp.models.sites import has_norm_sites, has_tied_unembedding

_STD = 0.02
"""GPT-2's: the standard deviation of every weight; of what writes to the stream, divided by the
root of the number of sublayers."""


def untrained(
    like: HookedTransformer,
    *,
    seed: int = 0,
    n_layers: int | None = None,
    d_model: int | None = None,
    n_heads: int | None = None,
    d_mlp: int | None = None,
    n_ctx: int | None = None,
    scaled: bool = True,
) -> HookedTransformer:
    """A stock model with random weights, of the architecture and with the tokenizer of another one.

    Weights are drawn as for GPT-2: with a standard deviation of 0.02, W_O and W_out with that over
    sqrt(2 n_layers); biases are 0 and gains 1. The unembedding is tied if that of `like` is.

    Args:
        like: A stock model with live norms.
        seed: The seed of the weights.
        n_layers: The number of blocks. This and what follows is that of `like` by default.
        d_model: The width of the residual stream.
        n_heads: The number of attention heads, which share the width among them as before.
        d_mlp: The width of the MLPs. Default: as many times d_model as in `like`.
        n_ctx: The longest sequence.
        scaled: Whether W_O and W_out are smaller the more layers there are, as above. False: 0.02
            like all others, however many layers there are.

    Returns:
        The model, on the same device and in float32.

    Raises:
        UnsupportedModelError: if the sizes do not fit together, or `like` is no stock model with
            live norms.

    Source:
        GPT-2's initialisation, as in transformers.

    Examples:
        >>> small = lf.untrained(model, n_layers=2, d_model=32, n_heads=4, seed=1)
        >>> small.cfg.d_head, small.cfg.d_mlp, small.W_in.std().item() < 0.021
        (8, 128, True)
    """
    require_hooked(like)
    if has_norm_sites(like) or like.cfg.normalization_type not in ("LN", "RMS"):
        raise UnsupportedModelError(
            "a stock model with live norms and their gains is needed: give what lf.load(...) "
            "returned, and change the new model by lf.to_... afterwards"
        )
    cfg = _resized(like.cfg, n_layers, d_model, n_heads, d_mlp, n_ctx)
    tied = has_tied_unembedding(like)
    model = hooked_transformer(cfg, {}, like.tokenizer, complete=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, W in model.named_parameters():
            leaf = name.rpartition(".")[2].lstrip("_")
            if leaf.startswith("W_"):
                std = _STD
                if scaled and leaf in ("W_O", "W_out"):
                    std /= (2 * cfg.n_layers) ** 0.5
                W.copy_(torch.randn(W.shape, generator=generator) * std)
            else:
                W.fill_(1.0 if leaf == "w" else 0.0)
        if tied:
            model.unembed.W_U.copy_(model.W_E.T)
    return model


def _resized(
    old: HookedTransformerConfig, n_layers: int | None, d_model: int | None, n_heads: int | None,
    d_mlp: int | None, n_ctx: int | None,
) -> HookedTransformerConfig:  # fmt: skip
    sizes = {
        "n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "d_mlp": d_mlp, "n_ctx": n_ctx
    }  # fmt: skip
    if wrong := [f"{name}={x}" for name, x in sizes.items() if x is not None and x < 1]:
        raise UnsupportedModelError(f"{wrong[0]} was given: a size is 1 or more")
    new: dict[str, Any] = {name: x for name, x in sizes.items() if x is not None}
    width, heads = new.get("d_model", old.d_model), new.get("n_heads", old.n_heads)
    if width != old.d_model or heads != old.n_heads:
        # All heads together are as many times as wide as the stream as they were.
        d_head = Fraction(old.d_head * old.n_heads * width, old.d_model * heads)
        if d_head.denominator > 1:
            raise UnsupportedModelError(
                f"n_heads={heads} and d_model={width} give no whole d_head, but {d_head}: give a "
                "d_model that the heads can share"
            )
        new["d_head"] = int(d_head)
        if old.n_key_value_heads is not None:
            groups = old.n_heads // old.n_key_value_heads
            if heads % groups:
                raise UnsupportedModelError(
                    f"groups of {groups} heads share keys and values: n_heads={heads} is no "
                    "multiple of it"
                )
            new["n_key_value_heads"] = heads // groups
        if old.rotary_dim is not None:
            rotary = Fraction(new["d_head"] * old.rotary_dim, old.d_head)
            if rotary.denominator > 1 or rotary % 2:
                raise UnsupportedModelError(
                    f"rotary embeddings turn pairs of dimensions, and {rotary} of a d_head of "
                    f"{new['d_head']} would be turned: give a larger d_model, or fewer heads"
                )
            new["rotary_dim"] = int(rotary)
        new["attn_scale"] = old.attn_scale * (new["d_head"] / old.d_head) ** 0.5
        if old.d_mlp is not None and d_mlp is None:
            new["d_mlp"] = width * old.d_mlp // old.d_model
    if old.attn_types is not None and "n_layers" in new:
        types = list(old.attn_types)
        new["attn_types"] = [types[layer % len(types)] for layer in range(new["n_layers"])]
    return replace(old, **new, dtype=torch.float32, init_weights=False, seed=None, model_name="")
