"""Which Hugging Face architectures can be represented faithfully, and how.

Configs are converted here rather than by `HookedTransformer.from_pretrained`, which knows only
official names and takes the config (epsilon included) from the name, not from the checkpoint.
What TransformerLens 3.9 computes differently is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformer_lens import HookedTransformerConfig
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from lnfree_interp.checkpoints import layouts
from lnfree_interp.checkpoints.layouts import Layout
from lnfree_interp.errors import CheckpointError, UnsupportedModelError

# Hugging Face's name -> TransformerLens' name of the same function. The first of several is
# what an export says.
_ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "gelu_fast": "gelu_fast",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_HF_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Architecture:
    """How one Hugging Face architecture becomes a `HookedTransformer`, and back."""

    model_type: str
    """`model_type` in config.json."""
    fields: Mapping[str, str]
    """Fields of `HookedTransformerConfig` that Hugging Face has too, under another name."""
    to_hooked: Callable[[Any], dict[str, Any]]
    """The other fields of `HookedTransformerConfig`; refuses what cannot be represented."""
    to_hf: Callable[[HookedTransformerConfig], dict[str, Any]]
    """The other fields of the Hugging Face config."""
    layout: Layout
    sees_float64: bool = False
    """Whether transformers computes in float64 throughout. Most architectures take rotary angles,
    RMSNorms or scores in float32 whatever the dtype."""
    fixed_epsilon: bool = False
    """Whether transformers ignores any epsilon in the config."""
    bias_field: str | None = None
    """The field that says whether there are the biases that the layout calls optional."""
    norm: Literal["LN", "RMS"] = "LN"
    """Which norm: LayerNorm subtracts the mean."""
    scales_embedding: bool = False
    """Whether the embedding is multiplied by sqrt(d_model), the unembedding tied to it not."""

    @property
    def centres(self) -> bool:
        """Whether the norms subtract the mean."""
        return self.norm == "LN"

    def norm_weights(self, cfg: HookedTransformerConfig) -> dict[str, int]:
        """The gains and biases of all norms by TransformerLens' names, and their lengths."""
        names = layouts.hooked_names(self.layout, cfg)
        norms = [name for name in names if name.endswith((".w", ".b"))]
        return {name: cfg.d_head if "_norm." in name else cfg.d_model for name in norms}

    @property
    def activation_field(self) -> str:
        """What Hugging Face calls the activation function."""
        return self.fields["act_fn"]


_GPT2_FIELDS = {
    "d_model": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "n_ctx": "n_positions",
    "d_vocab": "vocab_size",
    "act_fn": "activation_function",
    "eps": "layer_norm_epsilon",
    "use_attn_scale": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
}


def _gpt2(hf: Any) -> dict[str, Any]:
    _refuse({"cross-attention": hf.add_cross_attention})
    _require_divides(hf, "n_embd", "n_head")
    return {
        "d_head": hf.n_embd // hf.n_head,
        "d_mlp": hf.n_inner or 4 * hf.n_embd,
    }


