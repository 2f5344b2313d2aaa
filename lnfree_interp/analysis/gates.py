"""The network with its attention patterns and neuron gates held: an affine map.

Given patterns and gates, an LN-free model is affine in its embeddings, and a direction of the
logits can be carried back to the tokens layer by layer. What a ReLU gate lets through is itself,
what a GELU neuron lets through is the secant post / pre, and a gated MLP is linear in what passes
the gate. Nothing has to be held for a norm: there is none, or it is constant.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import ComponentKind
from lnfree_interp.analysis.parts import onto_z
from lnfree_interp.analysis.reads import Activations, Read, read, read_names
from lnfree_interp.analysis.writes import Place, write_names
from lnfree_interp.models.running import run_and_keep

Stream = Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True, eq=False)
class HeldMLP:
    """An MLP with its gates held."""

    post: Float[Tensor, "batch pos neuron"]
    gate: Float[Tensor, "batch pos neuron"]
    """What a neuron's linear input is multiplied by."""
    linear: str
    """The hook of that input."""
    W_in: Float[Tensor, "d_model neuron"]
    b_in: Float[Tensor, "*batch neuron"]
    """What a neuron's activation has from biases: before its gate, the gate applied."""
    b_post: Float[Tensor, " neuron"]
    """The share of that which comes after the gate."""
    W_out: Float[Tensor, "neuron d_model"]
    b_out: Float[Tensor, " d_model"]
    before: Read

    def onto_post(self, u: Stream) -> Float[Tensor, "batch pos neuron"]:
        """A direction of the stream, as neurons' activations see it."""
        return u @ self.W_out.T

    def back(self, u: Stream) -> Stream:
        """A direction behind the MLP, in front of it."""
        return self.before.back((self.onto_post(u) * self.gate) @ self.W_in.T)


@dataclass(frozen=True, eq=False)
class HeldLayer:
    """One block with its pattern and gates held."""

    layer: int
    pattern: Float[Tensor, "batch head query key"]
    z: Float[Tensor, "batch pos head d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    b_V: Float[Tensor, "head d_head"]  # noqa: N815
    """With what the norm's bias adds."""
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"]  # noqa: N815
    before: Read
    mlp: HeldMLP | None

    def onto_z(self, u: Stream) -> Float[Tensor, "batch pos head d_head"]:
        """A direction of the stream, as heads' outputs see it."""
        return onto_z(u, self.W_O)

    def back(self, u: Stream) -> Stream:
        """A direction behind the attention, in front of it."""
        moved = einsum(
            self.pattern, self.onto_z(u), "b head query key, b query head k -> b key head k"
        )
        return self.before.back(einsum(moved, self.W_V, "b s head k, head d k -> b s d"))


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
    embeds: Mapping[ComponentKind, Stream]
    parallel: bool

    def back(
        self, direction: Stream, through_mlps: bool = True
    ) -> Iterator[tuple[HeldLayer, Stream, Stream, Stream]]:
        """From the last block to the first: the block, and a direction of the last stream as it is
        behind the block, where its attention writes, and before the block; not through MLPs if
        what they write is held."""
        u = direction
        for layer in reversed(self.layers):
            behind = u
            if layer.mlp is not None and through_mlps:
                u = u + layer.mlp.back(u)
            at_attn = behind if self.parallel else u
            u = u + layer.back(at_attn)
            yield layer, behind, at_attn, u


@torch.no_grad()
def hold(model: HookedTransformer, tokens: Int[Tensor, "batch pos"]) -> Held:
    """Run the model once and hold its patterns and gates.

    Args:
        model: LN-free; or not, if the caller holds live scales too (see `reads.held`).
        tokens: [batch, pos].
    """
    cfg = model.cfg
    n_layers = cfg.n_layers
    sites = [f"blocks.{i}.{site}" for i in range(n_layers) for site in ("ln1.v", "ln2")]
    sites = [site for site in sites if not (cfg.attn_only and site.endswith("ln2"))]
    names = {*write_names(model, "neuron", Place.last(model)), *read_names(model, sites)}
    for layer in range(n_layers):
        prefix = f"blocks.{layer}"
        names |= {f"{prefix}.attn.hook_pattern", f"{prefix}.hook_resid_pre"}
        names |= {f"{prefix}.mlp.hook_pre"} if not cfg.attn_only else set()
        names |= {f"{prefix}.hook_resid_mid"} if not cfg.parallel_attn_mlp else set()
    last, cache = run_and_keep(model, tokens, names, n_layers)
    layers = []
    for layer, block in enumerate(model.blocks):
        prefix, attn = f"blocks.{layer}", block.attn
        before = read(model, cache, f"{prefix}.ln1.v")
        b_V = attn.b_V
        if before.bias is not None:
            b_V = b_V + einsum(before.bias, attn.W_V, "d, head d k -> head k")
        pattern, z = (cache[f"{prefix}.attn.hook_{x}"] for x in ("pattern", "z"))
        mlp = None if cfg.attn_only else _hold_mlp(model, cache, layer)
        layers.append(HeldLayer(layer, pattern, z, attn.W_V, b_V, attn.W_O, attn.b_O, before, mlp))
    streams = (*(cache[f"blocks.{i}.hook_resid_pre"] for i in range(n_layers)), last)
    mids = () if cfg.parallel_attn_mlp or cfg.attn_only else tuple(
        cache[f"blocks.{i}.hook_resid_mid"] for i in range(n_layers)
    )  # fmt: skip
    embeds: dict[ComponentKind, Tensor] = {"embed": cache["hook_embed"]}
    if "hook_pos_embed" in cache:
        embeds["pos_embed"] = cache["hook_pos_embed"]
    return Held(tuple(layers), streams, mids, embeds, cfg.parallel_attn_mlp)


def _hold_mlp(model: HookedTransformer, cache: Activations, layer: int) -> HeldMLP:
    mlp: Any = model.blocks[layer].mlp
    prefix = f"blocks.{layer}"
    before = read(model, cache, f"{prefix}.ln2")
    pre, post = (cache[f"{prefix}.mlp.hook_{x}"] for x in ("pre", "post"))
    shift = 0 if before.bias is None else before.bias @ mlp.W_in
    if model.cfg.gated_mlp:
        gate, linear, b_post = mlp.act_fn(pre), "hook_pre_linear", mlp.b_in
        b_in = b_post + gate * shift
    else:
        gate, linear, b_post = torch.where(pre == 0, 0.0, post / pre), "hook_pre", 0 * mlp.b_in
        b_in = gate * (mlp.b_in + shift)
    return HeldMLP(
        post, gate, f"{prefix}.mlp.{linear}", mlp.W_in, b_in, b_post, mlp.W_out, mlp.b_out, before
    )
