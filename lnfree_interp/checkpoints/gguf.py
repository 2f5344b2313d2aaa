"""GGUF, the format of llama.cpp, whose weights `transformers` dequantises.

transformers drops tensors that it has no place for, and leaves what it does not look up at a
default of its own; a comparison with its logits cannot see that. So it is set here, or refused by
name.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lnfree_interp.checkpoints.architectures import ARCHITECTURES, config_fields
from lnfree_interp.checkpoints.gguf_header import EMBEDDING, Header
from lnfree_interp.checkpoints.hub import first_line
from lnfree_interp.errors import CheckpointError, LnfreeError, UnsupportedModelError

# What transformers leaves at a default of its own although a file states it.
_LEFT_OUT = {
    "gpt2": {"context_length": "n_positions", "feed_forward_length": "n_inner"},
    "llama": {"attention.key_length": "head_dim"},
    "qwen3": {"attention.key_length": "head_dim"},
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
}

_FREQUENCIES = "rope_freqs.weight"

# Of Llama 3.1 to 3.3, whose files state only the factors that these numbers give.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@contextmanager
def alone(file: Path) -> Iterator[dict[str, Any]]:
    """Where transformers finds the file, with no tokenizer or config of another model beside it."""
    with TemporaryDirectory(prefix="lnfree-gguf-") as folder:
        link = Path(folder) / "model.gguf"
        link.symlink_to(file.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": link.name}


def read_config(header: Header, where: Mapping[str, Any]) -> PretrainedConfig:
    """The config of a file, with what transformers does not look up.

    Args:
        header: Of the file.
        where: From `alone`.

    Raises:
        CheckpointError: if it cannot be read, or contradicts itself.
        UnsupportedModelError: for a variant that cannot be represented faithfully.
    """
    file = header.file
    try:
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
        for key, field in _LEFT_OUT.get(header.architecture, {}).items():
            if (value := header.stated(key)) is not None:
                setattr(config, field, value)
        config.vocab_size = header.tensors[EMBEDDING].shape[0]
        config.architectures = _class_names(config)
        if header.architecture == "gemma2":
            config.query_pre_attn_scalar = _gemma2_scalar(config)
    except Exception as error:  # transformers validates with types of its own
        raise CheckpointError(
            f"{file}: its metadata cannot be read: {first_line(error)}"
        ) from error
    if not config.architectures:
        raise UnsupportedModelError(
            f"{file}: transformers reads it as {config.model_type!r}, which is not supported"
        )
    architecture = ARCHITECTURES[config.architectures[0]]
    try:
        fields = config_fields(config, architecture)
        if fields.get("positional_embedding_type") == "rotary":
            config.rope_parameters = _rotary(header, fields["d_head"])
            config_fields(config, architecture)
            if _FREQUENCIES in header.tensors:
                config.rope_parameters = _llama3(config, header, fields["d_head"])
    except LnfreeError as error:
        said = str(error).removeprefix("config.json: ")
        raise type(error)(f"{file}: its metadata, read as config.json: {said}") from error
    return config


def _class_names(config: PretrainedConfig) -> list[str]:
    kinds = ARCHITECTURES.items()
    return [name for name, kind in kinds if kind.config.model_type == config.model_type]


def _gemma2_scalar(config: Any) -> int:
    """As llama.cpp takes it: no file states it. The 27b, of 46 layers, divides differently."""
    heads = config.hidden_size // config.num_attention_heads
    return heads if config.num_hidden_layers == 46 else config.head_dim


def _rotary(header: Header, d_head: int) -> dict[str, Any]:
    """Rotary positions as llama.cpp reads them; transformers takes the base alone.

    Raises:
        UnsupportedModelError: for positions of another kind.
    """
    if (rotated := header.stated("rope.dimension_count")) not in (None, d_head):
        raise UnsupportedModelError(
            f"rotary positions in {rotated} of the {d_head} dimensions of a head are not supported"
        )
    rope = {"rope_type": "default", "rope_theta": header.stated("rope.freq_base") or 10_000.0}
    kind = header.stated("rope.scaling.type") or "linear"
    factor = header.stated("rope.scaling.factor") or header.stated("rope.scale_linear") or 1.0
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(f"rotary positions of type {kind!r} are not supported")
    if kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    return rope


def _llama3(config: Any, header: Header, d_head: int) -> dict[str, Any]:
    """The rotary positions whose factors the file holds in place of the numbers behind them.

    Raises:
        UnsupportedModelError: for factors that are not Llama 3's.
    """
    tensor, theta = header.tensors[_FREQUENCIES], config.rope_parameters["rope_theta"]
    if tensor.kind == TensorType.F32 and tensor.shape == (d_head // 2,):
        given = np.fromfile(header.file, np.float32, d_head // 2, offset=tensor.start)
        scaled = copy.deepcopy(config)
        scaled.rope_parameters = {**_LLAMA3, "rope_theta": theta, "factor": float(given.max())}
        frequencies = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0].double()
        plain = theta ** -(torch.arange(d_head // 2) / (d_head // 2)).double()
        if np.allclose(given, plain / frequencies, rtol=1e-4):
            return scaled.rope_parameters
    raise UnsupportedModelError(
        f"{_FREQUENCIES} holds other factors of rotary positions than Llama 3's, and is not "
        "supported"
    )


def require_places(header: Header, config: PretrainedConfig) -> None:
    """Refuse a tensor that transformers would drop.

    Raises:
        UnsupportedModelError: naming it.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        names = model_class(config).state_dict()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
    layers: Any = config.num_hidden_layers
    named = gguf.get_tensor_name_map(arch, layers)
    places = {named.get_name(name, (".weight", ".bias")) for name in names} | {_FREQUENCIES}
    if unknown := [name for name in header.tensors if name not in places]:
        raise UnsupportedModelError(
            f"{header.file}: it holds {', '.join(unknown[:3])}, which has no place in "
            f"{model_class.__name__}: a variant of the architecture that transformers does not read"
        )


def as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model be saved: its weights are dequantised, and its name is not a folder's."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    model.config.name_or_path = ""
    return model