def _gpt2_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    return {"n_inner": cfg.d_mlp, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


_SIZES = {
    "d_model": "hidden_size",
    "n_ctx": "max_position_embeddings",
    "d_vocab": "vocab_size",
}
_GPT_NEO_FIELDS = _SIZES | {
    "n_heads": "num_heads",
    "n_layers": "num_layers",
    "act_fn": "activation_function",
    "eps": "layer_norm_epsilon",
    "window_size": "window_size",
}


def _gpt_neo(hf: Any) -> dict[str, Any]:
    _require_divides(hf, "hidden_size", "num_heads")
    return {
        "d_head": hf.hidden_size // hf.num_heads,
        "d_mlp": hf.intermediate_size or 4 * hf.hidden_size,
        "attn_types": list(hf.attention_layers),
        "use_local_attn": True,
        "use_attn_scale": False,
    }


def _gpt_neo_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    types = [[[kind], 1] for kind in cfg.attn_types or []]
    return {"intermediate_size": cfg.d_mlp, "attention_types": types}


_NUM = {"n_heads": "num_attention_heads", "n_layers": "num_hidden_layers"}
_OPT_FIELDS = _SIZES | _NUM | {"d_mlp": "ffn_dim", "act_fn": "activation_function"}


def _opt(hf: Any) -> dict[str, Any]:
    _refuse(
        {
            "norms after the sublayers (do_layer_norm_before=False)": not hf.do_layer_norm_before,
            "no final norm": hf._remove_final_layer_norm,
            "a projected embedding (word_embed_proj_dim)": hf.word_embed_proj_dim != hf.hidden_size,
            "norms without weights": not hf.layer_norm_elementwise_affine,
        }
    )
    _require_divides(hf, "hidden_size", "num_attention_heads")
    return {
        "d_head": hf.hidden_size // hf.num_attention_heads,
        "eps": 1e-5,
    }


def _opt_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    return {"do_layer_norm_before": True, "dropout": 0.0, "attention_dropout": 0.0}


_NEOX_FIELDS = (
    _SIZES
    | _NUM
    | {
        "d_mlp": "intermediate_size",
        "act_fn": "hidden_act",
        "eps": "layer_norm_eps",
        "parallel_attn_mlp": "use_parallel_residual",
    }
)


def _gpt_neox(hf: Any) -> dict[str, Any]:
    _require_divides(hf, "hidden_size", "num_attention_heads")
    d_head = hf.hidden_size // hf.num_attention_heads
    rotary_dim = int(d_head * hf.rope_parameters.get("partial_rotary_factor", 1.0))
    _require_even(rotary_dim)
    return {
        "d_head": d_head,
        "rotary_dim": rotary_dim,
        "default_prepend_bos": False,
        **_rotary(hf),
    }


def _gpt_neox_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    rope = _rope_parameters(cfg) | {"partial_rotary_factor": cfg.rotary_dim / cfg.d_head}
    return {"rope_parameters": rope}


_LLAMA_FIELDS = (
    _SIZES
    | _NUM
    | {
        "d_mlp": "intermediate_size",
        "act_fn": "hidden_act",
        "eps": "rms_norm_eps",
    }
)


def _llama(hf: Any) -> dict[str, Any]:
    _refuse({"a bias in the MLP (TransformerLens has no b_gate)": getattr(hf, "mlp_bias", False)})
    n_heads, n_kv = hf.num_attention_heads, hf.num_key_value_heads
    d_head = getattr(hf, "head_dim", None)
    if not d_head:
        _require_divides(hf, "hidden_size", "num_attention_heads")
        d_head = hf.hidden_size // n_heads
    _require_divides(hf, "num_attention_heads", "num_key_value_heads")
    _require_even(d_head)
    fields = {
        "d_head": d_head,
        "n_key_value_heads": None if n_kv == n_heads else n_kv,
        "rotary_dim": d_head,
        "final_rms": True,
        "gated_mlp": True,
        **_windows(hf),
    }
    return fields | _rotary(hf, local=fields.get("use_local_attn", False))


def _llama_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": cfg.n_key_value_heads or cfg.n_heads,
        "head_dim": cfg.d_head,
        "rope_parameters": _rope_parameters(cfg),
    }


def _mistral_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    return _llama_back(cfg) | {"sliding_window": cfg.window_size}


def _qwen(hf: Any) -> dict[str, Any]:
    return _llama(hf) | {"default_prepend_bos": False}


def _layered_windows(cfg: HookedTransformerConfig) -> dict[str, Any]:
    if not cfg.use_local_attn:
        return {}
    types = [_SLIDING if kind == "local" else _FULL for kind in cfg.attn_types or []]
    return {"layer_types": types, "sliding_window": cfg.window_size, "use_sliding_window": True}


def _qwen_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    return _llama_back(cfg) | _layered_windows(cfg)


def _qwen3(hf: Any) -> dict[str, Any]:
    return _qwen(hf) | {"use_qk_norm": True}


def _gemma2(hf: Any) -> dict[str, Any]:
    _refuse(
        {"bidirectional attention": getattr(hf, "use_bidirectional_attention", None)},
    )
    return _llama(hf) | {
        "use_normalization_before_and_after": True,
        "attn_scale": hf.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": hf.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": hf.final_logit_softcapping or -1.0,
    }


