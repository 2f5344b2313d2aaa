"""Which Hugging Face architectures are supported, and how they become a `HookedTransformer`.

`HookedTransformer.from_pretrained` knows only official names, and takes the config (epsilon
included) from the name, not from the checkpoint. So configs are converted here. A variant that
TransformerLens 3.9 computes differently is refused by name.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformer_lens import HookedTransformerConfig
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from lnfree_interp.checkpoints import configs, layouts
from lnfree_interp.checkpoints.configs import ConfigMap
from lnfree_interp.checkpoints.layouts import Layout
from lnfree_interp.errors import CheckpointError, UnsupportedModelError
from lnfree_interp.numerics import TOLERANCE

# Hugging Face's name -> TransformerLens' name of the same function. An export writes the first of
# several.
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


CONSTANT_EPSILON_ERROR = 1e-7
"""Relative error that a constant epsilon of 1e12 itself may cause: variance / (2 * epsilon), below
1e-8 at the largest residual norms of GPT-2. Only float64 can see it."""

_LARGEST = {"n_layers": 10_000, "n_heads": 100_000}


@dataclass(frozen=True)
class Architecture:
    """How one Hugging Face architecture becomes a `HookedTransformer`, and back."""

    config: ConfigMap
    """How its config is written in either library."""
    layout: Layout
    """Where its weights are."""
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
        return self.config.fields["act_fn"]


ARCHITECTURES: dict[str, Architecture] = {
    "GPT2LMHeadModel": Architecture(configs.GPT2, layouts.GPT2, sees_float64=True),
    "GPTNeoForCausalLM": Architecture(configs.GPT_NEO, layouts.GPT_NEO),
    "OPTForCausalLM": Architecture(
        configs.OPT,
        layouts.OPT,
        sees_float64=True,
        fixed_epsilon=True,
        bias_field="enable_bias",
    ),
    "GPTNeoXForCausalLM": Architecture(
        configs.GPT_NEOX, layouts.GPT_NEOX, bias_field="attention_bias"
    ),
    "LlamaForCausalLM": Architecture(
        configs.LLAMA, layouts.LLAMA, norm="RMS", bias_field="attention_bias"
    ),
    "MistralForCausalLM": Architecture(configs.MISTRAL, layouts.MISTRAL, norm="RMS"),
    "Qwen2ForCausalLM": Architecture(configs.QWEN2, layouts.QWEN2, norm="RMS"),
    "Qwen3ForCausalLM": Architecture(
        configs.QWEN3, layouts.QWEN3, norm="RMS", bias_field="attention_bias"
    ),
    "Gemma2ForCausalLM": Architecture(
        configs.GEMMA2,
        layouts.GEMMA2,
        norm="RMS",
        scales_embedding=True,
        bias_field="attention_bias",
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
    names = config.architectures if hf_model is None else [type(hf_model).__name__]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        names = []
    for name in names:
        if name in ARCHITECTURES:
            if config.model_type != ARCHITECTURES[name].config.model_type:
                raise CheckpointError(
                    f"config.json: architectures says {name} and model_type says "
                    f"{config.model_type!r}: these are different models"
                )
            return name, ARCHITECTURES[name]
    found = ", ".join(names) or f"model_type {config.model_type!r} without architectures"
    raise UnsupportedModelError(
        f"architecture {found} is not supported; supported: {', '.join(ARCHITECTURES)}"
    )


def logit_tolerance(
    dtype: torch.dtype, architecture: Architecture, *, constant_epsilon: bool
) -> float:
    """How far logits may be from those of transformers, relative to the largest.

    Args:
        dtype: Of both models.
        architecture: Whether transformers computes in float64 throughout.
        constant_epsilon: Whether transformers runs norms with an epsilon of 1e12, which itself
            makes a small error.
    """
    tolerance = TOLERANCE[dtype]
    if not architecture.sees_float64:
        tolerance = max(tolerance, TOLERANCE[torch.float32])
    return max(tolerance, CONSTANT_EPSILON_ERROR) if constant_epsilon else tolerance


def config_fields(config: PretrainedConfig, architecture: Architecture) -> dict[str, Any]:
    """The fields of a `HookedTransformerConfig`, epsilon and all, from the checkpoint's config.

    Raises:
        UnsupportedModelError: for a variant that cannot be represented faithfully.
        CheckpointError: if the config contradicts itself.
    """
    named = {ours: getattr(config, theirs) for ours, theirs in architecture.config.fields.items()}
    for name in ("d_model", "n_heads", "n_layers", "n_ctx", "d_vocab", "d_mlp"):
        size, limit = named.get(name, 1), _LARGEST.get(name, 1 << 62)
        if not isinstance(size, int) or not 1 <= size < limit:
            raise CheckpointError(
                f"config.json: {architecture.config.fields[name]}={size!r}, and it must be a whole "
                f"number from 1 to {limit - 1:,}"
            )
    if not isinstance(named.get("eps", 1e-5), float | int) or not 0 < named.get("eps", 1e-5) < 1e30:
        raise CheckpointError(
            f"config.json: {architecture.config.fields['eps']}={named['eps']!r} is not a positive "
            "number"
        )
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError(
            "config.json says is_causal=False: only models with causal attention are supported"
        )
    if named["act_fn"] not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{architecture.activation_field}={named['act_fn']!r} is not supported. Supported are "
            f"{', '.join(sorted(_ACTIVATIONS))}"
        )
    named["act_fn"] = _ACTIVATIONS[named["act_fn"]]
    common = {
        "normalization_type": architecture.norm,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    return named | common | architecture.config.to_hooked(config)


def hooked_config(
    config: PretrainedConfig,
    architecture_name: str,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> HookedTransformerConfig:
    """The `HookedTransformerConfig` of a Hugging Face config.

    Raises:
        UnsupportedModelError: for a variant that cannot be represented faithfully.
        CheckpointError: if the config contradicts itself.
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
    fields = {theirs: getattr(cfg, ours) for ours, theirs in architecture.config.fields.items()}
    fields[architecture.activation_field] = _HF_ACTIVATIONS[cfg.act_fn]
    fields |= {"architectures": [cfg.original_architecture], "dtype": cfg.dtype}
    return CONFIG_MAPPING[architecture.config.model_type](
        **(fields | architecture.config.to_hf(cfg) | others)
    )
