"""A removal as a job: from the names of a model and a text to a folder with the finished model."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.bundled import bundled_checkpoint
from lnfree_interp.checkpoints.exporting import Target, best_target, export
from lnfree_interp.checkpoints.loading import load_checkpoint
from lnfree_interp.data.prefetch import Prefetched
from lnfree_interp.data.sequences import TokenSequences
from lnfree_interp.data.sources import STDLIB, open_sequences
from lnfree_interp.errors import CheckpointError, RecipeError
from lnfree_interp.files import anywhere, require_writable
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.forms import fold
from lnfree_interp.models.sites import list_norm_sites, live_sites
from lnfree_interp.numerics import MeasuredError
from lnfree_interp.removal.plan import plan
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.recipes import BY_NAME
from lnfree_interp.removal.remove import remove_norms
from lnfree_interp.removal.run import Run
from lnfree_interp.removal.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `lnfree remove` was asked for; `run.json` keeps it, so that it can go on."""

    model: str | None = None
    """Hub id or local folder; None: the bundled checkpoint."""
    revision: str | None = None
    text: str = STDLIB
    """`stdlib`, local files, or a hub data set."""
    split: str = "train"
    name: str | None = None
    """Configuration of a hub data set."""
    column: str | None = None
    text_revision: str | None = None
    sequence_length: int | None = None
    """Tokens per sequence; None: the recipe's, or the model's context up to 1024."""
    heldout: int = 64
    """Sequences to evaluate on: of stdlib's other split; else the first of the text, which the first
    epoch leaves out."""
    checkpoint_every: int = 50
    log_every: int = 10
    trackers: tuple[str, ...] = ()


def make_recipe(
    name: str,
    model: HookedTransformer,
    *,
    steps: int | None = None,
    vanilla: bool = False,
    rollback: bool = False,
    **changes: Any,
) -> Recipe:
    """A recipe by its name for a model, with some settings changed.

    Args:
        name: Of `recipes.BY_NAME`.
        model: What it is for.
        steps: Optimiser steps. Default: the recipe's.
        vanilla: The control instead.
        rollback: Go back instead of stopping when the run diverges.
        changes: Fields of `Recipe`; None leaves one as it is.

    Raises:
        RecipeError: for a name or setting that does not exist or does not fit.
    """
    if name not in BY_NAME:
        raise RecipeError(f"no recipe {name!r}; there are {', '.join(BY_NAME)}")
    make: Callable[..., Recipe] = BY_NAME[name]
    if name.startswith("gpt2"):  # for one size of GPT-2, in so many steps
        recipe = make()
        if steps is not None:
            changes["steps"] = steps
    else:
        recipe = make(model, **({} if steps is None else {"steps": steps}))
    given = {field: value for field, value in changes.items() if value is not None}
    recipe = replace(recipe, **given)
    if rollback:
        recipe = replace(recipe, guard=replace(recipe.guard, action="rollback"))
    left = set(list_norm_sites(model)) - {event.site for event in recipe.events}
    if left and not vanilla:
        raise RecipeError(
            f"recipe {name} leaves {len(left)} of the model's norm sites live, "
            f"{min(map(str, left))} among them: it is for another model"
        )
    return recipe.vanilla() if vanilla else recipe


