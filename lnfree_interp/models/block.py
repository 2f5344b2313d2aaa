"""The transformer block while norms are being removed.

TransformerLens' own block and attention, with two differences: `ln1` is two sites
(`SplitNorm`), and what nobody looks at is computed fused: one q/k/v product, and
`scaled_dot_product_attention` when no hook reads scores or patterns. Any hook brings the explicit
computation back for its module, so that it sees and can change what TransformerLens shows.
"""

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.components import Attention, Embed, TransformerBlock, Unembed
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import repeat_along_head_dimension
from transformer_lens.utilities.activation_functions import gelu_pytorch_tanh

from lnfree_interp.models.norms import Norm, SplitNorm


class FusedAttention(Attention):
    """`Attention` that materialises scores only when somebody looks at them."""

    @classmethod
    def from_stock(cls, stock: Attention) -> "FusedAttention":
        """Take over the parameters of a stock attention, without a copy."""
        fused = cls(stock.cfg, stock.attn_type, stock.layer_id).to(stock.W_Q.device)
        for name, parameter in stock.named_parameters():
            setattr(fused, name, parameter)
        return fused

    def _fusible(self, query_input: Tensor, *arguments: object) -> bool:
        cfg = self.cfg
        return (
            query_input.ndim == 3
            and all(argument is None for argument in arguments)
            and not cfg.use_attn_result
            and not self.hook_attn_scores.has_hooks()
            and not self.hook_pattern.has_hooks()
        )

    def forward(  # type: ignore[override]
        self,
        query_input: Float[Tensor, "batch pos *head d_model"],
        key_input: Float[Tensor, "batch pos *head d_model"],
        value_input: Float[Tensor, "batch pos *head d_model"],
        past_kv_cache_entry: object = None,
        additive_attention_mask: object = None,
        attention_mask: object = None,
        position_bias: object = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """As `Attention.forward`; `attn_out` before it is added to the stream."""
        unusual = (past_kv_cache_entry, additive_attention_mask, attention_mask, position_bias)
        if not self._fusible(query_input, *unusual):
            return super().forward(query_input, key_input, value_input, *unusual)  # type: ignore[arg-type]
        q, k, v = self._project(query_input, key_input, value_input)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        z = F.scaled_dot_product_attention(
            *(rearrange(x, "batch pos head d_head -> batch head pos d_head") for x in (q, k, v)),
            is_causal=True,
            scale=1 / self.attn_scale,
        )
        z = self.hook_z(rearrange(z, "batch head pos d_head -> batch pos head d_head"))
        return F.linear(z.flatten(-2), self.W_O.flatten(0, 1).T, self.b_O)

    def _project(
        self, query_input: Tensor, key_input: Tensor, value_input: Tensor
    ) -> list[Float[Tensor, "batch pos head d_head"]]:
        """q, k, v by one product for each run of projections that read the same input."""
        n_heads = self.cfg.n_heads

        def project(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
            W = rearrange(
                torch.stack(weights), "path head d_model d_head -> (path head d_head) d_model"
            )
            y = F.linear(x, W, torch.stack(biases).flatten())
            return list(
                rearrange(
                    y,
                    "batch pos (path head d_head) -> path batch pos head d_head",
                    path=len(weights),
                    head=n_heads,
                )
            )

        W, b = [self.W_Q, self.W_K, self.W_V], [self.b_Q, self.b_K, self.b_V]
        if query_input is key_input and key_input is value_input:
            return project(query_input, W, b)
        if query_input is key_input:
            return project(query_input, W[:2], b[:2]) + project(value_input, W[2:], b[2:])
        inputs = (query_input, key_input, value_input)
        return [project(x, [W[i]], [b[i]])[0] for i, x in enumerate(inputs)]


class SiteBlock(TransformerBlock):
    """A pre-norm block with the norm sites `ln1.qk`, `ln1.v` and `ln2`."""

    ln1: SplitNorm
    ln2: Norm

    @classmethod
    def from_stock(cls, stock: TransformerBlock, index: int) -> "SiteBlock":
        """Take over the parameters of a stock LayerNorm block, without a copy."""
        block = cls(stock.cfg, index)
        block.attn = FusedAttention.from_stock(stock.attn)
        block.mlp = stock.mlp
        if stock.cfg.act_fn == "gelu_new":  # the same function in one kernel
            block.mlp.act_fn = gelu_pytorch_tanh
        block.ln1 = SplitNorm(stock.ln1)
        block.ln2 = Norm(stock.ln2)
        return block

    def forward(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        shortformer_pos_embed: None = None,
        past_kv_cache_entry: object = None,
        attention_mask: object = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """As `TransformerBlock.forward`: `resid_pre` to `resid_post`."""
        cfg = self.cfg
        resid_pre = self.hook_resid_pre(resid_pre)
        if cfg.use_split_qkv_input or cfg.use_attn_in:
            split = partial(repeat_along_head_dimension, n_heads=cfg.n_heads)
            if cfg.use_split_qkv_input:
                hooks = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
                query, key, value = (hook(split(resid_pre)) for hook in hooks)
            else:
                query = key = value = self.hook_attn_in(split(resid_pre))
            inputs = (self.ln1.qk(query), self.ln1.qk(key), self.ln1.v(value))
        else:
            x_qk, x_v = self.ln1(resid_pre)
            inputs = (x_qk, x_qk, x_v)
        attn_out = self.hook_attn_out(
            self.attn(
                *inputs, past_kv_cache_entry=past_kv_cache_entry, attention_mask=attention_mask
            )
        )
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_in = self.hook_mlp_in(resid_mid.clone()) if cfg.use_hook_mlp_in else resid_mid
        return self.hook_resid_post(resid_mid + self.apply_mlp(self.ln2(mlp_in)))


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
