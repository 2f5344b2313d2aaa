"""What a name stands for: a checkpoint, or a folder that a run wrote, with what it started from."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from lnfree_interp.bundled import bundled_checkpoint
from lnfree_interp.checkpoints.loading import load
from lnfree_interp.checkpoints.source import has_tokenizer
from lnfree_interp.errors import CheckpointError
from lnfree_interp.removal.run import StepRecord
from lnfree_interp.removal.rundir import RunFolder


@dataclass(frozen=True)
class Subject:
    """A model, and where it comes from."""

    model: str
    """Hub id, `id@revision`, or local folder."""
    original: str | None = None
    """What its norms were removed from, as far as the folder says."""
    history: tuple[StepRecord, ...] = ()
    text: str | None = None
    """What it was trained on."""


def find_subject(source: str | os.PathLike[str]) -> Subject:
    """The folder of a run, what `lnfree demo` wrote, or a checkpoint as it is.

    Raises:
        CheckpointError: if a run is not finished, or its folder cannot be read.
    """
    folder = Path(source)
    if (folder / "run.json").is_file():
        run, config = RunFolder.open(folder)
        about = config.get("about")
        if not (folder / "model").is_dir():
            how = "export(run.model, ...) writes one" if not about else "it goes on with"
            again = "" if not about else f" lnfree remove --resume {source}"
            raise CheckpointError(f"{source} is not finished, it has no model yet: {how}{again}")
        text = about.get("text") if about else None
        return Subject(str(folder / "model"), _started_from(about), run.records(), text)
    if (folder / "metrics.json").is_file() and (folder / "model").is_dir():
        try:
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            about = {"model": metrics["source"]} if "source" in metrics else None
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder}/metrics.json cannot be read: {error}") from error
        return Subject(str(folder / "model"), _started_from(about))
    return Subject(os.fspath(source))


def _started_from(about: Mapping[str, Any] | None) -> str | None:
    """The original: None in a run's own words means the bundled checkpoint."""
    if about is None or "model" not in about:
        return None
    if about["model"] is None:
        return str(bundled_checkpoint())
    revision = about.get("revision")
    return f"{about['model']}@{revision}" if revision else str(about["model"])


def load_named(
    name: str, tokenizer: PreTrainedTokenizerBase | None = None, recorded_by: str | None = None
) -> HookedTransformer:
    """As `load`, of a hub id, `id@revision` or a local folder.

    Args:
        name: What to load.
        tokenizer: For a checkpoint without one; any other keeps its own.
        recorded_by: The run that says so, for the message if it is not there.

    Raises:
        CheckpointError: if there is no name, or as `load`.
        LnfreeError: as `load`.
    """
    if not name.strip():
        raise CheckpointError("a model without a name: give a hub id or a folder")
    source, _, revision = name.rpartition("@")
    if not source or os.path.exists(name):
        source, revision = name, None
    try:
        if tokenizer is not None and has_tokenizer(source, revision):
            tokenizer = None
        return load(source, revision=revision, tokenizer=tokenizer)
    except CheckpointError as error:
        if recorded_by is None:
            raise
        raise CheckpointError(
            f"{recorded_by} says that it started from {name}, and: {error}; name the original with "
            "--against"
        ) from error
