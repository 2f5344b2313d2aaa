"""Configs of Hugging Face and TransformerLens, architecture by architecture, in both directions.

For each: the fields that both have under different names, a function for the other fields, which
refuses what TransformerLens 3.9 computes differently, and a function for the way back.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformer_lens import HookedTransformerConfig

from lnfree_interp.errors import CheckpointError, UnsupportedModelError

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ConfigMap:
    """How the config of one architecture is written in either library."""

    model_type: str
    """`model_type` in config.json."""
    fields: Mapping[str, str]
    """Fields of `HookedTransformerConfig` that Hugging Face has too, under another name."""
    to_hooked: Callable[[Any], dict[str, Any]]
    """The other fields of `HookedTransformerConfig`; refuses what cannot be represented."""
    to_hf: Callable[[HookedTransformerConfig], dict[str, Any]]
    """The other fields of the Hugging Face config."""


def _refuse(unsupported: Mapping[str, Any]) -> None:
    if found := [what for what, is_so in unsupported.items() if is_so]:
        raise UnsupportedModelError(
            f"a model with {', '.join(found)} cannot be represented faithfully"
        )


def _require_even(rotary_dim: int) -> None:
    if rotary_dim < 2 or rotary_dim % 2:
        raise UnsupportedModelError(
            f"rotary positions in {rotary_dim} dimensions of a head: the number must be even, and "
            "at least 2"
        )


def _require_positive(hf: Any, *names: str) -> None:
    """Refuse fields that are not positive finite numbers."""
    for name in names:
        value = getattr(hf, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise CheckpointError(f"config.json: {name}={value!r} must be a positive number")


def _require_divides(hf: Any, whole: str, parts: str) -> None:
    if getattr(hf, parts) < 1 or getattr(hf, whole) % getattr(hf, parts):
        raise CheckpointError(
            f"config.json: {whole}={getattr(hf, whole)} is not divisible by "
            f"{parts}={getattr(hf, parts)}"
        )


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
    _require_positive(hf, "window_size")
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
    _refuse(
        {
            "rotary positions for another head_dim": (getattr(hf, "head_dim", None) or d_head)
            != d_head
        }
    )
    rotary_dim = int(d_head * hf.rope_parameters.get("partial_rotary_factor", 1.0))
    _require_even(rotary_dim)
    return {
        "d_head": d_head,
        "rotary_dim": rotary_dim,
        "default_prepend_bos": False,
        **_rotary(hf),
    }


def _gpt_neox_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    assert cfg.rotary_dim is not None  # of every rotary model
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


def _llama(hf: Any, windows: bool = False) -> dict[str, Any]:
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
        **(_windows(hf) if windows else {}),
    }
    return fields | _rotary(hf, local=fields.get("use_local_attn", False))


def _llama_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": cfg.n_key_value_heads or cfg.n_heads,
        "head_dim": cfg.d_head,
        "rope_parameters": _rope_parameters(cfg),
    }


def _mistral(hf: Any) -> dict[str, Any]:
    return _llama(hf, windows=True)


def _mistral_back(cfg: HookedTransformerConfig) -> dict[str, Any]:
    return _llama_back(cfg) | {"sliding_window": cfg.window_size}


def _qwen(hf: Any) -> dict[str, Any]:
    return _llama(hf, windows=True) | {"default_prepend_bos": False}


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
    _require_positive(hf, "query_pre_attn_scalar")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(hf, name) is not None:
            _require_positive(hf, name)
    return _llama(hf, windows=True) | {
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
    if _SLIDING not in types:
        return {}
    _require_positive(hf, "sliding_window")
    return {
        "use_local_attn": True,
        "window_size": window,
        "attn_types": ["local" if kind == _SLIDING else "global" for kind in types],
    }


def _rotary(hf: Any, local: bool = False) -> dict[str, Any]:
    """Rotary positions. TransformerLens computes the kinds below as transformers does."""
    rope = dict(hf.rope_parameters)
    numbers = [name for name in rope if name not in ("rope_type", "type")]
    for name in numbers:
        if not isinstance(rope[name], int | float) or not 0 < rope[name] < math.inf:
            raise CheckpointError(
                f"config.json: {name}={rope[name]!r} (rotary positions) must be a positive number"
            )
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


GPT2 = ConfigMap("gpt2", _GPT2_FIELDS, _gpt2, _gpt2_back)
GPT_NEO = ConfigMap("gpt_neo", _GPT_NEO_FIELDS, _gpt_neo, _gpt_neo_back)
OPT = ConfigMap("opt", _OPT_FIELDS, _opt, _opt_back)
GPT_NEOX = ConfigMap("gpt_neox", _NEOX_FIELDS, _gpt_neox, _gpt_neox_back)
LLAMA = ConfigMap("llama", _LLAMA_FIELDS, _llama, _llama_back)
MISTRAL = ConfigMap("mistral", _LLAMA_FIELDS, _mistral, _mistral_back)
QWEN2 = ConfigMap("qwen2", _LLAMA_FIELDS, _qwen, _qwen_back)
QWEN3 = ConfigMap("qwen3", _LLAMA_FIELDS, _qwen3, _qwen_back)
GEMMA2 = ConfigMap("gemma2", _LLAMA_FIELDS | {"act_fn": "hidden_activation"}, _gemma2, _gemma2_back)
