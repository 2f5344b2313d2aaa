"""Where each architecture keeps its weights: one table per architecture, read in both directions.

A `Rule` says that one Hugging Face tensor is one or several TransformerLens tensors, rearranged.
Importing reads the pattern left to right, exporting right to left, so the two cannot disagree.
TransformerLens' own converters are not used: they drop the biases of Llama-like models that have
some, add Gemma's 1 + w in float32 whatever the dtype, and have no way back.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from transformer_lens import HookedTransformerConfig

from lnfree_interp.errors import CheckpointError, UnsupportedModelError

_LINEAR = "out d_in -> d_in out"


@dataclass(frozen=True)
class Rule:
    """One Hugging Face tensor and the TransformerLens tensors that it holds."""

    hf: str
    """Its name; `{l}` is the layer."""
    tl: tuple[str, ...]
    """TransformerLens' names; several when one tensor holds, say, W_Q, W_K and W_V."""
    pattern: str | None = None
    """einops pattern from left to right; axis `path` runs over `tl`. None: as it is."""
    optional: bool = False
    """A bias that some checkpoints do not have: zero then."""
    plus: float = 0.0
    """Added on the way in: Gemma stores its gains minus one."""
    times_sqrt_d_model: bool = False
    """Multiplied on the way in: Gemma scales its embedding."""
    skip_rows: int = 0
    """Leading rows without a meaning: OPT's positions start at row 2."""


Layout = tuple[Rule, ...]


def _rule(
    hf: str,
    tl: str,
    pattern: str | None = None,
    *,
    optional: bool = False,
    plus: float = 0.0,
    times_sqrt_d_model: bool = False,
    skip_rows: int = 0,
) -> Rule:
    """A `Rule` whose TransformerLens names are written with spaces between."""
    return Rule(hf, tuple(tl.split()), pattern, optional, plus, times_sqrt_d_model, skip_rows)


def _blocks(hf_prefix: str, *rules: Rule) -> Layout:
    return tuple(
        replace(rule, hf=hf_prefix + rule.hf, tl=tuple("blocks.{l}." + name for name in rule.tl))
        for rule in rules
    )


def _norm(hf: str, tl: str) -> Layout:
    return _rule(f"{hf}.weight", f"{tl}.w"), _rule(f"{hf}.bias", f"{tl}.b")


def _linear(hf: str, W: str, b: str, optional: bool = False) -> Layout:
    return _rule(f"{hf}.weight", W, _LINEAR), _rule(f"{hf}.bias", b, optional=optional)


def _separate_qkvo(
    attn: str, out: str, qkv_bias: bool | None = None, o_bias: bool | None = None
) -> Layout:
    """q, k, v and o as four linear maps. A bias is there (True), absent (False) or either."""
    rules = []
    for letter, head in (("Q", "head"), ("K", "kv_head"), ("V", "kv_head")):
        name = f"{attn}.{letter.lower()}_proj"
        pattern = f"({head} d_head) d_model -> {head} d_model d_head"
        rules.append(_rule(f"{name}.weight", f"attn.W_{letter}", pattern))
        if qkv_bias is not False:
            pattern = f"({head} d_head) -> {head} d_head"
            optional = qkv_bias is None
            rules.append(_rule(f"{name}.bias", f"attn.b_{letter}", pattern, optional=optional))
    pattern = "d_model (head d_head) -> head d_head d_model"
    rules.append(_rule(f"{attn}.{out}.weight", "attn.W_O", pattern))
    if o_bias is not False:
        rules.append(_rule(f"{attn}.{out}.bias", "attn.b_O", optional=o_bias is None))
    return tuple(rules)


GPT2: Layout = (
    _rule("transformer.wte.weight", "embed.W_E"),
    _rule("transformer.wpe.weight", "pos_embed.W_pos"),
    *_blocks(
        "transformer.h.{l}.",
        *_norm("ln_1", "ln1"),
        _rule(
            "attn.c_attn.weight",
            "attn.W_Q attn.W_K attn.W_V",
            "d_model (path head d_head) -> path head d_model d_head",
        ),
        _rule(
            "attn.c_attn.bias",
            "attn.b_Q attn.b_K attn.b_V",
            "(path head d_head) -> path head d_head",
        ),
        _rule("attn.c_proj.weight", "attn.W_O", "(head d_head) d_model -> head d_head d_model"),
        _rule("attn.c_proj.bias", "attn.b_O"),
        *_norm("ln_2", "ln2"),
        _rule("mlp.c_fc.weight", "mlp.W_in"),
        _rule("mlp.c_fc.bias", "mlp.b_in"),
        _rule("mlp.c_proj.weight", "mlp.W_out"),
        _rule("mlp.c_proj.bias", "mlp.b_out"),
    ),
    *_norm("transformer.ln_f", "ln_final"),
    _rule("lm_head.weight", "unembed.W_U", _LINEAR),
)

