"""The published LN-free GPT-2 formats, written as their authors write them.

Every writer starts from the same plain numbers (`Finished`): a GPT-2 state dict with live gains and
biases, and the constant of each norm; `reference_logits` is what such a model computes, in float64
and in nothing but elementary operations.
"""

import json
import math
from dataclasses import dataclass

import torch

from support.models import make_gpt2


@dataclass
class Finished:
    """A GPT-2 whose norms divide by constants."""

    config: object
    state: dict
    sigma: dict  # transformer.h.0.ln_1 -> number or [n_embd]

    def norms(self):
        return list(self.sigma)


def finished(seed=0, **config):
    model = make_gpt2(seed, **config)
    generator = torch.Generator().manual_seed(seed)
    sigma = {}
    names = [f"transformer.h.{i}.ln_{j}" for i in range(model.config.n_layer) for j in (1, 2)]
    for name in [*names, "transformer.ln_f"]:
        sigma[name] = 0.5 + torch.rand((), generator=generator).item()
    return Finished(model.config, model.state_dict(), sigma)


def reference_logits(model, tokens):
    W = {name: tensor.double() for name, tensor in model.state.items()}
    n_layer, n_head = model.config.n_layer, model.config.n_head

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / model.sigma[name] * W[f"{name}.weight"] + W[f"{name}.bias"]

    def act(x):
        if model.config.activation_function == "gelu":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = W["transformer.wte.weight"][tokens] + W["transformer.wpe.weight"][: tokens.shape[1]]
    mask = torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool()
    for layer in range(n_layer):
        h = f"transformer.h.{layer}"
        qkv = norm(x, f"{h}.ln_1") @ W[f"{h}.attn.c_attn.weight"] + W[f"{h}.attn.c_attn.bias"]
        q, k, v = (
            part.unflatten(-1, (n_head, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
        )
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + z @ W[f"{h}.attn.c_proj.weight"] + W[f"{h}.attn.c_proj.bias"]
        inner = norm(x, f"{h}.ln_2") @ W[f"{h}.mlp.c_fc.weight"] + W[f"{h}.mlp.c_fc.bias"]
        x = x + act(inner) @ W[f"{h}.mlp.c_proj.weight"] + W[f"{h}.mlp.c_proj.bias"]
    return norm(x, "transformer.ln_f") @ W["transformer.wte.weight"].T


def _write(model, state, folder, dtype=None, epsilon=1e12):
    from transformers import GPT2LMHeadModel

    config = type(model.config).from_dict(model.config.to_dict() | {"layer_norm_epsilon": epsilon})
    hf_model = GPT2LMHeadModel(config).to(dtype or next(iter(state.values())).dtype)
    hf_model.load_state_dict(state)
    hf_model.save_pretrained(folder)


def write_schaeff(model, folder, dtype=torch.float32, epsilon=1e12):
    """Gains times 1e6 / sigma, biases as they are, nothing folded."""
    state = {name: W.to(dtype) for name, W in model.state.items()}
    for name, sigma in model.sigma.items():
        gain = model.state[f"{name}.weight"].double() * 1e6 / sigma
        state[f"{name}.weight"] = gain.to(dtype)
    _write(model, state, folder, dtype, epsilon)


def write_apollo(model, folder, dtype=torch.float32, epsilon=1e12):
    """ln_1 and ln_2 folded into c_attn and c_fc, their gains 1e6; ln_f kept apart."""
    state = {name: W.double() for name, W in model.state.items()}
    for name, sigma in model.sigma.items():
        gain, bias = state[f"{name}.weight"] / sigma, state[f"{name}.bias"]
        if name == "transformer.ln_f":
            state[f"{name}.weight"] = gain * 1e6
            continue
        reader = name[:-4] + ("attn.c_attn" if name.endswith("1") else "mlp.c_fc")
        state[f"{reader}.bias"] = state[f"{reader}.bias"] + bias @ state[f"{reader}.weight"]
        state[f"{reader}.weight"] = gain[:, None] * state[f"{reader}.weight"]
        state[f"{name}.weight"] = torch.full_like(gain, 1e6)
        state[f"{name}.bias"] = torch.zeros_like(bias)
    _write(model, {name: W.to(dtype) for name, W in state.items()}, folder, dtype, epsilon)


def fake_layer_norm_state(model):
    """GPT-2's keys, and per norm the buffers of FakeLayerNorm at the end of a run."""
    state = dict(model.state)
    for name, sigma in model.sigma.items():
        constants = torch.full((model.config.n_embd,), sigma, dtype=torch.float64)
        state |= {
            f"{name}.is_fake": torch.tensor(True),
            # Only ln_1 is asked for values; the others keep the flag's initial False.
            f"{name}.attn_v_is_fake": torch.tensor(name.endswith("ln_1")),
            f"{name}.bos_special_treatment": torch.tensor(False),
            f"{name}.real_average_std": torch.tensor(sigma),
            f"{name}.real_bos_std": torch.tensor(3.0),
            f"{name}.grad_acc_steps": torch.tensor(16),
            f"{name}.momentum": torch.tensor(0.9),
            f"{name}.average_std_buffer": constants,
            f"{name}.bos_std_buffer": constants.clone(),
        }
    return state


def with_lora(model, state, rank=3):
    """Adapters over every Conv1D; the model's own weight is what they sum up to."""
    generator = torch.Generator().manual_seed(5)
    adapted = dict(state)
    for name in list(state):
        if not name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            continue
        W, module = adapted.pop(name), name.removesuffix(".weight")
        A = torch.randn(W.shape[0], rank, generator=generator).to(W) * 0.1
        B = torch.randn(rank, W.shape[1], generator=generator).to(W) * 0.1
        adapted[f"{module}.weight_frozen"] = W - A @ B
        adapted[f"{module}.bias_frozen"] = adapted.pop(f"{module}.bias")
        adapted[f"{module}.lora_A"], adapted[f"{module}.lora_B"] = A, B
    return adapted


def write_bin(model, state, folder, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names, weight_map = list(state), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {name: state[name] for name in names[i::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_nanogpt(model, file):
    """ckpt.pt of a compiled run: nn.Linear layout, optimiser and arguments beside the weights."""
    state = {}
    for name, W in model.state.items():
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        state[f"_orig_mod.{name}"] = W.T.contiguous() if linear else W
    config = model.config
    checkpoint = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(1200.0)}}, "param_groups": []},
        "model_args": {
            "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
            "block_size": config.n_positions, "vocab_size": config.vocab_size,
            "bias": True, "dropout": 0.0,
        },
        "iter_num": 1200,
        "best_val_loss": 3.01,
        "config": {"learning_rate": 6e-4, "device": "cuda", "compile": True},
    }  # fmt: skip
    torch.save(checkpoint, file)
