"""The transformer block while norms are being removed.

TransformerLens' own block and attention, with two differences: `ln1` is two sites (`SplitNorm`),
and attention is computed fused, by one q/k/v product and `scaled_dot_product_attention`, while no
hook reads scores or patterns. With such a hook it is computed as in TransformerLens, so that the
hook sees and can change the same activations.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.components import (
    Attention,
    Embed,
    GroupedQueryAttention,
    TransformerBlock,
    Unembed,
)
from transformer_lens.components.abstract_attention import AbstractAttention
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import repeat_along_head_dimension
from transformer_lens.utilities.activation_functions import gelu_pytorch_tanh

from lnfree_interp.models.norms import Norm, SplitNorm
from lnfree_interp.models.running import is_watched


class _Fused(AbstractAttention):
    """Attention that materialises scores only when a hook reads them."""

    q_norm: Any
    k_norm: Any

    @classmethod
    def from_stock(cls, stock: AbstractAttention) -> "_Fused":
        """Take over the parameters and buffers of a stock attention, without a copy."""
        fused = cls(stock.cfg, stock.attn_type, stock.layer_id)
        for name, parameter in stock.named_parameters(recurse=False):
            setattr(fused, name, parameter)
        for name, buffer in stock.named_buffers(recurse=False):
            setattr(fused, name, buffer)
        if stock.cfg.use_qk_norm:
            norms: Any = stock
            fused.q_norm, fused.k_norm = Norm(norms.q_norm), Norm(norms.k_norm)
        return fused

    def _fusible(self, query_input: Tensor, *arguments: object) -> bool:
        cfg = self.cfg
        return (
            query_input.ndim == 3
            and all(argument is None for argument in arguments)
            and not cfg.use_attn_result
            and not cfg.attn_scores_soft_cap > 0
            and not is_watched(self.hook_attn_scores)
            and not is_watched(self.hook_pattern)
        )

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch pos *kv_head d_model"],
        value_input: Float[Tensor, "batch pos *kv_head d_model"],
        past_kv_cache_entry: Any = None,
        additive_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention writes to the stream, [batch, pos, d_model], as `Attention.forward`."""
        unusual: Any = (past_kv_cache_entry, additive_attention_mask, attention_mask, position_bias)
        if not self._fusible(query_input, *unusual):
            return super().forward(query_input, key_input, value_input, *unusual)
        q, k, v = self._project(query_input, key_input, value_input)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        if self.cfg.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.cfg.positional_embedding_type == "rotary":
            q = self.hook_rot_q(self.apply_rotary(q)).to(v.dtype)
            k = self.hook_rot_k(self.apply_rotary(k)).to(v.dtype)
        window = self._window(q.shape[1]) if self.attn_type == "local" else None
        z = F.scaled_dot_product_attention(
            *(rearrange(x, "batch pos head d_head -> batch head pos d_head") for x in (q, k, v)),
            attn_mask=window,
            is_causal=window is None,
            scale=1 / self.attn_scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        z = self.hook_z(rearrange(z, "batch head pos d_head -> batch pos head d_head"))
        return F.linear(z.flatten(-2), self.W_O.flatten(0, 1).T, self.b_O)

    def _window(self, n_pos: int) -> Tensor:
        """[pos, pos], True where a query sees a key: the last `window_size` positions."""
        position = torch.arange(n_pos, device=self.W_O.device)
        behind = position[:, None] - position
        assert self.cfg.window_size is not None
        return (behind >= 0) & (behind < self.cfg.window_size)

    def _project(
        self, query_input: Tensor, key_input: Tensor, value_input: Tensor
    ) -> list[Float[Tensor, "batch pos _ d_head"]]:
        """q, k, v by one product for each run of projections that read the same input."""

        def project(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
            W = rearrange(torch.cat(list(weights)), "head d_model d_head -> (head d_head) d_model")
            y = F.linear(x, W, torch.cat(list(biases)).flatten())
            y = rearrange(
                y, "batch pos (head d_head) -> batch pos head d_head", d_head=self.cfg.d_head
            )
            return list(y.split([len(W) for W in weights], dim=2))

        grouped = isinstance(self, GroupedQueryAttention)
        W = [self.W_Q, *((self._W_K, self._W_V) if grouped else (self.W_K, self.W_V))]
        b = [self.b_Q, *((self._b_K, self._b_V) if grouped else (self.b_K, self.b_V))]
        if query_input is key_input and key_input is value_input:
            return project(query_input, W, b)
        if query_input is key_input:
            return project(query_input, W[:2], b[:2]) + project(value_input, W[2:], b[2:])
        inputs = (query_input, key_input, value_input)
        return [project(x, [W[i]], [b[i]])[0] for i, x in enumerate(inputs)]

    def _apply_qk_norm(self, x: Tensor, norm_module: Any) -> Tensor:
        """The norm on queries or keys, batch and position kept apart, as at every other site."""
        return norm_module(x)


class FusedAttention(_Fused, Attention):
    """`Attention`, fused."""


class FusedGroupedQueryAttention(_Fused, GroupedQueryAttention):
    """`GroupedQueryAttention`, fused."""


class SiteBlock(TransformerBlock):
    """A pre-norm block, sequential or parallel, whose norms are sites."""

    ln1: Any

    @classmethod
    def from_stock(cls, stock: TransformerBlock, index: int) -> "SiteBlock":
        """Take over the parameters of a stock block, without a copy."""
        cfg = stock.cfg
        block = cls(cfg, index)
        fused = FusedAttention if cfg.n_key_value_heads is None else FusedGroupedQueryAttention
        block.attn = fused.from_stock(stock.attn)
        norms: Any = stock
        block.ln1 = SplitNorm(norms.ln1)
        if not cfg.attn_only:
            block.ln2 = Norm(norms.ln2)
            block.mlp = stock.mlp
            if cfg.act_fn == "gelu_new":  # the same function in one kernel
                block.mlp.act_fn = gelu_pytorch_tanh
        if cfg.use_normalization_before_and_after:
            block.ln1_post = Norm(norms.ln1_post)
            block.ln2_post = Norm(norms.ln2_post)
        return block

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        shortformer_pos_embed: Tensor | None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """From `resid_pre` to `resid_post`, as `TransformerBlock.forward`."""
        cfg = self.cfg
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.attn(
            *self._attention_inputs(resid_pre),
            past_kv_cache_entry=past_kv_cache_entry,
            attention_mask=attention_mask,
        )
        if cfg.use_normalization_before_and_after:
            attn_out = self.ln1_post(attn_out)
        attn_out = self.hook_attn_out(attn_out)
        if cfg.attn_only:
            return self.hook_resid_post(resid_pre + attn_out)
        if cfg.parallel_attn_mlp:
            mlp_out = self.apply_mlp(self.ln2(self._mlp_input(resid_pre)))
            return self.hook_resid_post(resid_pre + attn_out + mlp_out)
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.apply_mlp(self.ln2(self._mlp_input(resid_mid)))
        return self.hook_resid_post(resid_mid + mlp_out)

    def _attention_inputs(self, resid_pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What queries, keys and values read, with a head dimension if the config says so."""
        cfg = self.cfg
        if not (cfg.use_split_qkv_input or cfg.use_attn_in):
            x_qk, x_v = self.ln1(resid_pre)
            return x_qk, x_qk, x_v
        per_head = partial(repeat_along_head_dimension, resid_pre)
        if cfg.use_split_qkv_input:
            kv_heads = cfg.n_key_value_heads or cfg.n_heads
            if cfg.ungroup_grouped_query_attention:
                kv_heads = cfg.n_heads
            query = self.hook_q_input(per_head(n_heads=cfg.n_heads))
            key = self.hook_k_input(per_head(n_heads=kv_heads))
            value = self.hook_v_input(per_head(n_heads=kv_heads))
        else:
            query = key = value = self.hook_attn_in(per_head(n_heads=cfg.n_heads))
        return self.ln1.qk(query), self.ln1.qk(key), self.ln1.v(value)

    def _mlp_input(self, resid: Tensor) -> Tensor:
        return self.hook_mlp_in(resid.clone()) if self.cfg.use_hook_mlp_in else resid


class LookupEmbed(Embed):
    """The embedding as a lookup, whose gradient is summed in a fixed order, and faster.

    TransformerLens indexes the weight, whose gradient threads add up in no fixed order.
    """

    def __init__(self, stock: Embed):
        nn.Module.__init__(self)
        self.cfg = stock.cfg
        self.W_E = stock.W_E

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """As `Embed.forward`."""
        return F.embedding(tokens, self.W_E)


class TiedUnembed(Unembed):
    """The unembedding as the transposed embedding, one parameter, as in GPT-2's own training."""

    def __init__(self, stock: Unembed, embed: Embed):
        nn.Module.__init__(self)
        self.cfg = stock.cfg
        self.W_E = embed.W_E
        self.register_buffer("b_U", stock.b_U.detach())
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:  # type: ignore[override]
        """The transposed embedding, a view."""
        return self.W_E.T

    def forward(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """As `Unembed.forward`, without its copy of the transposed weight."""
        return self.hook_out(F.linear(self.hook_in(residual), self.W_E, self.b_U))
