"""Shows how a run is going: a progress bar, and trackers such as tensorboard."""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from tqdm import tqdm

from lnfree_interp.errors import RecipeError
from lnfree_interp.removal.recipe import Recipe

if TYPE_CHECKING:
    from lnfree_interp.removal.run import StepRecord

TRACKERS: Mapping[str, Callable[[str, Path], GeneralTracker]] = {
    "tensorboard": lambda name, folder: TensorBoardTracker(name, logging_dir=folder),
    "wandb": lambda name, folder: WandBTracker(name, dir=folder),
}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse, before the work, a tracker that is not known or not installed.

    Raises:
        RecipeError: if there is one.
    """
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(f"no tracker {name!r}; choices: {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise RecipeError(f"{name} is not installed: pip install {name}")


class Progress:
    """A progress bar and trackers, which start with `with`. Only the main process has them."""

    def __init__(
        self,
        recipe: Recipe,
        tokens_per_step: int,
        trackers: Sequence[str] = (),
        folder: str | os.PathLike[str] | None = None,
        show: bool = True,
    ):
        """A bar for a recipe.

        Args:
            recipe: The recipe that is run.
            tokens_per_step: Tokens per step, for the speed.
            trackers: Names of `TRACKERS`.
            folder: Where the trackers write. Default: the working folder.
            show: Whether to show the bar.
        """
        self.recipe, self.tokens_per_step = recipe, tokens_per_step
        self.names, self.folder = tuple(dict.fromkeys(trackers)), Path(folder or ".")
        self.trackers: list[GeneralTracker] = []
        self.shows = show
        self.bar: tqdm[Any]

    def __enter__(self) -> "Progress":
        what = "removing norms" if self.recipe.events else self.recipe.name
        self.bar = tqdm(total=self.recipe.steps, desc=what, unit="step", disable=not self.shows)
        if self.names:
            PartialState()  # Accelerate's trackers ask it which process this is
        for name in self.names:
            tracker = TRACKERS[name]("lnfree", self.folder)
            tracker.start()
            self.trackers.append(tracker)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.finish()

    def reset(self, step: int, steps: int) -> None:
        """The run continues from another step, or to another last step."""
        self.bar.total, self.bar.n = steps, step
        self.bar.initial = step
        self.bar.refresh()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            self.bar.write(line)

    def show(self, record: "StepRecord", n_frozen: int) -> None:
        """Show a step that is done."""
        speed = self.tokens_per_step / record.seconds
        status = {"loss": f"{record.loss:.3f}", "tok/s": f"{speed:,.0f}"}
        if self.recipe.events:
            status["frozen"] = f"{n_frozen}/{len(self.recipe.events)}"
        if record.frozen:
            status["event"] = list(record.frozen)[-1]
        if record.heldout is not None:
            status["held-out"] = f"{record.heldout:.3f}"
        self.bar.set_postfix(status, refresh=False)
        self.bar.update()
        for tracker in self.trackers:
            tracker.log(_scalars(record) | {"tokens_per_second": speed}, step=record.step)


def _scalars(record: "StepRecord") -> dict[str, float]:
    """A record as numbers by name, for trackers."""
    names = ("loss", "lr", "gradient", "heldout")
    values: dict[str, Any] = {name: getattr(record, name) for name in names}
    values |= record.losses
    values |= {f"sigma/{site}": sigma for site, sigma in record.frozen.items()}
    values |= _flat(record.probes)
    return {name: value for name, value in values.items() if value is not None}


def _flat(probes: Mapping[str, Any]) -> dict[str, Any]:
    """Probes by site, kind and layer as numbers by one name each, `resid_norm_mean/3`."""
    found: dict[str, Any] = {}
    for name, probe in probes.items():
        if isinstance(probe, list):
            probe = {str(layer): value for layer, value in enumerate(probe)}
        inner = _flat(probe) if isinstance(probe, Mapping) else {"": probe}
        found |= {f"{name}/{key}".rstrip("/"): value for key, value in inner.items()}
    return found
