"""What a component writes, measured: the difference that it makes in a run of the model.

The measurement uses neither the levels nor the weights, so it checks both.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import get_act_name

from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.view import View
from lnfree_interp.models.running import Edit


@torch.no_grad()
def by_ablation(
    view: View, tokens: Int[Tensor, "batch pos"], component: Component
) -> Float[Tensor, "batch pos d_model"]:
    """What a component adds to the stream, measured by leaving it out.

    Args:
        view: The view of a model in any form.
        tokens: Token ids, [batch, pos].
        component: An embedding, a head (also of one source token), a neuron, a sublayer, a layer or
            a bias.
    """
    kind, layer, index = component.kind, component.layer, component.index
    if layer is None:
        return _kept(view, tokens, f"hook_{kind}", 0)
    if kind in ("attn_out", "mlp_out"):
        return _kept(view, tokens, get_act_name(kind, layer), layer)
    if kind == "layer":
        after, before = (_kept(view, tokens, get_act_name(f"resid_{x}", layer), layer)
                         for x in ("post", "pre"))  # fmt: skip
        return after - before
    within = "post" if kind in ("neuron", "b_out") else "z"
    changed = get_act_name(within, layer)
    written = get_act_name("mlp_out" if within == "post" else "attn_out", layer)
    if kind in ("b_O", "b_out"):  # what is written when nothing is active
        return _kept(view, tokens, written, layer, {changed: torch.zeros_like})
    moved: Tensor | None = None
    if kind == "b_V":
        weights = _kept(view, tokens, get_act_name("pattern", layer), layer)[:, index]
        moved = weights.sum(-1, keepdim=True) * _value_bias(view, tokens, layer)[index]
    elif component.pos is not None:
        moved = _moved(view, tokens, component)

    def leave_out(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, index] = 0 if moved is None else x[:, :, index] - moved
        return x

    whole = _kept(view, tokens, written, layer)
    return whole - _kept(view, tokens, written, layer, {changed: leave_out})


def _kept(
    view: View, tokens: Tensor, name: str, layer: int, edits: dict[str, Edit] | None = None
) -> Tensor:
    return view.run(tokens, [name], stop=layer + 1, edits=edits)[1][name]


def _value_bias(view: View, tokens: Tensor, layer: int) -> Float[Tensor, "head d_head"]:
    """The values that a head computes from a stream of zeros."""
    name = get_act_name("v", layer)
    nothing = torch.zeros_like(_kept(view, tokens, "hook_embed", 0))[:1, :1]
    _, found = view.run(nothing, [name], start=layer, stop=layer + 1)
    v = found[name][0, 0]
    return v.repeat_interleave(view.cfg.n_heads // len(v), dim=0)


def _moved(
    view: View, tokens: Int[Tensor, "batch pos"], head: Component
) -> Float[Tensor, "batch pos d_head"]:
    """What a head moves from one token to every position, without its value bias."""
    assert head.layer is not None
    assert head.index is not None
    v, pattern = (_kept(view, tokens, get_act_name(x, head.layer), head.layer)
                  for x in ("v", "pattern"))  # fmt: skip
    value = v[:, head.pos, head.index * v.shape[2] // pattern.shape[1]]
    value = value - _value_bias(view, tokens, head.layer)[head.index]
    return pattern[:, head.index, :, head.pos, None] * value[:, None]