def _gemma2_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    scalar = float(cfg.attn_scale) ** 2
    whole = round(scalar)
    return (
        _llama_back(cfg)
        | _layered_windows(cfg)
        | {
            "query_pre_attn_scalar": whole if abs(scalar - whole) < 1e-6 else scalar,
            "attn_logit_softcapping": _cap(cfg.attn_scores_soft_cap),
            "final_logit_softcapping": _cap(cfg.output_logits_soft_cap),
        }
    )


def _cap(value: float) -> float | None:
    return value if value > 0 else None


def _windows(hf: Any) -> dict[str, Any]:
    """Sliding windows, for the layers that have one."""
    window = getattr(hf, "sliding_window", None)
    types = getattr(hf, "layer_types", None)
    if types is None:
        types = [_SLIDING if window else _FULL] * hf.num_hidden_layers
    if unknown := set(types) - {_FULL, _SLIDING}:
        raise UnsupportedModelError(f"layer types {sorted(unknown)} are not supported")
    if window is None or _SLIDING not in types:
        return {}
    return {
        "use_local_attn": True,
        "window_size": window,
        "attn_types": ["local" if kind == _SLIDING else "global" for kind in types],
    }


def _rotary(hf: Any, local: bool = False) -> dict[str, Any]:
    """Rotary positions. TransformerLens computes the kinds below as transformers does."""
    rope = dict(hf.rope_parameters)
    kind = rope.get("rope_type", "default")
    fields: dict[str, Any] = {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": rope["rope_theta"],
    }
    if kind == "linear" and not local:
        fields["rotary_scaling_factor"] = rope["factor"]
    elif kind == "llama3":
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    elif kind != "default":
        where = " with sliding windows" if kind == "linear" else ""
        raise UnsupportedModelError(f"rotary positions of type {kind!r}{where} are not supported")
    return fields


def _rope_parameters(cfg: HookedTransformerConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(cfg.rotary_base)}
    if cfg.use_NTK_by_parts_rope:
        return rope | {
            "rope_type": "llama3",
            "factor": cfg.NTK_by_parts_factor,
            "low_freq_factor": cfg.NTK_by_parts_low_freq_factor,
            "high_freq_factor": cfg.NTK_by_parts_high_freq_factor,
            "original_max_position_embeddings": cfg.NTK_original_ctx_len,
        }
    if cfg.rotary_scaling_factor != 1.0:
        return rope | {"rope_type": "linear", "factor": cfg.rotary_scaling_factor}
    return rope


_BIAS = {"bias_field": "attention_bias"}

ARCHITECTURES: dict[str, Architecture] = {
    "GPT2LMHeadModel": Architecture(
        "gpt2", _GPT2_FIELDS, _gpt2, _gpt2_back, layouts.GPT2, sees_float64=True
    ),
    "GPTNeoForCausalLM": Architecture(
        "gpt_neo", _GPT_NEO_FIELDS, _gpt_neo, _gpt_neo_back, layouts.GPT_NEO
    ),
    "OPTForCausalLM": Architecture(
        "opt",
        _OPT_FIELDS,
        _opt,
        _opt_back,
        layouts.OPT,
        sees_float64=True,
        fixed_epsilon=True,
        bias_field="enable_bias",
    ),
    "GPTNeoXForCausalLM": Architecture(
        "gpt_neox", _NEOX_FIELDS, _gpt_neox, _gpt_neox_back, layouts.GPT_NEOX, **_BIAS
    ),
    "LlamaForCausalLM": Architecture(
        "llama", _LLAMA_FIELDS, _llama, _llama_back, layouts.LLAMA, norm="RMS", **_BIAS
    ),
    "MistralForCausalLM": Architecture(
        "mistral", _LLAMA_FIELDS, _llama, _mistral_back, layouts.MISTRAL, norm="RMS"
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2", _LLAMA_FIELDS, _qwen, _qwen_back, layouts.QWEN2, norm="RMS"
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", _LLAMA_FIELDS, _qwen3, _qwen_back, layouts.QWEN3, norm="RMS", **_BIAS
    ),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        _LLAMA_FIELDS | {"act_fn": "hidden_activation"},
        _gemma2,
        _gemma2_back,
        layouts.GEMMA2,
        norm="RMS",
        scales_embedding=True,
        **_BIAS,
    ),
}


