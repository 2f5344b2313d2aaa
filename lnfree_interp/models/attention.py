"""Attention while norms are being removed, and with norms and scalers of its own.

TransformerLens' attention, with two differences. It is computed fused, by one q/k/v product and
`scaled_dot_product_attention`, while no hook reads scores or patterns; with such a hook it is
computed as in TransformerLens, so that the hook sees and can change the same activations. And what
the heads give, `hook_z`, may pass a factor for each head and a norm over all heads before W_O, and
what W_O gives a factor for each of n_heads equal chunks of d_model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.components import Attention, GroupedQueryAttention
from transformer_lens.components.abstract_attention import AbstractAttention

from lnfree_interp.models.norms import Norm, Scaler
from lnfree_interp.models.running import is_watched


class SiteAttention(AbstractAttention):
    """Attention that materialises scores only when a hook reads them.

    Attributes:
        head_scale: A factor for each head, before W_O; None for none.
        inner: A norm over the concatenated heads, before W_O; None for none.
        chunk_scale: A factor for each of n_heads chunks of what W_O gives; None for none.
    """

    q_norm: Any
    k_norm: Any
    head_scale: Scaler | None
    inner: Norm | None
    chunk_scale: Scaler | None

    @classmethod
    def taking_over(cls, given: AbstractAttention) -> "SiteAttention":
        """One with the parameters and buffers of an attention, without a copy, and with its factors
        and norm before W_O, if it has any."""
        fused = cls(given.cfg, given.attn_type, given.layer_id)
        for name, parameter in given.named_parameters(recurse=False):
            setattr(fused, name, parameter)
        for name, buffer in given.named_buffers(recurse=False):
            setattr(fused, name, buffer)
        for name in ("head_scale", "inner", "chunk_scale"):
            fused.register_module(name, getattr(given, name, None))
        return fused

    @classmethod
    def from_stock(cls, stock: AbstractAttention) -> "SiteAttention":
        """Take over a stock attention, without a copy of its parameters."""
        fused = cls.taking_over(stock)
        if stock.cfg.use_qk_norm:
            norms: Any = stock
            fused.q_norm = Norm.from_stock(norms.q_norm)
            fused.k_norm = Norm.from_stock(norms.k_norm)
        return fused

    def _fusible(self, query_input: Tensor, *arguments: object) -> bool:
        cfg = self.cfg
        return (
            query_input.ndim == 3
            and all(argument is None for argument in arguments)
            and not cfg.use_attn_result
            and not cfg.attn_scores_soft_cap > 0
            and not cfg.ungroup_grouped_query_attention
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
            out = super().forward(query_input, key_input, value_input, *unusual)
            return out if self.chunk_scale is None else self.chunk_scale(out)
        q, k, v = self._read(query_input, key_input, value_input)
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
        z = self._before_W_O(z).flatten(-2)
        out = F.linear(z, self.W_O.flatten(0, 1).T, self.b_O)
        return out if self.chunk_scale is None else self.chunk_scale(out)

    def _read(
        self, query_input: Tensor, key_input: Tensor, value_input: Tensor
    ) -> list[Float[Tensor, "batch pos _ d_head"]]:
        """Queries, keys and values before positions are rotated, as hooks leave them."""
        q, k, v = self._project(query_input, key_input, value_input)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        if self.cfg.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return [q, k, v]

    def calculate_z_scores(self, v: Tensor, pattern: Tensor) -> Tensor:
        """What W_O reads, [batch, pos, head, d_head]: `hook_z`, through what stands between."""
        return self._before_W_O(super().calculate_z_scores(v, pattern))

    def _before_W_O(
        self, z: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        if self.head_scale is None and self.inner is None:
            return z
        heads, z = z.shape[-2:], z.flatten(-2)
        for module in (self.head_scale, self.inner):
            z = z if module is None else module(z)
        return z.unflatten(-1, heads)

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


class FusedAttention(SiteAttention, Attention):
    """`Attention`, fused."""


class FusedGroupedQueryAttention(SiteAttention, GroupedQueryAttention):
    """`GroupedQueryAttention`, fused."""
