"""The residual stream taken apart, projected onto a direction without ever leaving it.

The stream before the final norm is a sum: embeddings, every head, every neuron, every bias. To
project the parts onto a direction u, u is carried back through W_O and W_out and meets z and the
neuron activations there; no [component, batch, pos, d_model] is ever formed.
"""

from collections.abc import Mapping

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import Component, Level
from lnfree_interp.errors import UnsupportedModelError


def require_decomposable(model: HookedTransformer) -> None:
    """Refuse models whose stream is not the plain sum that `project_residual` assumes.

    Raises:
        UnsupportedModelError: for parts that would be missing from the sum.
    """
    cfg = model.cfg
    unsupported = {
        "attention-only blocks": cfg.attn_only,
        "norms after the sublayers": cfg.use_normalization_before_and_after,
        "a norm after the embedding": cfg.post_embedding_ln,
        f"{cfg.positional_embedding_type!r} positions": cfg.positional_embedding_type != "standard",
        "gated MLPs": cfg.gated_mlp,
        "mixtures of experts": cfg.num_experts is not None,
        "a soft cap on the logits": cfg.output_logits_soft_cap > 0,
    }
    if found := [what for what, is_so in unsupported.items() if is_so]:
        raise UnsupportedModelError(f"cannot take apart a model with {', '.join(found)}")


def cached_names(model: HookedTransformer, level: Level) -> list[str]:
    """The activations that `project_residual` needs."""
    per_block = {
        "block": ["hook_attn_out", "hook_mlp_out"],
        "head": ["attn.hook_z", "hook_mlp_out"],
        "neuron": ["attn.hook_z", "mlp.hook_post"],
    }[level]
    blocks = [f"blocks.{i}.{name}" for i in range(model.cfg.n_layers) for name in per_block]
    return ["hook_embed", "hook_pos_embed", *blocks]


def project_residual(
    model: HookedTransformer,
    cache: Mapping[str, Tensor],
    direction: Float[Tensor, "batch pos d_model"],
    level: Level,
) -> tuple[Float[Tensor, "component batch pos"], tuple[Component, ...]]:
    """Every part of the final residual stream, projected onto a direction per position.

    Args:
        model: Whose weights to carry the direction through.
        cache: The activations named by `cached_names`, at the direction's positions.
        direction: [batch, pos, d_model], what to project onto.
        level: `"block"`: attention and MLP of each layer. `"head"`: attention by head, its output
            bias b_O apart. `"neuron"`: as head, and MLPs by neuron, their bias b_out apart. A
            head's part holds its value bias b_V, since attention weights sum to one.

    Returns:
        Values [component, batch, pos] and what each row is, in the order of computation.
    """
    values: list[Float[Tensor, "part batch pos"]] = []
    components: list[Component] = []

    def add(parts: Tensor, kinds: list[Component]) -> None:
        values.append(parts)
        components.extend(kinds)

    def whole(name: str, component: Component) -> None:
        add((cache[name] * direction).sum(-1)[None], [component])

    def bias(b: Float[Tensor, " d_model"], component: Component) -> None:
        add((direction @ b)[None], [component])

    whole("hook_embed", Component("embed"))
    whole("hook_pos_embed", Component("pos_embed"))
    for layer, block in enumerate(model.blocks):
        prefix = f"blocks.{layer}"
        if level == "block":
            whole(f"{prefix}.hook_attn_out", Component("attn_out", layer))
        else:
            onto_z = einsum(
                block.attn.W_O,
                direction,
                "head d_head d_model, batch pos d_model -> head batch pos d_head",
            )
            heads = einsum(
                cache[f"{prefix}.attn.hook_z"],
                onto_z,
                "batch pos head d_head, head batch pos d_head -> head batch pos",
            )
            add(heads, [Component("head", layer, head) for head in range(len(heads))])
            bias(block.attn.b_O, Component("b_O", layer))
        if level == "neuron":
            neurons = (cache[f"{prefix}.mlp.hook_post"] * (direction @ block.mlp.W_out.T)).movedim(
                -1, 0
            )
            add(neurons, [Component("neuron", layer, neuron) for neuron in range(len(neurons))])
            bias(block.mlp.b_out, Component("b_out", layer))
        else:
            whole(f"{prefix}.hook_mlp_out", Component("mlp_out", layer))
    return torch.cat(values), tuple(components)
