"""What a component writes, measured: the difference that it makes in a run of the model.

Independent of how `writes` takes the stream apart, and so a check on it.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import Component
from lnfree_interp.models.running import run_and_keep


@torch.no_grad()
def by_ablation(
    model: HookedTransformer, tokens: Int[Tensor, "1 pos"], component: Component
) -> Float[Tensor, "1 pos d_model"]:
    """What a component adds to the stream, by leaving it out.

    Args:
        model: Any form.
        tokens: [1, pos].
        component: Embedding, head (of one source token too), neuron, sublayer, layer or bias.
    """
    kind, layer, index = component.kind, component.layer, component.index
    if layer is None:
        return _activation(model, tokens, f"hook_{kind}", 1)
    prefix, stop = f"blocks.{layer}", layer + 1
    block: Any = model.blocks[layer]
    if kind in ("b_O", "b_out"):
        b = block.attn.b_O if kind == "b_O" else block.mlp.b_out
        return b.expand(1, tokens.shape[1], -1)
    if kind in ("attn_out", "mlp_out"):
        return _activation(model, tokens, f"{prefix}.hook_{kind}", stop)
    if kind == "layer":
        after, before = (
            _activation(model, tokens, f"{prefix}.hook_resid_{x}", stop) for x in ("post", "pre")
        )
        return after - before
    if kind == "neuron":
        changed, written = f"{prefix}.mlp.hook_post", f"{prefix}.hook_mlp_out"
    else:
        changed, written = f"{prefix}.attn.hook_z", f"{prefix}.hook_attn_out"
    moved = None
    if kind == "b_V":
        moved = block.attn.b_V[index]
    elif component.pos is not None:
        moved = _moved(model, tokens, component)

    def leave_out(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[:, :, index] = 0 if moved is None else x[:, :, index] - moved
        return x

    whole = _activation(model, tokens, written, stop)
    with model.hooks([(changed, leave_out)]):
        return whole - _activation(model, tokens, written, stop)


def _activation(model: HookedTransformer, tokens: Tensor, name: str, stop: int) -> Tensor:
    return run_and_keep(model, tokens, [name], stop)[1][name]


def _moved(
    model: HookedTransformer, tokens: Int[Tensor, "1 pos"], head: Component
) -> Float[Tensor, "pos d_head"]:
    """What a head moves from one token to every position, its value bias apart."""
    assert head.layer is not None
    assert head.index is not None
    v, pattern = (
        _activation(model, tokens, f"blocks.{head.layer}.attn.hook_{x}", head.layer + 1)[0]
        for x in ("v", "pattern")
    )
    value = v[head.pos, head.index * v.shape[1] // len(pattern)]
    value = value - model.blocks[head.layer].attn.b_V[head.index]
    return pattern[head.index, :, head.pos, None] * value
