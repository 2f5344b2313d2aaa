"""Causal linear attention: a positive product of features in the place of the softmax.

A query weighs a key by phi(q) . phi(k), where phi is a feature map whose entries are positive. What
a head has read so far is then a state of fixed size, the sum of phi(k) v^T over tokens, so that
there are two ways to compute it: by the weights of all pairs of tokens, or token by token.
"""

from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformer_lens import HookedTransformer
from transformer_lens.components import Attention, GroupedQueryAttention

from lnfree_interp.errors import NormSiteError, UnsupportedModelError
from lnfree_interp.models.attention import FusedGroupedQueryAttention, SiteAttention
from lnfree_interp.models.running import is_watched
from lnfree_interp.models.weighing import Divisor

CHUNK = 64
"""Tokens whose pairs are weighed at once while nobody reads the weights."""


def elu_features(x: Float[Tensor, "*batch d_head"]) -> Float[Tensor, "*batch d_head"]:
    """elu(x) + 1 (arXiv 2006.16236): x + 1 where x is positive, exp(x) elsewhere."""
    # As written, elu(x) + 1 rounds to 0 from x = -18 on in float32.
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def softmax_features(x: Float[Tensor, "*batch d_head"]) -> Float[Tensor, "*batch _"]:
    """The softmax over the entries of x and of -x, twice as many features (arXiv 2402.04347, there
    behind a learned matrix)."""
    return torch.cat([x, -x], dim=-1).softmax(-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_features,
    "softmax": softmax_features,
}
"""By name. A new one is a function from [..., d_head] to positive numbers, and a line here."""


