"""Small random models of every supported architecture, and transformers made to see float64."""

import contextlib
import importlib
import types

import pytest
import torch
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

_SIZE = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 48, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_LLAMA = _SIZE | {"intermediate_size": 56, "num_key_value_heads": 4, "head_dim": 8}
_ROPE = {"rope_type": "default", "rope_theta": 500.0}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


def _of(config_class, base, **settings):
    return lambda **more: config_class(**(base | settings | more))


_GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48}
_NEO = _SIZE | {"num_layers": 3, "num_heads": 4, "window_size": 5}
del _NEO["num_hidden_layers"], _NEO["num_attention_heads"]
_NEO["attention_types"] = [[["global", "local"], 1], [["local"], 1]]
_NEOX = _SIZE | {"intermediate_size": 72}
_NEOX_ROPE = {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}}
_GEMMA = _LLAMA | {"sliding_window": 6, "query_pre_attn_scalar": 12, "num_key_value_heads": 2}

CONFIGS = {
    "gpt2": _of(GPT2Config, _GPT2 | {"bos_token_id": 0, "eos_token_id": 0}),
    "neo": _of(GPTNeoConfig, _NEO),
    "neo-inner": _of(GPTNeoConfig, _NEO, intermediate_size=50),
    "opt": _of(OPTConfig, _SIZE, ffn_dim=72, pad_token_id=1),
    "opt-no-bias": _of(OPTConfig, _SIZE, ffn_dim=72, enable_bias=False, pad_token_id=1),
    "neox": _of(GPTNeoXConfig, _NEOX, **_NEOX_ROPE),
    "neox-sequential": _of(GPTNeoXConfig, _NEOX, **_NEOX_ROPE, use_parallel_residual=False),
    "neox-no-bias": _of(GPTNeoXConfig, _NEOX, **_NEOX_ROPE, attention_bias=False),
    "llama": _of(LlamaConfig, _LLAMA, rope_parameters=_ROPE),
    "llama-grouped": _of(LlamaConfig, _LLAMA, num_key_value_heads=2, head_dim=12),
    "llama-bias": _of(LlamaConfig, _LLAMA, attention_bias=True, tie_word_embeddings=True),
    "llama-linear": _of(
        LlamaConfig, _LLAMA, rope_parameters=_ROPE | {"rope_type": "linear", "factor": 3.0}
    ),
    "llama3": _of(LlamaConfig, _LLAMA, rope_parameters=_LLAMA3),
    "mistral": _of(MistralConfig, _LLAMA, num_key_value_heads=2, sliding_window=6),
    "mistral-no-window": _of(MistralConfig, _LLAMA, sliding_window=None),
    "qwen2": _of(Qwen2Config, _LLAMA, num_key_value_heads=1, rope_parameters=_ROPE),
    "qwen2-window": _of(
        Qwen2Config, _LLAMA, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": _of(Qwen3Config, _LLAMA, num_key_value_heads=2),
    "qwen3-bias": _of(Qwen3Config, _LLAMA, attention_bias=True, head_dim=16),
    "gemma2": _of(Gemma2Config, _GEMMA, hidden_activation="gelu_pytorch_tanh"),
    "gemma2-no-caps": _of(
        Gemma2Config,
        _GEMMA,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
    ),
}

ALL = pytest.mark.parametrize("kind", list(CONFIGS))


def make_model(kind, seed=0, **settings):
    """A model whose every parameter is random: gains, and all biases that there are."""
    config = CONFIGS[kind](**settings)
    torch.manual_seed(seed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model):
    for name, W in model.named_parameters():
        if is_norm(name) and name.endswith("weight"):
            W.copy_(1 + 0.4 * torch.randn_like(W))
        else:
            W.copy_(0.15 * torch.randn_like(W))


def is_norm(name):
    return any(part in name for part in ("ln_", "norm"))


def lnfree_model(kind, **settings):
    """The published constant-epsilon format for any architecture whose epsilon is in the config."""
    model = make_model(kind, **settings)
    # Gemma's scaled embedding would drive scores into their caps, and amplify rounding.
    sigma = 6.0 if kind.startswith("gemma") else 1.7
    offset = 1.0 if kind.startswith("gemma") else 0.0
    with torch.no_grad():
        for name, W in model.named_parameters():
            if is_norm(name) and name.endswith("weight"):
                W.copy_((W + offset) * (1e6 / sigma) - offset)
    names = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
    setattr(model.config, next(name for name in names if hasattr(model.config, name)), 1e12)
    lnfree = type(model)(model.config).eval()  # norms copy their epsilon when they are made
    lnfree.load_state_dict(model.state_dict())
    return lnfree


class _Torch(types.SimpleNamespace):
    """`torch` as a module would see it if there were no float32."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def transformers_in_float64(monkeypatch, kind):
    """Whatever the architecture's code computes in float32 regardless of dtype, in float64."""
    family = type(CONFIGS[kind]()).model_type
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rope = importlib.import_module("transformers.modeling_rope_utils")
    with monkeypatch.context() as patch:
        patch.setattr(module, "torch", _Torch())
        patch.setattr(rope, "torch", _Torch())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
