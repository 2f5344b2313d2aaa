"""Results as files: tensors as safetensors, the rest as JSON in the header; nothing is executed."""

import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lnfree_interp.analysis.components import Component
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import MeasuredError

T = TypeVar("T")

_HEADER = "lnfree_result"
_PIECES = ("Component", "Certificate", "MeasuredError")


def _to_plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Anything that results are made of, as JSON; tensors go into a dictionary of their own."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Component):
        through = [_to_plain(one, tensors) for one in value.through]
        return {"component": [value.kind, value.layer, value.index, value.pos, through]}
    if is_dataclass(value) and not isinstance(value, type):
        content = {f.name: _to_plain(getattr(value, f.name), tensors) for f in fields(value)}
        return {"type": type(value).__name__, "fields": content}
    if isinstance(value, Mapping):
        return {"map": [[key, _to_plain(one, tensors)] for key, one in value.items()]}
    if isinstance(value, tuple | list):
        return [_to_plain(one, tensors) for one in value]
    return value


def _from_plain(plain: Any, tensors: Mapping[str, Tensor], kind: type) -> Any:
    if isinstance(plain, list):
        return tuple(_from_plain(one, tensors, kind) for one in plain)
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        return tensors[plain["tensor"]]
    if "dtype" in plain:
        return getattr(torch, plain["dtype"])
    if "component" in plain:
        sort, layer, index, pos, through = plain["component"]
        return Component(sort, layer, index, pos, _from_plain(through, tensors, kind))
    if "map" in plain:
        return {key: _from_plain(one, tensors, kind) for key, one in plain["map"]}
    made = {name: _from_plain(one, tensors, kind) for name, one in plain["fields"].items()}
    return _class_of(plain["type"], kind)(**made)


def _class_of(name: str, kind: type) -> type:
    import lnfree_interp as lf

    if name == "MeasuredError":
        return MeasuredError
    found = getattr(lf, name, None) if name in lf.__all__ else None
    if not isinstance(found, type) or not (issubclass(found, kind) or name in _PIECES):
        raise ValueError(f"{name!r} is no result of this package")
    return found


def saved(result: Any) -> bytes:
    """A result as the content of a file."""
    tensors: dict[str, Tensor] = {}
    plain = _to_plain(result, tensors)
    return save(tensors, {_HEADER: json.dumps(plain)})


def read_saved(path: str | os.PathLike[str], kind: type[T]) -> T:
    """A result from a file.

    Args:
        path: The file.
        kind: What the result must be. The file can name classes of the package that are, and
            those of a result's parts, and no others.

    Raises:
        DataError: if the file is not a saved result, or is damaged.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            plain = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = _from_plain(plain, tensors, kind)
        if not isinstance(found, kind):
            raise TypeError(f"its header holds {type(found).__name__}")
        return found
    except (
        OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        raise DataError(
            f"{path} is no result that `.save` wrote, or the file is damaged: {error}"
        ) from error