def causal_product(
    q: Float[Tensor, "batch pos head feature"],
    k: Float[Tensor, "batch pos head feature"],
    v: Float[Tensor, "batch pos head d_head"],
    chunk: int = CHUNK,
) -> Float[Tensor, "batch pos head d_head"]:
    """The sum over the tokens up to each one of (q . k) v.

    Args:
        q: Features of the queries.
        k: Features of the keys.
        v: Values.
        chunk: Tokens whose pairs are weighed at once. What came before is a state, the sum of
            k v^T. 1 is the recurrent form, token by token; all tokens at once the parallel form.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    state, found = None, []
    for start in range(0, q.shape[2], chunk):
        here = slice(start, start + chunk)
        q_here, k_here, v_here = q[:, :, here], k[:, :, here], v[:, :, here]
        out = (q_here @ k_here.mT).tril() @ v_here
        found.append(out if state is None else out + q_here @ state)
        read = k_here.mT @ v_here
        state = read if state is None else state + read
    return torch.cat(found, dim=2).transpose(1, 2)


class _Linear(SiteAttention):
    """Attention whose weights are products of features.

    `hook_attn_scores` has these products, 0 where a query does not see a key; `hook_pattern` has
    them divided. While nobody reads either, they are not materialised.

    Attributes:
        feature_map: The name of the feature map, a key of `FEATURE_MAPS`.
        divide_by: What weights are divided by.
    """

    feature_map: str
    divide_by: Divisor

    @classmethod
    def of(cls, attn: SiteAttention, feature_map: str, divide_by: Divisor) -> "_Linear":
        """Take over the parameters, norms and factors of an attention, without a copy."""
        linear = cast(_Linear, cls.taking_over(attn))
        if attn.cfg.use_qk_norm:
            linear.q_norm, linear.k_norm = attn.q_norm, attn.k_norm
        linear.feature_map, linear.divide_by = feature_map, divide_by
        return linear

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
        if additive_attention_mask is not None or position_bias is not None:
            raise UnsupportedModelError(
                "linear attention adds nothing to its weights: give attention_mask, not "
                "additive_attention_mask or position_bias"
            )
        inputs = (query_input, key_input, value_input)
        plain = all(x.ndim == 3 for x in inputs)
        q, k, v = self._read(*inputs) if plain else self.calculate_qkv_matrices(*inputs)
        offset = 0
        if past_kv_cache_entry is not None:
            offset = past_kv_cache_entry.past_keys.size(1)
            k, v = past_kv_cache_entry.append(k, v)
        if self.cfg.positional_embedding_type == "rotary":
            q = self.hook_rot_q(self.apply_rotary(q, offset, attention_mask)).to(v.dtype)
            k = self.hook_rot_k(self.apply_rotary(k, 0, attention_mask)).to(v.dtype)
        heads = self.cfg.n_heads // k.shape[2]
        k = k.repeat_interleave(heads, dim=2) if heads > 1 else k
        watched = is_watched(self.hook_attn_scores) or is_watched(self.hook_pattern)
        whole = past_kv_cache_entry is None and attention_mask is None and self.attn_type != "local"
        by_state = whole and not watched
        features = FEATURE_MAPS[self.feature_map]
        # Sums over a whole text are no numbers for bfloat16.
        with torch.autocast(q.device.type, enabled=False):
            phi_q, phi_k = features(_wide(q)), features(_wide(k))
            if by_state:
                found = self._by_state(phi_q, phi_k, v)
            else:
                found = self._weigh(phi_q, phi_k, offset, attention_mask)
        found = found.to(v.dtype)
        if by_state:
            return self._write(self._before_W_O(self.hook_z(found)))
        return self._write(self.calculate_z_scores(v, found))

    def _by_state(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        v = _wide(v).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        if self.divide_by == "count":
            seen = torch.arange(1, q.shape[1] + 1, device=q.device, dtype=q.dtype)
            return causal_product(q, k, v) / seen[:, None, None]
        z = causal_product(q, k, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1))
        return _divided(z[..., :-1], z[..., -1:])

    def _weigh(
        self, q: Tensor, k: Tensor, offset: int, attention_mask: Tensor | None
    ) -> Float[Tensor, "batch head query key"]:
        sees = self._make_causal_mask(q.shape[1], k.shape[1], offset, q.device)
        if attention_mask is not None:
            sees = sees & attention_mask[:, None, None].bool()
        scores = einsum(q, k, "batch query head f, batch key head f -> batch head query key")
        scores = self.hook_attn_scores(scores.masked_fill(~sees, 0.0))
        seen = (sees if self.divide_by == "count" else scores).sum(-1, keepdim=True)
        return self.hook_pattern(_divided(scores, seen))

    def _write(self, z: Float[Tensor, "batch pos head d_head"]) -> Tensor:
        if self.cfg.use_attn_result:
            by_head = einsum(z, self.W_O, "batch pos head k, head k d -> batch pos head d")
            out = self.hook_result(by_head).sum(2) + self.b_O
        else:
            out = F.linear(z.flatten(-2), self.W_O.flatten(0, 1).T, self.b_O)
        return out if self.chunk_scale is None else self.chunk_scale(out)


def _divided(x: Tensor, by: Tensor) -> Tensor:
    """A query of padding, one whose keys were all taken away or whose weights are all too small for
    their dtype, reads nothing."""
    return torch.where(by > 0, x / torch.where(by > 0, by, 1), 0.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class LinearAttention(_Linear, Attention):
    """Linear attention with as many keys and values as queries."""


class LinearGroupedQueryAttention(_Linear, GroupedQueryAttention):
    """Linear attention whose heads share keys and values in groups."""


def linear_attention(
    attn: SiteAttention, feature_map: str = "elu", divide_by: str = "sum"
) -> LinearAttention | LinearGroupedQueryAttention:
    """An attention with its softmax replaced, by the same parameters.

    Raises:
        NormSiteError: for a feature map or a divisor that does not exist.
        UnsupportedModelError: if its scores have a soft cap.
    """
    if not isinstance(feature_map, str) or feature_map not in FEATURE_MAPS:
        raise NormSiteError(f"feature_map={feature_map!r}; choices: {', '.join(FEATURE_MAPS)}")
    if divide_by not in get_args(Divisor):
        raise NormSiteError(f"divide_by={divide_by!r}; choices: {', '.join(get_args(Divisor))}")
    if attn.cfg.attn_scores_soft_cap > 0:
        raise UnsupportedModelError(
            "this model's attention scores have a soft cap, and linear attention has no scores: "
            "its weights would be others than any cap makes"
        )
    grouped = isinstance(attn, FusedGroupedQueryAttention | LinearGroupedQueryAttention)
    kind = LinearGroupedQueryAttention if grouped else LinearAttention
    return cast(Any, kind.of(attn, feature_map, cast(Divisor, divide_by)))


def linear_layers(model: HookedTransformer) -> tuple[int, ...]:
    """The blocks whose attention is linear."""
    attentions = (cast(Any, block).attn for block in model.blocks)
    return tuple(i for i, attn in enumerate(attentions) if isinstance(attn, _Linear))