def architecture_of(
    config: PretrainedConfig, hf_model: PreTrainedModel | None = None
) -> tuple[str, Architecture]:
    """The name of a checkpoint's architecture and how to convert it.

    Args:
        config: Names the architecture in a file.
        hf_model: Names it by its class when it was made in memory.

    Raises:
        UnsupportedModelError: if it is not one that can be represented faithfully.
    """
    names = config.architectures or ([] if hf_model is None else [type(hf_model).__name__])
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    found = ", ".join(names) or f"model_type {config.model_type!r} without architectures"
    raise UnsupportedModelError(
        f"architecture {found} is not supported; supported: {', '.join(ARCHITECTURES)}"
    )


def config_fields(config: PretrainedConfig, architecture: Architecture) -> dict[str, Any]:
    """The fields of a `HookedTransformerConfig`, epsilon and all, from the checkpoint's config.

    Raises:
        UnsupportedModelError: for a variant that cannot be represented faithfully.
        CheckpointError: if the config contradicts itself.
    """
    named = {ours: getattr(config, theirs) for ours, theirs in architecture.fields.items()}
    wrong = [
        f"{architecture.fields[name]}={named[name]}"
        for name in ("d_model", "n_heads", "n_layers", "n_ctx", "d_vocab", "d_mlp")
        if name in named and named[name] < 1
    ]
    if wrong:
        raise CheckpointError(f"config.json: {', '.join(wrong)}, which must be at least 1")
    if named["act_fn"] not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{architecture.activation_field} {named['act_fn']!r} is not one of "
            f"{sorted(_ACTIVATIONS)}"
        )
    named["act_fn"] = _ACTIVATIONS[named["act_fn"]]
    common = {
        "normalization_type": architecture.norm,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    return named | common | architecture.to_hooked(config)


def hooked_config(
    config: PretrainedConfig,
    architecture_name: str,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> HookedTransformerConfig:
    """The `HookedTransformerConfig` of a Hugging Face config.

    Raises:
        UnsupportedModelError, CheckpointError: as `config_fields`.
    """
    return HookedTransformerConfig(
        **config_fields(config, ARCHITECTURES[architecture_name]),
        original_architecture=architecture_name,
        model_name=name,
        tokenizer_name=name,
        dtype=dtype,
        device=str(device),
        init_weights=False,
    )


def hf_config(cfg: HookedTransformerConfig, **others: Any) -> PretrainedConfig:
    """The Hugging Face config of a `HookedTransformerConfig`.

    Args:
        cfg: Its `original_architecture` says which.
        others: Fields that win over those of `cfg`.
    """
    architecture = ARCHITECTURES[cfg.original_architecture or ""]
    fields = {theirs: getattr(cfg, ours) for ours, theirs in architecture.fields.items()}
    fields[architecture.activation_field] = _HF_ACTIVATIONS[cfg.act_fn]
    fields |= {"architectures": [cfg.original_architecture], "dtype": cfg.dtype}
    return CONFIG_MAPPING[architecture.model_type](**(fields | architecture.to_hf(cfg) | others))


def _refuse(unsupported: Mapping[str, Any]) -> None:
    if found := [what for what, is_so in unsupported.items() if is_so]:
        raise UnsupportedModelError(
            f"a model with {', '.join(found)} cannot be represented faithfully"
        )


def _require_even(rotary_dim: int) -> None:
    if rotary_dim < 2 or rotary_dim % 2:
        raise UnsupportedModelError(
            f"rotary positions in {rotary_dim} dimensions of a head: they come in pairs"
        )


def _require_divides(hf: Any, whole: str, parts: str) -> None:
    if getattr(hf, parts) < 1 or getattr(hf, whole) % getattr(hf, parts):
        raise CheckpointError(
            f"config.json: {whole}={getattr(hf, whole)} is not divisible by "
            f"{parts}={getattr(hf, parts)}"
        )
