"""Finds the model that a name stands for: a checkpoint, or the result of a run."""

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
from lnfree_interp.data.names import is_bundled
from lnfree_interp.errors import CheckpointError
from lnfree_interp.removal.run import StepRecord
from lnfree_interp.removal.run_folder import RunFolder


@dataclass(frozen=True)
class NamedModel:
    """A checkpoint, and what is known about its training."""

    checkpoint: str
    """Hub id, `id@revision`, or local folder."""
    original: str | None = None
    """The model that the run started from, if there was a run."""
    history: tuple[StepRecord, ...] = ()
    """The steps of the run."""
    text: str | None = None
    """The text of the run."""

    @property
    def bundled(self) -> bool:
        """Whether this is the bundled model, or a run that started from it."""
        return is_bundled(self.original or self.checkpoint)


def find_model(source: str | os.PathLike[str]) -> NamedModel:
    """The model that a name stands for.

    Args:
        source: The folder of a run, a folder that `lnfree demo` wrote, or a checkpoint.

    Raises:
        CheckpointError: if a run is not finished, or its folder cannot be read.
    """
    folder = Path(source)
    if (folder / "run.json").is_file():
        run = RunFolder(folder)
        about = run.read().get("about")
        if not (folder / "model").is_dir():
            how = f"lnfree remove --resume {source}" if about else "lf.export(run.model, ...)"
            raise CheckpointError(f"{source} is a run without a model: {how} writes it")
        text = about.get("data") if about else None
        return NamedModel(str(folder / "model"), _started_from(about), run.records(), text)
    if (folder / "metrics.json").is_file() and (folder / "model").is_dir():
        try:
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            about = {"model": metrics["source"]} if "source" in metrics else None
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder}/metrics.json cannot be read: {error}") from error
        return NamedModel(str(folder / "model"), _started_from(about))
    return NamedModel(os.fspath(source))


def _started_from(about: Mapping[str, Any] | None) -> str | None:
    """The name of the original. A run whose model is None started from the bundled checkpoint."""
    if about is None or "model" not in about:
        return None
    if about["model"] is None:
        return str(bundled_checkpoint())
    if about.get("teacher"):  # a later stage: what the first one started from
        return str(about["teacher"])
    revision = about.get("revision")
    return f"{about['model']}@{revision}" if revision else str(about["model"])


def with_revision(name: str) -> tuple[str, str | None]:
    """Source and revision of `id@revision`, a hub id or a local folder."""
    source, _, revision = name.rpartition("@")
    return (name, None) if not source or os.path.exists(name) else (source, revision)


def load_named(
    name: str, tokenizer: PreTrainedTokenizerBase | None = None, recorded_by: str | None = None
) -> HookedTransformer:
    """Load a checkpoint by name.

    Args:
        name: Hub id, `id@revision`, or local folder.
        tokenizer: For a checkpoint without a tokenizer; any other keeps its own.
        recorded_by: The run that names this checkpoint as its original, for the error message.

    Raises:
        CheckpointError: if the name is empty, or there is no such checkpoint.
        LnfreeError: for what `load` refuses.
    """
    if not name.strip():
        raise CheckpointError("the name of the model is empty: give a hub id or a folder")
    source, revision = with_revision(name)
    try:
        if tokenizer is not None and has_tokenizer(source, revision):
            tokenizer = None
        return load(source, revision=revision, tokenizer=tokenizer)
    except CheckpointError as error:
        if recorded_by is None:
            raise
        raise CheckpointError(
            f"{recorded_by} started from {name}, which cannot be loaded ({error}): name the "
            "original with --original"
        ) from error
