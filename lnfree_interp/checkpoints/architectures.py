"""Which Hugging Face architectures can be represented faithfully, and how.

Config and weights are converted here rather than by `HookedTransformer.from_pretrained`, which
knows only official names and takes the config (epsilon included) from the name, not from the
checkpoint. The weight layout is TransformerLens' own converter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import PretrainedConfig, PreTrainedModel

from lnfree_interp.errors import CheckpointError, UnsupportedModelError

# Hugging Face's name -> TransformerLens' name of the same function.
_ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "gelu_fast": "gelu_fast",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Architecture:
    """How one Hugging Face architecture becomes a `HookedTransformer`."""

    config: Callable[[Any], dict[str, Any]]
    """From the Hugging Face config to the fields of `HookedTransformerConfig`."""
    weights: Callable[[Any, HookedTransformerConfig], Mapping[str, Tensor]]
    """From the Hugging Face model to a TransformerLens state dict, unprocessed."""


def _gpt2_config(hf: Any) -> dict[str, Any]:
    if hf.add_cross_attention:
        raise UnsupportedModelError("GPT-2 with cross-attention is not a decoder-only model")
    if hf.activation_function not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation_function {hf.activation_function!r} is not one of {sorted(_ACTIVATIONS)}"
        )
    sizes = ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size")
    if wrong := [f"{name}={getattr(hf, name)}" for name in sizes if getattr(hf, name) < 1]:
        raise CheckpointError(f"config.json: {', '.join(wrong)}, which must be at least 1")
    if hf.n_embd % hf.n_head:
        raise CheckpointError(
            f"config.json: n_embd={hf.n_embd} is not divisible by n_head={hf.n_head}"
        )
    return {
        "d_model": hf.n_embd,
        "d_head": hf.n_embd // hf.n_head,
        "n_heads": hf.n_head,
        "n_layers": hf.n_layer,
        "n_ctx": hf.n_positions,
        "d_mlp": hf.n_inner or 4 * hf.n_embd,
        "d_vocab": hf.vocab_size,
        "act_fn": _ACTIVATIONS[hf.activation_function],
        "eps": hf.layer_norm_epsilon,
        "use_attn_scale": hf.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": hf.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": hf.tie_word_embeddings,
        "normalization_type": "LN",
    }


ARCHITECTURES: dict[str, Architecture] = {
    "GPT2LMHeadModel": Architecture(_gpt2_config, convert_gpt2_weights),
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


def hooked_config(
    hf_model: PreTrainedModel, dtype: torch.dtype, device: torch.device, name: str
) -> HookedTransformerConfig:
    """The `HookedTransformerConfig` of a Hugging Face model, epsilon and all, from its own config.

    Raises:
        UnsupportedModelError: as `architecture_of`, or for a variant that is not supported.
        CheckpointError: if the config contradicts itself.
    """
    architecture_name, architecture = architecture_of(hf_model.config, hf_model)
    return HookedTransformerConfig(
        **architecture.config(hf_model.config),
        original_architecture=architecture_name,
        model_name=name,
        tokenizer_name=name,
        dtype=dtype,
        device=str(device),
        init_weights=False,
    )


def hooked_weights(hf_model: PreTrainedModel, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """The model's weights in TransformerLens' layout, nothing folded or centred."""
    _, architecture = architecture_of(hf_model.config, hf_model)
    return {name: W.detach() for name, W in architecture.weights(hf_model, cfg).items()}
