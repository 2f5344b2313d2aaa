"""A `HookedTransformer` as a folder in TransformerLens' own names, for what no class of
transformers can hold: other norms, the frozen form, architectures with biases added.

`hooked_transformer.json` is the `HookedTransformerConfig` and the kind of norm, weights are
`model.safetensors`, the tokenizer lies beside them.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lnfree_interp.checkpoints.layouts import is_finite
from lnfree_interp.errors import CheckpointError
from lnfree_interp.models.construct import copy_weights, hooked_transformer
from lnfree_interp.models.forms import frozen_transformer
from lnfree_interp.models.norm_conversions import CRMSNormPre, install_crms
from lnfree_interp.models.norms import FrozenNorm

CONFIG = "hooked_transformer.json"
_VERSION = 1
_NOT_SAVED = ("dtype", "device", "n_devices", "seed", "init_weights")


def is_native(path: Path) -> bool:
    """Whether a folder was written by `write`."""
    return (path / CONFIG).is_file()


def write(model: HookedTransformer, folder: Path) -> None:
    """Config, weights and tokenizer into an existing folder.

    Args:
        model: Stock, in the frozen form, or with CRMSNorms; not with norm sites.
        folder: Where to.
    """
    cfg = {name: _plain(value) for name, value in model.cfg.to_dict().items()}
    content: dict[str, Any] = {
        "version": _VERSION,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "config": {name: value for name, value in cfg.items() if name not in _NOT_SAVED},
        "frozen": {
            name: norm.sigma.item()
            for name, norm in model.named_modules()
            if isinstance(norm, FrozenNorm)
        },
        "crms": any(isinstance(norm, CRMSNormPre) for norm in model.modules()),
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    weights = {name: W.detach().contiguous().cpu() for name, W in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def read(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    device: torch.device,
) -> HookedTransformer:
    """What `write` wrote.

    Raises:
        CheckpointError: if a file is missing, damaged, or does not fit the others.
    """
    file = folder / CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise CheckpointError(f"{file}: version {content['version']}, not {_VERSION}")
        known = {field.name for field in fields(HookedTransformerConfig)} - set(_NOT_SAVED)
        if unknown := sorted(set(content["config"]) - known):
            raise CheckpointError(f"{file}: unknown field {unknown[0]}")
        cfg = HookedTransformerConfig(
            **content["config"], dtype=dtype, device=str(device), init_weights=False
        )
        frozen, crms = dict(content["frozen"]), bool(content["crms"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error!s:.100}") from error
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{folder}: no model.safetensors")
    if tokenizer is None and (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        with safe_open(weights, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own types
        raise CheckpointError(f"{weights}: damaged or truncated: {error!s:.100}") from error
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    if cfg.n_params is None or cfg.n_params > stored * 4:
        raise CheckpointError(f"{file}: describes a larger model than {weights.name} holds")
    with safe_open(weights, framework="pt", device=str(device)) as opened:
        pairs = ((name, _finite(opened.get_tensor(name), name, weights)) for name in shapes)
        if frozen:
            return frozen_transformer(cfg, pairs, frozen, tokenizer)
        if not crms:
            return hooked_transformer(cfg, pairs, tokenizer)
        model = hooked_transformer(cfg, {}, tokenizer, complete=False)
        install_crms(model)
        copy_weights(model, pairs)
        return model.eval()


def _finite(W: torch.Tensor, name: str, file: Path) -> torch.Tensor:
    if not is_finite(W):
        raise CheckpointError(f"{file}: {name} holds values that are not finite")
    return W


def _plain(value: Any) -> Any:
    """For JSON: numpy numbers as Python's."""
    return value.item() if hasattr(value, "item") else value
