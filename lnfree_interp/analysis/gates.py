"""The network with its attention patterns and neuron gates held: an affine map.

Given patterns and gates, an LN-free model is affine in its embeddings, and a direction of the
logits can be carried back to the tokens layer by layer. What a ReLU gate lets through is itself,
what a GELU neuron lets through is the secant post / pre, and a gated MLP is linear in what passes
the gate. Nothing has to be held for a norm: there is none, or it is constant.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.parts import onto_z
from lnfree_interp.analysis.reads import Read, read, read_names
from lnfree_interp.analysis.writes import Place, write_names

Stream = Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True, eq=False)
class HeldLayer:
    """One block with its pattern and gates held."""

    layer: int
    pattern: Float[Tensor, "batch head query key"]
    z: Float[Tensor, "batch pos head d_head"]
    post: Float[Tensor, "batch pos neuron"] | None
    gate: Float[Tensor, "batch pos neuron"] | None
    """What a neuron's linear input is multiplied by."""
    W_V: Float[Tensor, "head d_model d_head"]
    b_V: Float[Tensor, "head d_head"]  # noqa: N815
    """With what the norm's bias adds."""
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"]  # noqa: N815
    W_in: Float[Tensor, "d_model neuron"] | None
    b_in: Float[Tensor, "*batch neuron"] | None
    """What a neuron's activation has from biases: before its gate, the gate applied."""
    W_out: Float[Tensor, "neuron d_model"] | None
    b_out: Float[Tensor, " d_model"] | None
    before_attn: Read
    before_mlp: Read | None

    def onto_z(self, u: Stream) -> Float[Tensor, "batch pos head d_head"]:
        """A direction of the stream, as heads' outputs see it."""
        return onto_z(u, self.W_O)

    def onto_post(self, u: Stream) -> Float[Tensor, "batch pos neuron"]:
        """The same for neurons' activations."""
        assert self.W_out is not None
        return u @ self.W_out.T

    def back_attn(self, u: Stream) -> Stream:
        """A direction behind the attention, in front of it."""
        moved = einsum(
            self.pattern, self.onto_z(u), "b head query key, b query head k -> b key head k"
        )
        return self.before_attn.back(einsum(moved, self.W_V, "b s head k, head d k -> b s d"))

    def back_mlp(self, u: Stream) -> Stream:
        """A direction behind the MLP, in front of it."""
        assert self.W_in is not None
        assert self.before_mlp is not None
        return self.before_mlp.back((self.onto_post(u) * self.gate) @ self.W_in.T)


@dataclass(frozen=True, eq=False)
class Held:
    """A forward pass with its patterns and gates, and the directions of a logit at every layer.

    Attributes:
        layers: The blocks.
        streams: [batch, pos, d_model] before each block, and before the final norm.
        embeds: What the embeddings wrote, by name.
    """

    layers: tuple[HeldLayer, ...]
    streams: tuple[Stream, ...]
    mids: tuple[Stream, ...]
    embeds: Mapping[str, Stream]
    parallel: bool

    def back(self, direction: Stream) -> Iterator[tuple[HeldLayer, Stream, Stream, Stream]]:
        """From the last block to the first: the block, and a direction of the last stream as it is
        behind the block, where its attention writes, and before the block."""
        u = direction
        for layer in reversed(self.layers):
            behind = u
            if layer.W_in is not None:
                u = u + layer.back_mlp(u)
            at_attn = behind if self.parallel else u
            u = u + layer.back_attn(at_attn)
            yield layer, behind, at_attn, u


@torch.no_grad()
def hold(model: HookedTransformer, tokens: Int[Tensor, "batch pos"]) -> Held:
    """Run the model once and hold its patterns and gates.

    Args:
        model: LN-free; or not, if the caller holds live scales too (see `reads.held`).
        tokens: [batch, pos].
    """
    cfg = model.cfg
    gated, n_layers = cfg.gated_mlp, cfg.n_layers
    sites = [f"blocks.{i}.{site}" for i in range(n_layers) for site in ("ln1.v", "ln2")]
    sites = [site for site in sites if not (cfg.attn_only and site.endswith("ln2"))]
    names = {*write_names(model, "neuron", Place.last(model)), *read_names(model, sites)}
    for layer in range(n_layers):
        prefix = f"blocks.{layer}"
        names |= {f"{prefix}.attn.hook_pattern", f"{prefix}.hook_resid_pre"}
        names |= {f"{prefix}.mlp.hook_pre"} if not cfg.attn_only else set()
        names |= {f"{prefix}.hook_resid_mid"} if not cfg.parallel_attn_mlp else set()
    last, cache = model.run_with_cache(
        tokens, stop_at_layer=n_layers, names_filter=lambda name: name in names
    )
    layers = []
    for layer, block in enumerate(model.blocks):
        prefix, attn = f"blocks.{layer}", block.attn
        before_attn = read(model, cache, f"{prefix}.ln1.v")
        b_V = attn.b_V
        if before_attn.bias is not None:
            b_V = b_V + einsum(before_attn.bias, attn.W_V, "d, head d k -> head k")
        post = gate = W_in = b_in = W_out = b_out = before_mlp = None
        if not cfg.attn_only:
            before_mlp = read(model, cache, f"{prefix}.ln2")
            pre, post = (cache[f"{prefix}.mlp.hook_{x}"] for x in ("pre", "post"))
            W_in, W_out, b_out = block.mlp.W_in, block.mlp.W_out, block.mlp.b_out
            shift = 0 if before_mlp.bias is None else before_mlp.bias @ W_in
            if gated:
                gate = block.mlp.act_fn(pre)
                b_in = block.mlp.b_in + gate * shift
            else:
                gate = torch.where(pre == 0, 0.0, post / pre)
                b_in = gate * (block.mlp.b_in + shift)
        layers.append(
            HeldLayer(
                layer,
                cache[f"{prefix}.attn.hook_pattern"],
                cache[f"{prefix}.attn.hook_z"],
                post,
                gate,
                attn.W_V,
                b_V,
                attn.W_O,
                attn.b_O,
                W_in,
                b_in,
                W_out,
                b_out,
                before_attn,
                before_mlp,
            )
        )
    streams = (*(cache[f"blocks.{i}.hook_resid_pre"] for i in range(n_layers)), last)
    mids = () if cfg.parallel_attn_mlp or cfg.attn_only else tuple(
        cache[f"blocks.{i}.hook_resid_mid"] for i in range(n_layers)
    )  # fmt: skip
    embeds = {"embed": cache["hook_embed"]}
    if "hook_pos_embed" in cache:
        embeds["pos_embed"] = cache["hook_pos_embed"]
    return Held(tuple(layers), streams, mids, embeds, cfg.parallel_attn_mlp)
