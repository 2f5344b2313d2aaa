"""Reading the pickles of published formats: tensors and plain data, never code."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lnfree_interp.errors import CheckpointError


def read_pickle(file: Path) -> Any:
    """The content of a `.bin` or `.pt` file.

    Raises:
        CheckpointError: if it is damaged, or holds anything but tensors and plain containers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of the pickle
            try:  # mapped: tensors that nobody needs, such as an optimiser's, are never read
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format of before 2020 cannot be mapped
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: refused: the pickle is damaged, or holds more than tensors and could run "
            "code when opened"
        ) from error
    except Exception as error:  # zipfile, EOFError, RuntimeError from the archive reader
        reason = (str(error).splitlines() or ["empty"])[0]
        raise CheckpointError(f"{file}: damaged or truncated: {reason:.100}") from error


def read_state_dict(folder: Path) -> dict[str, Tensor]:
    """The weights in `pytorch_model.bin`, in one piece or in shards.

    Raises:
        CheckpointError: if a shard is missing or a file is not a state dict; as `read_pickle`.
    """
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        files = [folder / name for name in shards_of(index)]
    else:
        files = [folder / "pytorch_model.bin"]
    state: dict[str, Tensor] = {}
    for file in files:
        part = read_pickle(file)
        if not isinstance(part, dict) or not all(
            isinstance(name, str) and isinstance(W, Tensor) for name, W in part.items()
        ):
            raise CheckpointError(f"{file}: not a state dict of tensors")
        state |= part
    return state


def shards_of(index: Path) -> list[str]:
    """The files that an index of shards names, after checking that all of them exist.

    Raises:
        CheckpointError: if the index cannot be read or a file is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a file name that is not text")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of shards: {error!s:.80}") from error
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{index.parent}: {index.name} names {missing[0]}, which is missing")
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index}: names a file outside the folder: {outside[0]}")
    return names
