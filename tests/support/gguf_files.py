"""GGUF files as llama.cpp's converter writes them, from small models of transformers."""

import json

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SCALES = {
    TensorType.F32: gguf.LlamaFileType.ALL_F32,
    TensorType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    TensorType.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    TensorType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
"""`general.file_type` by the type of the matrices."""

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def write_gguf(path, model, tokenizer=None, kind=TensorType.F32, change=None, extra=None):
    """Write a model of transformers.

    Args:
        path: The file.
        model: Llama, Qwen2, Qwen3, Gemma 2 or GPT-2.
        tokenizer: Byte-level BPE. None: the file has none.
        kind: The type of every matrix whose rows it divides.
        change: Called with the metadata, a dict, before it is written.
        extra: More tensors, by name.
    """
    arch = model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    metadata = _metadata(model.config) | {"general.file_type": int(SCALES[kind])}
    metadata |= {} if tokenizer is None else _tokenizer(tokenizer)
    if change is not None:
        change(metadata)
    for key, value in metadata.items():
        if key == "general.architecture":
            writer.kv_data[0][key].value = value
        else:
            writer.add_key_value(key, value, *_types(value))
    for name, W in {**_tensors(model), **(extra or {})}.items():
        fits = W.ndim == 2 and W.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        stored = kind if fits else TensorType.F32
        writer.add_tensor(name, gguf.quantize(W, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _types(value):
    of = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
    }
    if isinstance(value, list):
        return gguf.GGUFValueType.ARRAY, of[type(value[0])]
    return (of[type(value)],)


def _metadata(config):
    arch = config.model_type
    if arch == "gpt2":
        sizes = {
            "context_length": config.n_positions, "embedding_length": config.n_embd,
            "block_count": config.n_layer, "attention.head_count": config.n_head,
            "feed_forward_length": config.n_inner or 4 * config.n_embd,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }  # fmt: skip
        return {f"gpt2.{name}": value for name, value in sizes.items()}
    rope = config.rope_parameters
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if arch == "llama":
        sizes |= {"rope.dimension_count": config.head_dim, "vocab_size": config.vocab_size}
    if rope["rope_type"] == "linear":
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if arch == "gemma2":
        sizes |= {
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
            "attention.sliding_window": config.sliding_window,
        }
    return {f"{arch}.{name}": value for name, value in sizes.items()}


def _tokenizer(tokenizer):
    content = json.loads(tokenizer._tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    special = set(tokenizer.all_special_tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token, _ in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
    }


def _tensors(model):
    config, arch = model.config, model.config.model_type
    key = next(arch_key for arch_key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    tensors = {}
    for theirs, weight in model.state_dict().items():
        name = names.get_name(theirs, (".weight", ".bias"))
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        W = weight.detach().float().numpy()
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
            # llama.cpp rotates neighbours; the two halves of a head are interleaved for it.
            W = W.reshape(heads, 2, W.shape[0] // heads // 2, *W.shape[1:])
            W = W.swapaxes(1, 2).reshape(weight.shape)
        if arch == "gemma2" and name.endswith("norm.weight"):
            W = W + 1
        if arch == "gpt2" and W.ndim == 2 and "blk." in name:
            W = W.T
        tensors[name] = np.ascontiguousarray(W)
    if arch != "gpt2" and config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = rope_factors(config)
    return tensors


def rope_factors(config):
    """By what llama.cpp divides the frequency of each pair of dimensions."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    half = torch.arange(len(scaled)) / len(scaled)
    return (config.rope_parameters["rope_theta"] ** -half / scaled).numpy()
