"""Finding a checkpoint: a local path is used as it is, a hub id is downloaded."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lnfree_interp.errors import CheckpointError

HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""

OFFLINE_WAYS = (
    "pass a local folder (config.json, model.safetensors, tokenizer files), or download it where "
    "there is a network and set HF_HOME to that cache"
)

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model")
"""What a tokenizer may be in, one of them."""
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of a file with all weights; an index of shards adds `.index.json` to the name."""

ADAPTER, ADAPTER_WEIGHTS = "lnfree_adapter.json", "adapter.safetensors"
"""The files of a model that is kept as what training changed of another, see `adapter`."""

_NANOGPT_SUFFIXES = (".pt", ".pth")

_GGUF_SUFFIX = ".gguf"

_CONFIGS = ("config.json", "hooked_transformer.json", ADAPTER)


def locate(
    source: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    weights: bool = True,
) -> Path:
    """The local folder, GGUF or nanoGPT file of a source, downloaded if it is a hub id.

    A folder whose only weights are one GGUF file stands for that file.

    Args:
        source: Hub id, folder or file.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub files are kept.
        weights: False: the config is enough, and no weights are downloaded.

    Raises:
        CheckpointError: if it is neither there nor on the hub, the hub cannot be reached, or a
            folder holds several GGUF files.
    """
    name = os.fspath(source)
    path = Path(name)
    if path.is_dir():
        return _only_gguf(path) or path
    if path.is_file() and (path.suffix in _NANOGPT_SUFFIXES or is_gguf(path)):
        return path
    if path.exists():
        raise CheckpointError(
            f"{name}: a file of another kind: pass a folder, a GGUF file (.gguf), a nanoGPT file "
            "(.pt, .pth) or a hub id"
        )
    if is_gguf(path):
        raise CheckpointError(
            f"{name}: no such file: pass the path of a GGUF file on this machine (one from the hub "
            "is downloaded first: `hf download ID FILE.gguf`)"
        )
    return _download(name, revision, cache_dir, weights)


def is_gguf(path: Path) -> bool:
    """Whether a path has the suffix of a GGUF file."""
    return path.suffix.lower() == _GGUF_SUFFIX


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no other weights."""
    files = sorted(path for path in folder.iterdir() if is_gguf(path))
    others = (pattern for pattern in ("*.safetensors*", "*.bin*") if any(folder.glob(pattern)))
    if not files or any(others):
        return None
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(files)} GGUF files ({', '.join(file.name for file in files)}): "
            "pass the path of one of them"
        )
    return files[0]


def _download(
    name: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, weights: bool
) -> Path:
    """The snapshot folder of a hub model, without a network if the cache holds all of it."""
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    enough: Path | None = None
    try:
        for config in _CONFIGS:
            cached = try_to_load_from_cache(name, config, **where)
            if isinstance(cached, str) and (not weights or _has_weights(Path(cached).parent)):
                enough = Path(cached).parent
                whole = config == ADAPTER  # its tokenizer is the base's
                if not weights or whole or any((enough / f).is_file() for f in TOKENIZER_FILES):
                    return enough  # else another program has fetched the weights alone
        # One question with a short time-out, in place of slow retries.
        files = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT).siblings or []
        names = [file.rfilename for file in files]
        safe = any(file.endswith(".safetensors") and "/" not in file for file in names)
        unwanted = ["*/*", "*.bin" if safe else "*.safetensors", "*.h5", "*.msgpack", "*.ot"]
        wanted = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.txt", "*.model", "*.jinja"]
        wanted = wanted if weights else [*_CONFIGS]
        return Path(
            snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted, **where)
        )
    except HFValidationError as error:
        raise CheckpointError(f"{name}: no such folder, and not a hub id") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: gated on the hub: accept its terms there, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{name}: no such folder and no such hub model") from error
    except LocalEntryNotFoundError as error:
        if enough is not None:
            return enough
        raise CheckpointError(f"{name}: the hub cannot be reached; {OFFLINE_WAYS}") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{name}: the hub answered: {first_line(error)}") from error
    except Exception as error:  # no route, no name service, proxy, offline mode
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES):
            raise CheckpointError(f"{name}: cannot be downloaded: {error}") from error
        if enough is not None:
            return enough
        raise CheckpointError(f"{name}: the hub cannot be reached; {OFFLINE_WAYS}") from error


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot folder in the cache holds all weights, in one piece or in shards."""
    for name in (*WEIGHTS_FILES, ADAPTER_WEIGHTS):
        if (folder / name).is_file():
            return True
        if (folder / f"{name}.index.json").is_file():
            names = set(
                json.loads((folder / f"{name}.index.json").read_text())["weight_map"].values()
            )
            return all((folder / name).is_file() for name in names)
    return False


def first_line(error: Exception) -> str:
    """The first line of an error of another library, for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