def run_job(
    job: Job,
    out: str | os.PathLike[str] | None,
    recipe_of: Callable[[HookedTransformer], Recipe],
    *,
    only_plan: bool = False,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Run | None:
    """Load, remove, fold, write.

    Args:
        job: Model and text.
        out: The run's folder; gets `model/` beside metrics and checkpoints. None for a plan.
        recipe_of: The recipe for the model.
        only_plan: Say what would be done and stop.
        resume: Go on with the run in `out`.
        progress: Whether to show progress bars.
        say: Gets a line before and after each stage.

    Raises:
        LnfreeError: whatever loading, `remove_norms`, `fold` and `export` raise.
    """
    if not (resume or only_plan or out is None):
        require_writable(out)
    source = str(bundled_checkpoint()) if job.model is None else job.model
    shown = "the bundled checkpoint" if job.model is None else source
    say(f"loading {shown}")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device("cpu") if several else None  # else every process loads onto one GPU
    loaded = load_checkpoint(source, revision=job.revision, device=device)
    model = loaded.model
    if loaded.error is not None:
        say(f"    largest logit difference from transformers: {loaded.error}")
    recipe = recipe_of(model)
    sequence_length = job.sequence_length or min(recipe.sequence_length or 1024, model.cfg.n_ctx)
    say(plan(recipe, sequence_length))
    if only_plan or out is None:
        return None
    say(f"opening {job.text}")
    with Prefetched(_training_text(job, recipe, model, sequence_length)) as text:
        heldout = _heldout_text(job, recipe, model, sequence_length, text)
        run = remove_norms(
            model,
            recipe,
            text,
            heldout=heldout,
            out=out,
            resume=resume,
            about=_from_anywhere(job),
            checkpoint_every=job.checkpoint_every,
            log_every=job.log_every,
            trackers=job.trackers,
            progress=progress,
            copy_weights=False,
        )
    if os.environ.get("RANK", "0") == "0":
        folded, errors = None, {}
        if not live_sites(run.model):
            folded = fold(run.model)
            errors["folded against frozen norms"] = compare_logits(folded, run.model)
            say(f"    folded against frozen norms: {errors['folded against frozen norms']}")
        write_finished(run, folded, Path(out) / "model", source=shown, errors=errors)
    return run


def _from_anywhere(job: Job) -> dict[str, Any]:
    """What `run.json` keeps: local paths are absolute, so that it is read from any folder."""
    about = asdict(job)
    for key in ("model", "text"):
        if about[key] is not None and about[key] != STDLIB:
            about[key] = anywhere(about[key])
    return about


def resume_job(
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Run | None:
    """Go on with the run in a folder.

    Args:
        out: The run's folder.
        progress: Whether to show progress bars.
        say: Gets a line before and after each stage.

    Raises:
        CheckpointError: if there is no run that could go on.
        LnfreeError: as `run_job`.
    """
    folder = RunFolder(out)
    config = folder.read()
    if (folder.path / "model").exists():
        raise CheckpointError(f"{out}/model exists: this run is finished")
    recipe, about = Recipe.from_json(config.get("recipe", {})), config.get("about")
    if not about:
        raise CheckpointError(
            f"{out} was not started on the command line: call remove_norms(..., resume=True)"
        )
    try:
        job = Job(**about | {"trackers": tuple(about["trackers"])})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{out}/run.json says nothing usable about the run") from error
    return run_job(job, out, lambda model: recipe, resume=True, progress=progress, say=say)


def write_finished(
    run: Run,
    folded: HookedTransformer | None,
    folder: str | os.PathLike[str],
    *,
    source: str,
    errors: Mapping[str, MeasuredError],
) -> Target:
    """Write the model of a run for plain transformers, or where no class can hold it, in
    TransformerLens' layout, folded.

    Args:
        run: Finished, removal or control.
        folded: Its model, folded; None if the norms are live.
        folder: A new folder.
        source: What the model was made from, for the model card.
        errors: Measured on the way, for the model card.

    Returns:
        The layout.
    """
    target = best_target(run.model if folded is None else folded)
    model = run.model if folded is None or target == "transformers" else folded
    export(model, folder, target=target, recipe=run.recipe, errors=errors, source=source)
    return target


def _training_text(
    job: Job, recipe: Recipe, model: HookedTransformer, sequence_length: int
) -> TokenSequences:
    return open_sequences(
        job.text,
        model.tokenizer,
        sequence_length,
        split=job.split,
        name=job.name,
        column=job.column,
        revision=job.text_revision,
        seed=recipe.seed,
    )


def _heldout_text(
    job: Job, recipe: Recipe, model: HookedTransformer, sequence_length: int, text: TokenSequences
) -> Int[Tensor, "sequence pos"] | None:
    if job.heldout < 1:
        return None
    if job.text == STDLIB and job.split == "train":
        other = replace(job, split="heldout")
        return _training_text(other, recipe, model, sequence_length).take(job.heldout)
    return text.take(job.heldout)
