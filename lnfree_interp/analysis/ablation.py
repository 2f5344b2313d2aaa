"""What a component writes, measured: the difference that it makes in a run of the model.

Independent of how `writes` takes the stream apart, and so a check on it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import Component


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
    layer = component.layer
    if layer is None:
        name = f"hook_{component.kind}"
        _, cache = model.run_with_cache(tokens, stop_at_layer=1, names_filter=name)
        return cache[name]
    prefix = f"blocks.{layer}"
    if component.kind in ("head", "b_V", "neuron"):
        inside = (
            f"{prefix}.mlp.hook_post" if component.kind == "neuron" else f"{prefix}.attn.hook_z"
        )
        outside = f"{prefix}.hook_{'mlp' if component.kind == 'neuron' else 'attn'}_out"
    else:
        inside = ""
        outside = f"{prefix}.hook_{'attn' if component.kind in ('attn_out', 'b_O') else 'mlp'}_out"
    found: list[Tensor] = []

    def run(change: Callable[[Tensor], None] | None) -> Tensor:
        def look(x: Tensor, hook) -> Tensor:
            if hook.name == outside:
                found.append(x.clone())
                return x
            x = x.clone()
            if change is not None:
                change(x)
            return x

        wanted = [name for name in (inside, outside) if name]
        model.run_with_hooks(
            tokens, stop_at_layer=layer + 1, fwd_hooks=[(name, look) for name in wanted]
        )
        return found.pop()

    def without(x: Tensor) -> None:
        index, attn = component.index, model.blocks[layer].attn
        if component.kind == "neuron":
            x[..., index] = 0
        elif component.kind == "b_V":
            x[:, :, index] -= attn.b_V[index]
        elif component.pos is None:
            x[:, :, index] = 0
        else:
            inner = [f"{prefix}.attn.hook_{a}" for a in ("v", "pattern")]
            _, cache = model.run_with_cache(
                tokens, stop_at_layer=layer + 1,
                names_filter=lambda name: name in inner,
            )  # fmt: skip
            v, pattern = (cache[f"{prefix}.attn.hook_{a}"][0] for a in ("v", "pattern"))
            group = index * v.shape[1] // len(pattern)
            moved = v[component.pos, group] - attn.b_V[index]
            x[0, :, index] -= pattern[index, :, component.pos, None] * moved

    if component.kind == "b_O":
        return model.blocks[layer].attn.b_O.expand(1, tokens.shape[1], -1)
    if component.kind == "b_out":
        return model.blocks[layer].mlp.b_out.expand(1, tokens.shape[1], -1)
    if component.kind == "layer":
        _, cache = model.run_with_cache(tokens, stop_at_layer=layer + 1)
        return cache[f"{prefix}.hook_resid_post"] - cache[f"{prefix}.hook_resid_pre"]
    return run(None) if not inside else run(None) - run(without)