GPT_NEO: Layout = (
    _rule("transformer.wte.weight", "embed.W_E"),
    _rule("transformer.wpe.weight", "pos_embed.W_pos"),
    *_blocks(
        "transformer.h.{l}.",
        *_norm("ln_1", "ln1"),
        *_separate_qkvo("attn.attention", "out_proj", qkv_bias=False, o_bias=True),
        *_norm("ln_2", "ln2"),
        *_linear("mlp.c_fc", "mlp.W_in", "mlp.b_in"),
        *_linear("mlp.c_proj", "mlp.W_out", "mlp.b_out"),
    ),
    *_norm("transformer.ln_f", "ln_final"),
    _rule("lm_head.weight", "unembed.W_U", _LINEAR),
)

OPT: Layout = (
    _rule("model.decoder.embed_tokens.weight", "embed.W_E"),
    _rule("model.decoder.embed_positions.weight", "pos_embed.W_pos", skip_rows=2),
    *_blocks(
        "model.decoder.layers.{l}.",
        *_norm("self_attn_layer_norm", "ln1"),
        *_separate_qkvo("self_attn", "out_proj"),
        *_norm("final_layer_norm", "ln2"),
        *_linear("fc1", "mlp.W_in", "mlp.b_in", optional=True),
        *_linear("fc2", "mlp.W_out", "mlp.b_out", optional=True),
    ),
    *_norm("model.decoder.final_layer_norm", "ln_final"),
    _rule("lm_head.weight", "unembed.W_U", _LINEAR),
)

GPT_NEOX: Layout = (
    _rule("gpt_neox.embed_in.weight", "embed.W_E"),
    *_blocks(
        "gpt_neox.layers.{l}.",
        *_norm("input_layernorm", "ln1"),
        _rule(
            "attention.query_key_value.weight",
            "attn.W_Q attn.W_K attn.W_V",
            "(head path d_head) d_model -> path head d_model d_head",
        ),
        _rule(
            "attention.query_key_value.bias",
            "attn.b_Q attn.b_K attn.b_V",
            "(head path d_head) -> path head d_head",
            optional=True,
        ),
        _rule("attention.dense.weight", "attn.W_O", "d_model (head d_head) -> head d_head d_model"),
        _rule("attention.dense.bias", "attn.b_O", optional=True),
        *_norm("post_attention_layernorm", "ln2"),
        *_linear("mlp.dense_h_to_4h", "mlp.W_in", "mlp.b_in"),
        *_linear("mlp.dense_4h_to_h", "mlp.W_out", "mlp.b_out"),
    ),
    *_norm("gpt_neox.final_layer_norm", "ln_final"),
    _rule("lm_head.weight", "unembed.W_U", _LINEAR),
)


def _llama_like(attention: Layout, plus: float = 0.0, post_norms: bool = False) -> Layout:
    """RMSNorm without bias, gated MLP without bias."""

    def gain(hf: str, tl: str) -> Rule:
        return _rule(f"{hf}.weight", f"{tl}.w", plus=plus)

    second = "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"
    after = (
        gain("post_attention_layernorm", "ln1_post"),
        gain("post_feedforward_layernorm", "ln2_post"),
    )
    return (
        _rule("model.embed_tokens.weight", "embed.W_E", times_sqrt_d_model=post_norms),
        *_blocks(
            "model.layers.{l}.",
            gain("input_layernorm", "ln1"),
            *attention,
            gain(second, "ln2"),
            *(after if post_norms else ()),
            _rule("mlp.up_proj.weight", "mlp.W_in", _LINEAR),
            _rule("mlp.gate_proj.weight", "mlp.W_gate", _LINEAR),
            _rule("mlp.down_proj.weight", "mlp.W_out", _LINEAR),
        ),
        gain("model.norm", "ln_final"),
        _rule("lm_head.weight", "unembed.W_U", _LINEAR),
    )


LLAMA = _llama_like(_separate_qkvo("self_attn", "o_proj"))
MISTRAL = _llama_like(_separate_qkvo("self_attn", "o_proj", qkv_bias=False, o_bias=False))
QWEN2 = _llama_like(_separate_qkvo("self_attn", "o_proj", qkv_bias=True, o_bias=False))
QWEN3 = _llama_like(
    (
        *_separate_qkvo("self_attn", "o_proj"),
        _rule("self_attn.q_norm.weight", "attn.q_norm.w"),
        _rule("self_attn.k_norm.weight", "attn.k_norm.w"),
    )
)
GEMMA2 = _llama_like(_separate_qkvo("self_attn", "o_proj"), plus=1.0, post_norms=True)


