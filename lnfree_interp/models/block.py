"""The transformer block while norms are being removed, and with norms in other places.

TransformerLens' own block, with these differences: `ln1` is two sites (`SplitNorm`), attention is
that of `models.attention`, gated MLPs make no copies of their weights, and norms may stand behind
the sublayers and inside the MLP, and a factor for each channel on the residual branch around the
MLP, whether the config has them or not (`models.inserting`).
"""

from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.components import MLP, Embed, GatedMLP, TransformerBlock, Unembed
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import repeat_along_head_dimension
from transformer_lens.utilities.activation_functions import gelu_pytorch_tanh
from transformer_lens.utilities.addmm import batch_addmm

from lnfree_interp.models.attention import FusedAttention, FusedGroupedQueryAttention
from lnfree_interp.models.norms import Norm, Scaler, SplitNorm


class SiteBlock(TransformerBlock):
    """A pre-norm block, sequential or parallel, whose norms are sites.

    Attributes:
        ln1_post: A norm of what attention writes; None for none.
        ln2_post: A norm of what the MLP writes; None for none.
        resid_scale: A factor for each channel of the stream that goes past the MLP; None for none.
    """

    ln1: Any
    ln1_post: Any
    ln2_post: Any
    resid_scale: Scaler | None

    @classmethod
    def from_stock(cls, stock: TransformerBlock, index: int) -> "SiteBlock":
        """Take over the parameters of a stock block, without a copy."""
        cfg = stock.cfg
        block = cls(cfg, index)
        fused = FusedAttention if cfg.n_key_value_heads is None else FusedGroupedQueryAttention
        block.attn = fused.from_stock(stock.attn)
        norms: Any = stock
        block.ln1 = SplitNorm.from_stock(norms.ln1)
        if not cfg.attn_only:
            block.ln2 = Norm.from_stock(norms.ln2)
            mlp = stock.mlp
            block.mlp = SiteGatedMLP.from_stock(mlp) if isinstance(mlp, GatedMLP) else mlp
            if cfg.act_fn == "gelu_new":  # the same function in one kernel
                block.mlp.act_fn = gelu_pytorch_tanh
        for name in ("ln1_post", "ln2_post", "resid_scale"):
            block.register_module(name, None)
        if cfg.use_normalization_before_and_after:
            block.ln1_post = Norm.from_stock(norms.ln1_post)
            block.ln2_post = Norm.from_stock(norms.ln2_post)
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
        if self.ln1_post is not None:
            attn_out = self.ln1_post(attn_out)
        attn_out = self.hook_attn_out(attn_out)
        if cfg.attn_only:
            return self.hook_resid_post(resid_pre + attn_out)
        if cfg.parallel_attn_mlp:
            mlp_out = self.apply_mlp(self.ln2(self._mlp_input(resid_pre)))
            return self.hook_resid_post(resid_pre + attn_out + mlp_out)
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.apply_mlp(self.ln2(self._mlp_input(resid_mid)))
        if self.resid_scale is not None:
            resid_mid = self.resid_scale(resid_mid)
        return self.hook_resid_post(resid_mid + mlp_out)

    def apply_mlp(
        self, normalized_resid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP writes, through a norm behind it."""
        mlp_out = self.mlp(normalized_resid)
        if self.ln2_post is not None:
            mlp_out = self.ln2_post(mlp_out)
        return self.hook_mlp_out(mlp_out)

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


class InnerNormMLP(MLP):
    """`MLP` with a norm between the activation function and W_out, behind `hook_post`."""

    inner: Norm

    @classmethod
    def from_stock(cls, stock: MLP, inner: Norm) -> "InnerNormMLP":
        """Take over the parameters of a stock MLP, without a copy."""
        mlp = cls(stock.cfg)
        _take_over(mlp, stock)
        mlp.inner = inner
        return mlp

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """As `MLP.forward`."""
        post = self.hook_post(self.act_fn(self.hook_pre(batch_addmm(self.b_in, self.W_in, x))))
        return batch_addmm(self.b_out, self.W_out, self.inner(post))


class SiteGatedMLP(GatedMLP):
    """`GatedMLP` without its copies of the transposed weights, and with room for a norm before
    W_out, behind `hook_post`.

    Attributes:
        inner: That norm; None for none.
    """

    inner: Norm | None

    @classmethod
    def from_stock(cls, stock: GatedMLP) -> "SiteGatedMLP":
        """Take over the parameters of a stock MLP, without a copy."""
        mlp = cls(stock.cfg)
        _take_over(mlp, stock)
        mlp.register_module("inner", None)
        return mlp

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """As `GatedMLP.forward`."""
        pre = self.hook_pre(F.linear(x, self.W_gate.T))
        linear = self.hook_pre_linear(F.linear(x, self.W_in.T))
        post = self.hook_post(self.act_fn(pre) * linear + self.b_in)
        if self.inner is not None:
            post = self.inner(post)
        return F.linear(post, self.W_out.T, self.b_out)


def _take_over(mlp: MLP | GatedMLP, stock: MLP | GatedMLP) -> None:
    for name, parameter in stock.named_parameters(recurse=False):
        setattr(mlp, name, parameter)
    mlp.act_fn = stock.act_fn


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
