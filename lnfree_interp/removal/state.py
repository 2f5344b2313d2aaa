"""What a checkpoint holds: weights, optimiser and random numbers, by name."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.checkpoints.architectures import ARCHITECTURES
from lnfree_interp.checkpoints.layouts import hooked_names, optional_names
from lnfree_interp.errors import CheckpointError
from lnfree_interp.models.norms import Norm
from lnfree_interp.models.sites import stock_name
from lnfree_interp.removal.processes import spread_like, whole
from lnfree_interp.removal.recipe import Recipe


def adamw(model: HookedTransformer, recipe: Recipe) -> torch.optim.AdamW:
    """Weight decay by TransformerLens' names: b_Q and b_K are matrices by shape, but biases.

    What the model's architecture has no place for is not trained: a bias in every Llama layer would
    be one that transformers cannot hold.
    """
    left_over = _without_place(model)
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if name in left_over:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            leaf = name.rpartition(".")[2].lstrip("_")
            (decayed if leaf.startswith("W_") else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


def _without_place(model: HookedTransformer) -> set[str]:
    """Parameters that the model's class in transformers does not have, as far as we know it."""
    architecture = ARCHITECTURES.get(model.cfg.original_architecture or "")
    if architecture is None:
        return set()
    parameters = dict(model.named_parameters())
    optional = optional_names(architecture.layout, model.cfg)
    switched = {ours for names in optional.values() for ours in names}
    places = hooked_names(architecture.layout, model.cfg)
    if not any(parameters[name].any() for name in switched):
        places = places - switched
    return {name for name in parameters if stock_name(name) not in places}


def fingerprint(model: HookedTransformer) -> str:
    """Of the weights: two models with the same one are the same."""
    digest = hashlib.sha256()
    for name, W in model.named_parameters():
        digest.update(name.encode())
        plain = W.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()


def _kept(model: HookedTransformer) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            yield f"{name}.sigma", module.sigma
            yield f"{name}.gate", module.gate


def tensors(model: HookedTransformer) -> dict[str, Tensor]:
    """Parameters, and the constants and gates of the norm sites, on the CPU."""
    return {name: whole(x.detach()).cpu().contiguous() for name, x in _kept(model)}


@torch.no_grad()
def load_tensors(model: HookedTransformer, saved: Mapping[str, Tensor]) -> None:
    """Put them back.

    Raises:
        CheckpointError: if they are another model's.
    """
    kept = dict(_kept(model))
    _require_same(set(saved), set(kept))
    for name, place in kept.items():
        place.copy_(spread_like(saved[name], place))
    for module in model.modules():
        if isinstance(module, Norm):
            module.remember()


def optimizer_tensors(
    model: HookedTransformer, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The optimiser's moments and step counts, by parameter: `blocks.0.attn.W_Q|exp_avg`."""
    return {
        f"{name}|{kind}": whole(x).cpu().contiguous()
        for name, parameter in model.named_parameters()
        for kind, x in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: HookedTransformer, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """Put them back.

    Raises:
        CheckpointError: if they are another model's.
    """
    parameters = dict(model.named_parameters())
    names = {key.partition("|")[0] for key in saved}
    if names:
        _require_same(names, {name for name, p in parameters.items() if p.requires_grad})
    optimizer.state.clear()
    for key, x in saved.items():
        name, _, kind = key.partition("|")
        parameter = parameters[name]
        x = x if kind == "step" else spread_like(x, parameter)
        optimizer.state[parameter][kind] = x.to(parameter.device)


def _require_same(found: set[str], expected: set[str]) -> None:
    if odd := sorted(found ^ expected):
        raise CheckpointError(f"the checkpoint is of another model: {odd[0]} does not match")


def random_state() -> dict[str, Any]:
    """Of every generator that a hook might use, as plain data."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [x.numpy().tobytes().hex() for x in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def set_random_state(saved: Mapping[str, Any]) -> None:
    """Put it back."""

    def plain(text: str) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(plain(saved["torch"]))
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([plain(text) for text in saved["cuda"]])
