"""Banks of norms as a folder: an adapter with the tensors of each bank beside its own."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.checkpoints import adapter, native
from lnfree_interp.checkpoints.adapter import KEY
from lnfree_interp.checkpoints.exporting import base_below
from lnfree_interp.checkpoints.hub import ADAPTER, ADAPTER_WEIGHTS
from lnfree_interp.checkpoints.loading import load_checkpoint
from lnfree_interp.checkpoints.source import locate
from lnfree_interp.errors import CheckpointError
from lnfree_interp.files import new_folder
from lnfree_interp.models.agreement import require_same_logits
from lnfree_interp.models.sites import stock_weights

LAYER = "key_layer"
"""The field of the layer whose features the keys are in; None without keys."""


def write(
    shared: HookedTransformer,
    banks: Mapping[str, tuple[HookedTransformer, Mapping[str, Tensor], Tensor | None]],
    layer: int | None,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    revision: str | None,
) -> Path:
    """Write a folder, and read it back.

    Args:
        shared: The model below the banks, with norm sites.
        banks: By domain, the model with its bank, the bank, and its key if it has one.
        layer: That of the keys.
        out: The folder.
        base: The checkpoint that the shared model is of.
        revision: Its revision on the hub.

    Raises:
        LnfreeError: as `export_adapter`.
    """
    tensors = {
        domain: {**bank, **({} if key is None else {KEY: key})}
        for domain, (_, bank, key) in banks.items()
    }
    samples = {domain: native.sample_of(model) for domain, (model, _, _) in banks.items()}
    below, form = base_below(shared, base, revision)
    with new_folder(out) as folder:
        about = {"banks": samples, LAYER: layer}
        adapter.write(shared, below, os.fspath(base), revision, form, folder, tensors, about)
        del below
        where = {"dtype": shared.cfg.dtype, "device": shared.W_E.device}
        last, (model, _, _) = list(banks.items())[-1]
        back = load_checkpoint(folder, bank=last, check=False, **where).model
        require_same_logits(back, model, f"bank {last} as it was written against the model")
    return Path(out)


def read(
    source: str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
    dtype: torch.dtype,
    device: str | torch.device | None,
    check: bool,
) -> tuple[
    adapter.Adapter, HookedTransformer, dict[str, dict[str, Tensor]], dict[str, Tensor], int | None
]:
    """What the folder says; the shared model, the banks, their keys and the keys' layer.

    Raises:
        CheckpointError: if the folder holds no banks, or they do not fit the model.
        InexactError: if the model below is another one.
    """
    folder = locate(source)
    found = adapter.read(folder) if adapter.is_adapter(folder) else None
    if found is None or not found.banks:
        raise CheckpointError(f"{source}: no banks: give a folder that NormBanks.save wrote")
    file, layer = folder / ADAPTER, found.content.get(LAYER)
    where = {"base": base, "dtype": dtype, "device": device}
    shared = load_checkpoint(source, bank=adapter.BASE, check=check, **where).model
    if not (layer is None or (type(layer) is int and 0 <= layer <= shared.cfg.n_layers)):
        raise CheckpointError(f"{file}: {LAYER} is {layer!r:.40}, not a layer of the model")
    tensors = found.tensors()
    places = stock_weights(shared)
    banks: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, Tensor] = {}
    for domain in found.banks:
        own = adapter.tensors_of_bank(tensors, domain)
        if (key := own.pop(KEY, None)) is not None and layer is not None:
            if tuple(key.shape) != (shared.cfg.d_model,) or not key.isfinite().all():
                raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: the key of {domain} is not one")
            keys[domain] = key.to(shared.W_E.device)
        for name, W in own.items():
            if name not in places or places[name].shape != W.shape or not W.isfinite().all():
                raise CheckpointError(
                    f"{folder / ADAPTER_WEIGHTS}: {name} of bank {domain} does not fit {found.base}"
                )
        banks[domain] = {name: W.to(places[name]) for name, W in own.items()}
    return found, shared, banks, keys, layer