def _for_each_layer(layout: Layout, cfg: HookedTransformerConfig) -> Iterator[Rule]:
    """The rules with layers filled in, and the names that grouped-query attention stores."""

    def spelled(name: str, layer: int) -> str:
        name = name.format(l=layer)
        stem, _, leaf = name.rpartition(".")
        grouped = cfg.n_key_value_heads is not None and leaf in ("W_K", "W_V", "b_K", "b_V")
        return f"{stem}._{leaf}" if grouped else name

    for rule in layout:
        for layer in range(cfg.n_layers if "{l}" in rule.hf else 1):
            tl = tuple(spelled(name, layer) for name in rule.tl)
            yield replace(rule, hf=rule.hf.format(l=layer), tl=tl)


def _axes(pattern: str, cfg: HookedTransformerConfig) -> dict[str, int]:
    sizes = {
        "path": 3,
        "head": cfg.n_heads,
        "kv_head": cfg.n_key_value_heads or cfg.n_heads,
        "d_head": cfg.d_head,
    }
    named = pattern.replace("(", " ").replace(")", " ").split()
    return {axis: size for axis, size in sizes.items() if axis in named}


def optional_names(layout: Layout, cfg: HookedTransformerConfig) -> dict[str, tuple[str, ...]]:
    """The biases that a checkpoint may lack: Hugging Face's name -> TransformerLens' names."""
    return {rule.hf: rule.tl for rule in _for_each_layer(layout, cfg) if rule.optional}


def hooked_names(layout: Layout, cfg: HookedTransformerConfig) -> set[str]:
    """The TransformerLens names that the architecture has a place for."""
    return {name for rule in _for_each_layer(layout, cfg) for name in rule.tl}


def is_finite(W: Tensor) -> bool:
    """Whether there is no NaN and no infinity in a tensor; without a copy of it."""
    return W.numel() == 0 or all(bool(extreme.isfinite()) for extreme in W.aminmax())


def to_hooked_weights(
    layout: Layout, cfg: HookedTransformerConfig, hf: MutableMapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Hugging Face weights as TransformerLens weights: views wherever the layout allows.

    Args:
        layout: The architecture's table.
        cfg: For the number of layers and heads.
        hf: Emptied on the way, so that weights can be freed one by one.
        source: For messages.

    Returns:
        TransformerLens' names and tensors; biases that the checkpoint does not have are missing.

    Raises:
        CheckpointError: for a weight that is missing, left over, or not finite.
    """
    weights: dict[str, Tensor] = {}
    for rule in _for_each_layer(layout, cfg):
        if rule.hf not in hf:
            if rule.optional:
                continue
            raise CheckpointError(f"{source}: the weights lack {rule.hf}")
        W = hf.pop(rule.hf).detach()[rule.skip_rows :]
        if not is_finite(W):
            raise CheckpointError(f"{source}: {rule.hf} holds values that are not finite")
        if rule.times_sqrt_d_model:
            W = W * torch.tensor(cfg.d_model**0.5, dtype=W.dtype)
        if rule.plus:
            W = W + rule.plus
        if rule.pattern:
            W = rearrange(W, rule.pattern, **_axes(rule.pattern, cfg))
        weights |= zip(rule.tl, W if len(rule.tl) > 1 else (W,), strict=True)
    if hf:
        raise CheckpointError(
            f"{source}: the weights hold {', '.join(sorted(hf)[:3])}, which has no place in the "
            "model of config.json"
        )
    return weights


def to_hf_weights(
    layout: Layout,
    cfg: HookedTransformerConfig,
    weights: Mapping[str, Tensor],
    absent: frozenset[str] = frozenset(),
) -> dict[str, Tensor]:
    """TransformerLens weights as Hugging Face weights: the layout read from right to left.

    Args:
        layout: The architecture's table.
        cfg: For the number of layers and heads.
        weights: By TransformerLens' names, all of them.
        absent: Optional Hugging Face names that the target model does not have.

    Raises:
        UnsupportedModelError: for a weight that the architecture has no place for, unless it is
            zero.
    """
    left = {name: W for name, W in weights.items() if not _is_buffer(name)}
    hf: dict[str, Tensor] = {}
    for rule in _for_each_layer(layout, cfg):
        if rule.hf in absent:
            continue
        parts = [left.pop(name).detach() for name in rule.tl]
        W = torch.stack(parts) if len(parts) > 1 else parts[0]
        if rule.pattern:
            left_side, right_side = rule.pattern.split("->")
            W = rearrange(W, f"{right_side} -> {left_side}", **_axes(rule.pattern, cfg))
        W = W - rule.plus if rule.plus else W
        W = W / cfg.d_model**0.5 if rule.times_sqrt_d_model else W
        if rule.skip_rows:
            W = torch.cat([W.new_zeros(rule.skip_rows, *W.shape[1:]), W])
        hf[rule.hf] = W.contiguous()
    if left_over := [name for name, W in left.items() if W.any()]:
        raise UnsupportedModelError(
            f"{cfg.original_architecture} has no place for {', '.join(left_over[:3])}: export it "
            "with target='transformer_lens'"
        )
    return hf


def _is_buffer(name: str) -> bool:
    return name.endswith((".mask", ".IGNORE", ".rotary_sin", ".rotary_cos"))
