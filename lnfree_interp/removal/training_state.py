"""What a checkpoint keeps of a run: weights, optimiser and random numbers, by name."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from lnfree_interp.errors import CheckpointError
from lnfree_interp.models.inserting import layout_of, varied
from lnfree_interp.models.norms import Norm
from lnfree_interp.removal.optimizer import PartialAdamW
from lnfree_interp.removal.processes import spread_like, whole


def fingerprint(model: HookedTransformer) -> str:
    """A hash of the weights, and of norms that are not live or not those of the config."""
    digest = hashlib.sha256()
    if varied(model):
        digest.update(json.dumps(layout_of(model), sort_keys=True).encode())
    live = {name for name, norm in model.named_modules() if isinstance(norm, Norm) and norm.live}
    for name, W in _kept(model):
        if name.rpartition(".")[0] in live and not isinstance(W, nn.Parameter):
            continue
        digest.update(name.encode())
        plain = W.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
    return digest.hexdigest()


def _kept(model: HookedTransformer) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            yield f"{name}.sigma", module.sigma
            yield f"{name}.sigma_first", module.sigma_first
            yield f"{name}.gate", module.gate


def tensors(model: HookedTransformer) -> dict[str, Tensor]:
    """The parameters, and the constants and gates of the norm sites, on the CPU."""
    return {name: whole(x.detach()).cpu().contiguous() for name, x in _kept(model)}


@torch.no_grad()
def load_tensors(model: HookedTransformer, saved: Mapping[str, Tensor]) -> None:
    """Restore what `tensors` returned.

    Raises:
        CheckpointError: if the names are those of another model.
    """
    kept = dict(_kept(model))
    _require_same(set(saved), set(kept))
    for name, place in kept.items():
        place.copy_(spread_like(saved[name], place))
    for module in model.modules():
        if isinstance(module, Norm):
            module.remember()


def optimizer_tensors(model: HookedTransformer, optimizer: PartialAdamW) -> dict[str, Tensor]:
    """The optimiser's moments and step counts, by parameter: `blocks.0.attn.W_Q|exp_avg`; of one
    that is trained in part, of its chosen entries."""
    return {
        f"{name}|{kind}": whole(x).cpu().contiguous()
        for name, parameter in optimizer.moved(model).items()
        for kind, x in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: HookedTransformer, optimizer: PartialAdamW, saved: Mapping[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned. A parameter that never had a gradient, such as
    the map of a site that was frozen from the start, has nothing to restore.

    Raises:
        CheckpointError: if there is a name that the model does not have.
    """
    optimizer.read()  # the model's weights may have been restored before
    parameters = optimizer.moved(model)
    names = {key.partition("|")[0] for key in saved}
    if odd := sorted(names - parameters.keys()):
        raise _of_another_model(odd[0])
    optimizer.state.clear()
    for key, x in saved.items():
        name, _, kind = key.partition("|")
        parameter = parameters[name]
        x = x if kind == "step" else spread_like(x, parameter)
        optimizer.state[parameter][kind] = x.to(parameter.device)


def _require_same(found: set[str], expected: set[str]) -> None:
    if odd := sorted(found ^ expected):
        raise _of_another_model(odd[0])


def _of_another_model(name: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint is of another model: {name} is in one of them only")


def random_state() -> dict[str, Any]:
    """The state of every generator that a hook might use, as plain data."""
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
    """Restore what `random_state` returned."""

    def plain(text: str) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(plain(saved["torch"]))
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([plain(text) for text in saved["cuda"]])
