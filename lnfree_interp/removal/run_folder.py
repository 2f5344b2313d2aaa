"""The files of a run.

    run.json                     what the run is made of: recipe, fingerprints, what the caller adds
    metrics.jsonl                one line per step
    checkpoints/step-000100/     model.safetensors, optimizer.safetensors, state.json

A checkpoint appears when it is complete, and is read only if its checksums agree.
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

VERSION = 4
"""The version of `run.json`."""
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to continue exactly."""

    step: int
    """Steps done."""
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    """Plain data: schedule, sigmas, position in the text, random numbers."""


class RunFolder:
    """The folder of a run. It is on the disk only after `create`."""

    def __init__(self, path: str | os.PathLike[str], keep: int = 2):
        self.path, self.keep = Path(path).absolute(), keep

    def create(self, config: Mapping[str, Any]) -> None:
        """Write a new folder with its `run.json`.

        Args:
            config: What the run is made of, as plain data.

        Raises:
            OutputError: if there is something in its place, or it cannot be written.
            RecipeError: if the configuration is not plain data.
        """
        try:
            content = json.dumps({"version": VERSION, **config}, indent=1)
        except TypeError as error:
            raise RecipeError(
                f"run.json keeps plain data, and these settings are not: {error}"
            ) from error
        path = require_writable(self.path)
        if path.is_dir():
            path.rmdir()  # an empty folder; new_folder writes it anew
        with new_folder(path) as folder:
            (folder / "run.json").write_text(content + "\n", encoding="utf-8")
            (folder / "checkpoints").mkdir()
            (folder / "metrics.jsonl").touch()

    def read(self) -> dict[str, Any]:
        """The `run.json` of an existing run.

        Raises:
            CheckpointError: if there is none, or it cannot be read.
        """
        file = self.path / "run.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            version = config.pop("version")
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path} has no run.json: it is not a run") from error
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if version != VERSION:
            raise CheckpointError(
                f"{file} has version {version}; this version of lnfree_interp reads {VERSION}"
            )
        return config

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The folders of the checkpoints by step, oldest first; some may be damaged."""
        folder = self.path / "checkpoints"
        found = {}
        for entry in folder.iterdir() if folder.is_dir() else ():
            if match := _NAME.fullmatch(entry.name):
                found[int(match[1])] = entry
        return dict(sorted(found.items()))

    def save(self, checkpoint: Checkpoint, spare: int | None = None) -> Path:
        """Write a checkpoint, and remove all but the latest ones.

        Args:
            checkpoint: What to write.
            spare: The step of one more checkpoint that stays, if there is one.

        Raises:
            OutputError: if it cannot be written; the checkpoints before it stay.
        """
        target = self.path / "checkpoints" / f"step-{checkpoint.step:06d}"
        try:
            if target.exists():  # written before a rollback
                _remove(target)
            with (self.path / "metrics.jsonl").open("rb") as metrics:
                os.fsync(metrics.fileno())  # a checkpoint needs the lines before it
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
            intact = ", ".join(path.name for path in self.checkpoints.values())
            kept = f"{intact} is intact" if intact else "there is no earlier one"
            raise OutputError(
                f"the checkpoint of step {checkpoint.step} could not be written ({error}); {kept}: "
                "free some disk space and resume"
            ) from error
        for step in list(self.checkpoints)[: -self.keep]:
            if step != spare:
                _remove(self.checkpoints[step])
        return target

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which a rollback has taken back."""
        for later, folder in self.checkpoints.items():
            if later > step:
                _remove(folder)

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            CheckpointError: if it does not exist or is damaged.
        """
        return _read(self.path / "checkpoints" / f"step-{step:06d}")

    def latest(self) -> Checkpoint:
        """The newest checkpoint.

        Raises:
            CheckpointError: if there is none, or it is damaged. The message names an
                intact one.
        """
        paths = self.checkpoints
        if not paths:
            raise CheckpointError(f"{self.path} has no checkpoint: start the run again")
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
                    f"{error}; {paths[earlier].name} is intact: remove {paths[step]} to resume "
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
        """The lines of all steps before a step. Later ones are removed from the file.

        Raises:
            CheckpointError: if a line is missing or cannot be read.
            OutputError: if the file cannot be written.
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
                break  # the run was interrupted while it wrote this line
            if step < before:
                kept[step] = record
        if len(kept) != before:
            raise CheckpointError(f"{file} has {len(kept)} of {before} steps: it was changed")
        partial = file.with_suffix(".partial")
        try:
            partial.write_text("".join(json.dumps(kept[step]) + "\n" for step in sorted(kept)))
            os.replace(partial, file)
        except OSError as error:
            raise OutputError(f"{file} cannot be written: {error}") from error
        return [kept[step] for step in sorted(kept)]

    def records(self) -> tuple[StepRecord, ...]:
        """What happened at each step so far. The file does not change.

        Raises:
            CheckpointError: if the metrics cannot be read.
        """
        found: dict[int, StepRecord] = {}
        try:
            text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
            for line in text.splitlines(keepends=True):
                if not line.endswith("\n"):
                    break  # the run was interrupted while it wrote this line
                record = StepRecord(**json.loads(line))
                found[record.step] = record  # after a rollback, the last record of a step counts
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path}/metrics.jsonl cannot be read: {error}") from error
        return tuple(found[step] for step in sorted(found))

    def tidy(self) -> None:
        """Remove incomplete checkpoints of a run that was interrupted."""
        for entry in (self.path / "checkpoints").glob(".*"):
            shutil.rmtree(entry, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that nobody finds half of it."""
    going = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def _checksum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sealed(content: Mapping[str, Any]) -> str:
    """JSON, and the checksum of it on a last line."""
    text = json.dumps(content)
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"


def _read(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify the checksum of every file."""
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
