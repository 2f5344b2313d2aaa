"""Opening a checkpoint in `transformers`: a hub id or a local folder, or the reason why not."""

import os
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lnfree_interp.checkpoints.architectures import architecture_of
from lnfree_interp.errors import CheckpointError

HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""

OFFLINE_WAYS = (
    "pass a local folder (config.json, model.safetensors, tokenizer files), or download it where "
    "there is a network and set HF_HOME to that cache"
)

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model")


def open_in_transformers(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a hub id or a local folder.

    Only safetensors are read, and no code from the checkpoint is run.

    Args:
        source: Hub id such as `gpt2`, or a folder.
        dtype: Of the weights in memory, whatever the file holds.
        device: Where the weights go.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub files are kept. Default: that of `huggingface_hub`.

    Raises:
        CheckpointError: if something is missing, unreadable or unreachable.
        UnsupportedModelError: if the architecture is not supported; found before any weight is
            fetched.
    """
    name = os.fspath(source)
    if Path(name).is_dir():
        _require_complete(Path(name))
    else:
        _require_on_hub(name, revision, cache_dir)
    where = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **where)
    except Exception as error:  # transformers validates with types of its own
        raise CheckpointError(
            f"{name}: config.json cannot be read: {_first_line(error)}"
        ) from error
    _, architecture = architecture_of(config)
    architecture.config(config)  # refuses what it cannot represent before any weight is fetched
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except Exception as error:  # the tokenizer libraries raise their own types
        raise CheckpointError(f"{name}: no usable tokenizer: {_first_line(error)}") from error
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **where,
        )
    except Exception as error:  # safetensors raises its own types
        raise CheckpointError(f"{name}: weights cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{name}: the weights file lacks {', '.join(missing[:3])}")
    if unknown := sorted(report["unexpected_keys"]):
        raise CheckpointError(
            f"{name}: the weights file holds {', '.join(unknown[:3])}, which has no place in the "
            "model of config.json"
        )
    return model.to(device).eval(), tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _require_complete(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json, so not a Hugging Face checkpoint folder")
    if not any(folder.glob("*.safetensors")):
        found = [file.name for file in folder.glob("*") if file.suffix in {".bin", ".pt", ".pth"}]
        hint = f"; {found[0]} is a pickle: convert it to safetensors" if found else ""
        raise CheckpointError(f"{folder}: no model.safetensors{hint}")
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder}: no tokenizer (tokenizer.json): save it there with "
            "AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
        )


def _require_on_hub(
    name: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> None:
    """One question to the hub with a short time-out, in place of transformers' slow retries."""
    if Path(name).exists():
        raise CheckpointError(f"{name}: a file; a checkpoint is a folder or a hub id")
    try:
        cached = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
        if isinstance(cached, str):
            return
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
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
    except HfHubHTTPError as error:
        raise CheckpointError(f"{name}: the hub answered: {_first_line(error)}") from error
    except Exception as error:  # no route, no name service, proxy, offline mode
        raise CheckpointError(f"{name}: the hub cannot be reached; {OFFLINE_WAYS}") from error
