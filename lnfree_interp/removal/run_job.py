"""Runs a removal job: from the names of a model and a text to a folder with the finished model."""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
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
from lnfree_interp.removal.job import RemovalJob
from lnfree_interp.removal.plan import plan
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.recipes import BY_NAME
from lnfree_interp.removal.remove import remove_norms
from lnfree_interp.removal.run import Run
from lnfree_interp.removal.run_folder import RunFolder

Say = Callable[[str], None]
"""Shows a line to the user."""


def make_recipe(job: RemovalJob, model: HookedTransformer) -> Recipe:
    """A job's recipe for a model.

    Every option of the job that the recipe has too, and that was given, replaces the recipe's.

    Args:
        job: Names the recipe and the settings to change.
        model: The model.

    Raises:
        RecipeError: if there is no such recipe, or it fits neither the settings nor the model.
    """
    if job.recipe not in BY_NAME:
        raise RecipeError(f"no recipe {job.recipe!r}; choices: {', '.join(BY_NAME)}")
    make: Callable[..., Recipe] = BY_NAME[job.recipe]
    options = {field.name for field in fields(RemovalJob)}
    changes = {
        field.name: getattr(job, field.name)
        for field in fields(Recipe)
        if field.name in options and getattr(job, field.name) is not None
    }
    if job.recipe.startswith("gpt2"):  # made for one size of GPT-2 and a number of steps
        recipe = make()
    else:
        recipe = make(model, **{key: changes.pop(key) for key in ("steps",) if key in changes})
    recipe = replace(recipe, **changes)
    if job.rollback:
        recipe = replace(recipe, guard=replace(recipe.guard, action="rollback"))
    left = set(list_norm_sites(model)) - {event.site for event in recipe.events}
    if left and not job.vanilla:
        raise RecipeError(
            f"recipe {job.recipe} leaves {len(left)} of the model's norm sites live, such as "
            f"{min(map(str, left))}: it was made for another model"
        )
    return recipe.vanilla() if job.vanilla else recipe


def run_job(
    job: RemovalJob,
    out: str | os.PathLike[str] | None,
    *,
    recipe_of: Callable[[RemovalJob, HookedTransformer], Recipe] = make_recipe,
    only_plan: bool = False,
    resume: bool = False,
    progress: bool = True,
    say: Say = lambda line: None,
) -> Run | None:
    """Load a model, remove its norms, fold it and write it.

    Args:
        job: What to do.
        out: The folder of the run; `model/` is written into it beside metrics and checkpoints. None
            for a plan.
        recipe_of: Makes the recipe for the model. Default: the job's own.
        only_plan: Say what would be done, and stop.
        resume: Continue the run in `out`.
        progress: Whether to show progress bars.
        say: Is given a line before and after each stage.

    Returns:
        The finished run; None for a plan.

    Raises:
        LnfreeError: for what loading, `remove_norms`, `fold` and `export` refuse.
    """
    if not (resume or only_plan or out is None):
        require_writable(out)
    source = str(bundled_checkpoint()) if job.model is None else job.model
    shown = "the bundled checkpoint" if job.model is None else source
    say(f"loading {shown}")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device("cpu") if several else None  # else all processes load onto one GPU
    loaded = load_checkpoint(source, revision=job.revision, device=device)
    model = loaded.model
    if loaded.error is not None:
        say(f"    largest logit difference from transformers: {loaded.error}")
    recipe = recipe_of(job, model)
    length = job.sequence_length
    if length is None:
        length = min(recipe.sequence_length or 1024, model.cfg.n_ctx)
    say(plan(recipe, length))
    if only_plan or out is None:
        return None
    say(f"opening {job.data}")
    with Prefetched(_training_text(job, recipe, model, length)) as text:
        heldout = _heldout_text(job, recipe, model, length, text)
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
            trackers=job.track,
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


def _from_anywhere(job: RemovalJob) -> dict[str, Any]:
    """The job as plain data, with absolute local paths, so that it is the same in any folder."""
    about = {field.name: getattr(job, field.name) for field in fields(RemovalJob)}
    for key in ("model", "data"):
        if about[key] is not None and about[key] != STDLIB:
            about[key] = anywhere(about[key])
    return about


def resume_job(
    out: str | os.PathLike[str], *, progress: bool = True, say: Say = lambda line: None
) -> Run | None:
    """Continue the run in a folder.

    Args:
        out: The folder of the run.
        progress: Whether to show progress bars.
        say: Is given a line before and after each stage.

    Returns:
        The finished run.

    Raises:
        CheckpointError: if there is no run to continue.
        LnfreeError: for what `run_job` refuses.
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
        job = RemovalJob(**about | {"track": tuple(about["track"])})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{out}/run.json does not describe a job: {error}") from error
    return run_job(
        job, out, recipe_of=lambda job, model: recipe, resume=True, progress=progress, say=say
    )


def write_finished(
    run: Run,
    folded: HookedTransformer | None,
    folder: str | os.PathLike[str],
    *,
    source: str,
    errors: Mapping[str, MeasuredError],
) -> Target:
    """Write the model of a run.

    It is written for plain transformers; if no class there can hold it, folded and in
    TransformerLens' layout.

    Args:
        run: A finished removal or control.
        folded: Its model, folded; None if the norms are live.
        folder: A new folder.
        source: The name of the original, for the model card.
        errors: What was measured on the way, for the model card.

    Returns:
        The layout.
    """
    target = best_target(run.model if folded is None else folded)
    model = run.model if folded is None or target == "transformers" else folded
    export(model, folder, target=target, recipe=run.recipe, errors=errors, source=source)
    return target


def _training_text(
    job: RemovalJob, recipe: Recipe, model: HookedTransformer, length: int
) -> TokenSequences:
    return open_sequences(
        job.data,
        model.tokenizer,
        length,
        split=job.split,
        name=job.data_name,
        column=job.column,
        revision=job.data_revision,
        seed=recipe.seed,
    )


def _heldout_text(
    job: RemovalJob, recipe: Recipe, model: HookedTransformer, length: int, text: TokenSequences
) -> Int[Tensor, "sequence pos"] | None:
    if job.heldout < 1:
        return None
    if job.data == STDLIB and job.split == "train":
        other = replace(job, split="heldout")
        return _training_text(other, recipe, model, length).take(job.heldout)
    return text.take(job.heldout)
