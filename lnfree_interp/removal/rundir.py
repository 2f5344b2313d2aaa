"""A run's folder: what it is, what happened, and where it can go on.

    run.json                     what the run is made of: recipe, fingerprints, what the caller adds
    metrics.jsonl                one line per step
    checkpoints/step-000100/     model.safetensors, optimizer.safetensors, state.json

A checkpoint appears complete or not at all, and is read only when its checksums agree.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lnfree_interp.errors import CheckpointError, OutputError, RecipeError
from lnfree_interp.files import new_folder, require_writable
from lnfree_interp.removal.run import StepRecord

_VERSION = 1
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on as if nothing had happened."""

    step: int
    """Steps done."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    """Plain data: schedule, sigmas, position in the text, random numbers."""


class RunFolder:
    """A run's folder."""

    def __init__(self, path: Path, keep: int = 2):
        self.path, self.keep = path, keep

    @classmethod
    def create(cls, out: str | os.PathLike[str], config: Mapping[str, Any]) -> "RunFolder":
        """A new folder with its `run.json`.

        Raises:
            OutputError: if something stands there, or it cannot be written.
            RecipeError: if the configuration is not plain data.
        """
        try:
            content = json.dumps({"version": _VERSION, **config}, indent=1)
        except TypeError as error:
            raise RecipeError(f"a run keeps its settings as plain data: {error}") from error
        path = require_writable(out)
        if path.is_dir():
            path.rmdir()  # empty: it appears again when it is complete
        with new_folder(path) as folder:
            (folder / "run.json").write_text(content + "\n", encoding="utf-8")
            (folder / "checkpoints").mkdir()
            (folder / "metrics.jsonl").touch()
        return cls(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> tuple["RunFolder", dict[str, Any]]:
        """An existing run, and its `run.json`.

        Raises:
            CheckpointError: if there is none.
        """
        folder = Path(path).absolute()
        try:
            config = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            version = config.pop("version")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} holds no run (no run.json in it)") from error
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path}/run.json cannot be read: {error}") from error
        if version != _VERSION:
            raise CheckpointError(
                f"{path}/run.json has version {version}; this package reads {_VERSION}"
            )
        return cls(folder), config

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The folders of the checkpoints by step, oldest first; whole or not."""
        folder = self.path / "checkpoints"
        found = {}
        for entry in folder.iterdir() if folder.is_dir() else ():
            if match := _NAME.fullmatch(entry.name):
                found[int(match[1])] = entry
        return dict(sorted(found.items()))

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, and remove all but the latest.

        Raises:
            OutputError: if it cannot be written; the checkpoints before it stay.
        """
        target = self.path / "checkpoints" / f"step-{checkpoint.step:06d}"
        try:
            if target.exists():  # from before a rollback
                _remove(target)
            with (self.path / "metrics.jsonl").open("rb") as metrics:
                os.fsync(metrics.fileno())  # a checkpoint counts on the lines before it
            with new_folder(target) as folder:
                for name in ("model", "optimizer"):
                    file = folder / f"{name}.safetensors"
                    safetensors.torch.save_file(getattr(checkpoint, name), file)
                sums = {file.name: _checksum(file) for file in sorted(folder.iterdir())}
                state = {"step": checkpoint.step, "files": sums, "state": checkpoint.state}
                (folder / "state.json").write_text(_sealed(state), encoding="utf-8")
                for file in folder.iterdir():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
        except (OSError, OutputError) as error:
            whole = ", ".join(path.name for path in self.checkpoints.values())
            kept = f"{whole} is intact" if whole else "there is no earlier one"
            raise OutputError(
                f"the checkpoint of step {checkpoint.step} could not be written ({error}); {kept}: "
                "make room and resume"
            ) from error
        for step in list(self.checkpoints)[: -self.keep]:
            _remove(self.checkpoints[step])
        return target

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            CheckpointError: if it is not there, or damaged.
        """
        return _read(self.path / "checkpoints" / f"step-{step:06d}")

    def latest(self) -> Checkpoint:
        """The newest checkpoint.

        Raises:
            CheckpointError: if there is none, or it is damaged; then it names one that is whole.
        """
        paths = self.checkpoints
        if not paths:
            raise CheckpointError(f"{self.path} has no checkpoint: start the run anew")
        step = max(paths)
        try:
            return _read(paths[step])
        except CheckpointError as error:
            for earlier in sorted(set(paths) - {step}, reverse=True):
                try:
                    _read(paths[earlier])
                except CheckpointError:
                    continue
                raise CheckpointError(
                    f"{error}; {paths[earlier].name} is whole: remove {paths[step]} to go on "
                    "from there"
                ) from error
            raise

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a line to the metrics.

        Raises:
            OutputError: if it cannot be written.
        """
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(f"metrics cannot be written: {error}") from error

    def history(self, before: int) -> list[dict[str, Any]]:
        """The lines of all steps before a step; later ones, of a run cut off, are dropped.

        Raises:
            CheckpointError: if a line that is needed cannot be read.
        """
        file = self.path / "metrics.jsonl"
        kept: dict[int, dict[str, Any]] = {}
        for line in (
            file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ()
        ):
            try:
                record = json.loads(line)
                step = record["step"]
            except (ValueError, TypeError, KeyError):
                break  # the run was cut off while writing this one
            if step < before:
                kept[step] = record
        if len(kept) != before:
            raise CheckpointError(f"{file} holds {len(kept)} of {before} steps: it was changed")
        partial = file.with_suffix(".partial")
        try:
            partial.write_text("".join(json.dumps(kept[step]) + "\n" for step in sorted(kept)))
            os.replace(partial, file)
        except OSError as error:
            raise OutputError(f"{file} cannot be written: {error}") from error
        return [kept[step] for step in sorted(kept)]

    def records(self) -> tuple[StepRecord, ...]:
        """What happened at each step so far, read and not touched.

        Raises:
            CheckpointError: if the metrics cannot be read.
        """
        found: dict[int, StepRecord] = {}
        try:
            text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
            for line in text.splitlines(keepends=True):
                if not line.endswith("\n"):
                    break  # the run was cut off while writing this one
                record = StepRecord(**json.loads(line))
                found[record.step] = record  # a step that was repeated counts as it was last
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path}/metrics.jsonl cannot be read: {error}") from error
        return tuple(found[step] for step in sorted(found))

    def tidy(self) -> None:
        """Remove what a run that was cut off left half written."""
        for entry in (self.path / "checkpoints").glob(".*"):
            shutil.rmtree(entry, ignore_errors=True)


def _remove(folder: Path) -> None:
    """At once as far as anybody can see: renamed before its files go one by one."""
    going = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def _checksum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sealed(content: Mapping[str, Any]) -> str:
    """JSON whose last line is the checksum of what stands before."""
    text = json.dumps(content)
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"


def _read(folder: Path) -> Checkpoint:
    """A checkpoint whose every file is as it was written."""
    try:
        text, seal = (folder / "state.json").read_text(encoding="utf-8").split("\n")[:2]
        if hashlib.sha256(text.encode()).hexdigest() != seal:
            raise CheckpointError(f"{folder.name}/state.json is damaged")
        state = json.loads(text)
        for name, checksum in state["files"].items():
            if _checksum(folder / name) != checksum:
                raise CheckpointError(f"{folder.name}/{name} is damaged")
        tensors = {
            name: safetensors.torch.load_file(folder / f"{name}.safetensors")
            for name in ("model", "optimizer")
        }
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder.name} is damaged: {error}") from error
    return Checkpoint(state["step"], tensors["model"], tensors["optimizer"], state["state"])
