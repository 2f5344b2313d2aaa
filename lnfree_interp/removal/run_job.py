"""Runs a removal job: from the names of a model and a text to a folder with the finished model."""

import fnmatch
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.bundled import bundled_checkpoint
from lnfree_interp.checkpoints.exporting import Target, best_target, export, export_adapter
from lnfree_interp.checkpoints.loading import config_of, load_checkpoint, saved_live_sites
from lnfree_interp.data.mixed import MixedSequences
from lnfree_interp.data.names import STDLIB
from lnfree_interp.data.prefetch import Prefetched
from lnfree_interp.data.sequences import TokenSequences
from lnfree_interp.data.sources import described, open_sequences, open_text, text_column
from lnfree_interp.data.streams import PackedStream
from lnfree_interp.errors import CheckpointError, DataError, RecipeError, TooFewStepsError
from lnfree_interp.files import anywhere, require_new_file, require_writable
from lnfree_interp.models.agreement import compare_logits, random_tokens
from lnfree_interp.models.forms import fold, frozen_form
from lnfree_interp.models.inserting import varied
from lnfree_interp.models.linear_attention import linear_layers
from lnfree_interp.models.site_names import NormSite, name_sites
from lnfree_interp.models.sites import first_constants, live_sites
from lnfree_interp.models.sites import sites_of as list_sites
from lnfree_interp.numerics import MeasuredError
from lnfree_interp.removal.costs_file import read_costs, write_costs
from lnfree_interp.removal.job import MEASURED, RemovalJob
from lnfree_interp.removal.named_models import with_revision
from lnfree_interp.removal.plan import plan
from lnfree_interp.removal.processes import Processes
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.recipes import BY_NAME
from lnfree_interp.removal.remove import remove_norms, require_records
from lnfree_interp.removal.run import Run
from lnfree_interp.removal.run_folder import RunFolder
from lnfree_interp.removal.runaways import thaw_runaways
from lnfree_interp.removal.schedule import Sites, last_step, moved, sites_of
from lnfree_interp.removal.sensitivity import SiteSensitivity, site_sensitivity
from lnfree_interp.removal.settings import Release, Special, Statistics
from lnfree_interp.removal.trial import try_steps

_MEASURED_SEQUENCES = 4
_MEASURED_LENGTH = 256
"""The text on which costs are measured: up to three forward passes of it for each site."""

Say = Callable[[str], None]
"""Shows a line to the user."""


def make_recipe(job: RemovalJob, model: Sites | SiteSensitivity) -> Recipe:
    """A job's recipe for a model.

    Every option of the job that the recipe has too, and that was given, replaces the recipe's.

    Args:
        job: Names the recipe and the settings to change.
        model: The model, or its norm sites, which its config gives; or what they cost.

    Raises:
        TooFewStepsError: if the recipe does not fit into the steps; the message has the smallest
            number of steps that works.
        RecipeError: if the settings do not fit together, or the model has no norm sites.
    """
    about = model if isinstance(model, SiteSensitivity) else sites_of(model)
    try:
        recipe = _recipe_in(job, about, job.steps)
    except TooFewStepsError as error:
        raise TooFewStepsError(
            f"recipe {job.recipe}: {error.why}",
            _smallest_steps(job, about, error.smallest),
        ) from error
    if job.recipe == MEASURED and job.batch is None:
        # Its batches are small: every process has a sequence of them.
        world = int(os.environ.get("WORLD_SIZE", "1"))
        recipe = replace(recipe, batch=world * math.ceil(recipe.batch / world))
    if job.rollback:
        recipe = replace(recipe, guard=replace(recipe.guard, action="rollback"))
    return recipe.vanilla() if job.vanilla else recipe


def _smallest_steps(job: RemovalJob, model: Sites | SiteSensitivity, steps: int) -> int:
    """The smallest number of steps that works; a recipe's schedule may grow with its steps."""
    try:
        _recipe_in(job, model, steps)
    except TooFewStepsError as error:
        return _smallest_steps(job, model, error.smallest)
    return steps


def _recipe_in(job: RemovalJob, model: Sites | SiteSensitivity, steps: int | None) -> Recipe:
    """A job's recipe in so many steps; None: in as many as the recipe was made for."""
    make: Callable[..., Recipe] = BY_NAME[job.recipe]
    given = {} if steps is None else {"steps": steps}
    # The published ones are made for one size of GPT-2 and a number of steps.
    recipe = make() if job.recipe.startswith("gpt2") else make(model, **given)
    recipe = replace(recipe, events=tuple(e for e in recipe.events if _goes(e.site, job)))
    events = moved(recipe.events, start=job.start, gap=job.gap, over=job.taper)
    special = recipe.special.moved(last_step(events) - last_step(recipe.events))
    return replace(
        recipe,
        **_given(job, Recipe) | given | {"release": tuple(map(Release.parse, job.release or ()))},
        events=events,
        statistics=replace(recipe.statistics, **_given(job, Statistics, "sigma_")),
        special=replace(special, **_given(job, Special, "special_")),
    )


def _given(job: RemovalJob, settings: type[Any], prefix: str = "") -> dict[str, Any]:
    """The settings that the job replaces."""
    values = {one.name: getattr(job, prefix + one.name, None) for one in fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def run_job(
    job: RemovalJob,
    out: str | os.PathLike[str] | None,
    *,
    recipe_of: Callable[[RemovalJob, Sites | SiteSensitivity], Recipe] = make_recipe,
    only_plan: bool = False,
    resume: bool = False,
    minutes: float | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> Run | None:
    """Load a model, remove its norms, fold it and write it.

    Args:
        job: What to do.
        out: The folder of the run; `model/` is written into it beside metrics and checkpoints. None
            for a plan.
        recipe_of: Makes the recipe for the model's norm sites, or from what they cost. Default:
            the job's own.
        only_plan: Measure as a run does, say what would be done, time a few steps of it on random
            tokens, and stop.
        resume: Continue the run in `out`.
        minutes: Pause after so many minutes, with a checkpoint. Default: never.
        progress: Whether to show progress bars.
        say: Is given a line before and after each stage.

    Returns:
        The finished run; None for a plan.

    Raises:
        RecipeError: if recipe, settings and model do not fit. Recipe and text are checked before
            the model's weights are loaded.
        DataError: if the text cannot be opened, or its sequences are longer than the context.
        PausedError: if it paused.
        LnfreeError: for what loading, `remove_norms`, `fold` and `export` refuse.
    """
    began = time.monotonic()
    if not (resume or only_plan or out is None):
        require_writable(out)
    if job.costs is not None and not (resume or os.path.exists(job.costs)):
        require_new_file(job.costs)
    require_records(job.checkpoint_every, job.log_every, job.track)
    source = str(bundled_checkpoint()) if job.model is None else job.model
    shown = "the bundled checkpoint" if job.model is None else source
    cfg = config_of(source, revision=job.revision)
    live = saved_live_sites(source, revision=job.revision)
    every = list_sites(cfg) if live is None else live
    sites = () if cfg.normalization_type is None else _chosen(every, job)
    recipe = recipe_of(job, sites)
    _require_made_for(sites, recipe, job)
    length = job.sequence_length
    if length is None:
        length = min(recipe.sequence_length or 1024, cfg.n_ctx)
    _require_length(length, cfg.n_ctx)
    say(f"opening {job.text}")
    documents = open_text(
        job.text,
        split=job.split,
        name=job.data_name,
        column=job.column,
        revision=job.data_revision,
    )
    say(f"loading {shown}")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device("cpu") if several else None  # else all processes load onto one GPU
    loaded = load_checkpoint(source, revision=job.revision, device=device)
    model, teacher = loaded.model, None
    if job.teacher is not None and not job.vanilla:  # a control distils from nothing
        say(f"loading {job.teacher}, to distil from")
        name, revision = with_revision(job.teacher)
        teacher = load_checkpoint(name, revision=revision, device=device).model
    if loaded.error is not None:
        say(f"    largest logit difference from transformers: {loaded.error}")
    sites_of(model)  # the config of an LN-free checkpoint may have norms
    column, _ = text_column(documents, job.column)

    def packed(length: int, prepend_bos: bool) -> PackedStream:
        return PackedStream(
            documents, model.tokenizer, length, column, seed=recipe.seed, prepend_bos=prepend_bos
        )

    processes, first_matters = Processes(model.W_E.device), False
    if job.recipe == MEASURED and not resume:
        shorter = min(length, _MEASURED_LENGTH)

        def read_or_measure() -> SiteSensitivity:
            if job.costs is not None and os.path.exists(job.costs):
                say(f"reading {job.costs}")
                return read_costs(job.costs, model).select(sites)
            say("measuring what each norm costs")
            text = MixedSequences(packed(shorter, bool(job.prepend_bos)), seed=recipe.seed)
            sample = text.take(_MEASURED_SEQUENCES)
            with _on(processes.device, model):
                found = site_sensitivity(model, sample, sites, stop_above=0.1, progress=progress)
            if job.costs is not None:
                write_costs(job.costs, model, found)
            return found

        costs = processes.on_main(read_or_measure)
        say(f"    {costs}")
        # The control is measured too: it has the same text and learning rates.
        recipe, first_matters = recipe_of(job, costs), costs.first_matters
    if job.prepend_bos is None:
        has_bos = getattr(model.tokenizer, "bos_token_id", None) is not None
        job = replace(job, prepend_bos=first_matters and has_bos)
    say(plan(recipe, length, text=described(job.text, documents)))
    if only_plan or out is None:
        say("timing a few steps on random tokens")
        with _on(processes.device, *filter(None, (model, teacher))):
            say(str(try_steps(model, recipe, length, heldout=job.heldout, teacher=teacher)))
        return None
    stream = packed(length, bool(job.prepend_bos))
    heldout = _heldout_text(job, recipe, model, length, stream)
    with Prefetched(MixedSequences(stream, seed=recipe.seed)) as text:
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
            minutes=None if minutes is None else minutes - (time.monotonic() - began) / 60,
            progress=progress,
            copy_weights=False,
            teacher=teacher,
        )
    if os.environ.get("RANK", "0") == "0":
        finished, errors = None, {}
        if run.recipe.events:
            _thaw_runaways(run.model, heldout, say, progress)
        # Linear attention fits no stock model: with its frozen sites the model is finished.
        if not live_sites(run.model) and not linear_layers(run.model):
            what, finished = _finished(run.model)
            errors[f"{what} against frozen norms"] = error = compare_logits(finished, run.model)
            say(f"    {what} against frozen norms: {error}")
        write_finished(run, finished, Path(out) / "model", source=shown, errors=errors)
        if run.recipe.trainable != "all":
            say(f"writing {out}/adapter: what training changed of {shown}")
            export_adapter(
                run.model, Path(out) / "adapter", anywhere(source), revision=job.revision
            )
    return run


@contextmanager
def _on(device: torch.device, *models: HookedTransformer) -> Iterator[None]:
    """Models on a device; several processes have loaded them into main memory."""
    before = [model.W_E.device for model in models]
    for model in models:
        model.to(device, print_details=False)
    try:
        yield
    finally:
        for model, home in zip(models, before, strict=True):
            model.to(home, print_details=False)


def _thaw_runaways(
    model: HookedTransformer, heldout: Tensor | None, say: Say, progress: bool
) -> None:
    """Make norms live again without which a token of the held-out text, or one of the random ones
    on which models are compared, runs away."""
    texts = [random_tokens(model)] + ([] if heldout is None else [heldout])
    if held := thaw_runaways(model, *texts, progress=progress):
        what = "random tokens" if heldout is None else "held-out text or random tokens"
        say(
            f"    live again: {', '.join(map(str, held))}, since {what} run away without "
            "them. More steps, or --keep with these, may do better"
        )


def _finished(model: HookedTransformer) -> tuple[str, HookedTransformer]:
    """The model without norm sites: folded, or in the frozen form if first tokens stay apart."""
    if first_constants(model):
        return "frozen form", frozen_form(model)
    return "folded", fold(model)


def _from_anywhere(job: RemovalJob) -> dict[str, Any]:
    """The job as plain data, with absolute local paths, so that it is the same in any folder."""
    about = {field.name: getattr(job, field.name) for field in fields(RemovalJob)}
    about["data"] = job.text
    for key in ("model", "data", "teacher"):
        if about[key] is not None and about[key] != STDLIB:
            about[key] = anywhere(about[key])
    return about


def resume_job(
    out: str | os.PathLike[str],
    *,
    minutes: float | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> Run | None:
    """Continue the run in a folder.

    Args:
        out: The folder of the run.
        minutes: Pause after so many minutes, with a checkpoint. Default: never.
        progress: Whether to show progress bars.
        say: Is given a line before and after each stage.

    Returns:
        The finished run.

    Raises:
        CheckpointError: if there is no run to continue.
        PausedError: if it paused.
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
        plain: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in about.items()
        }
        job = RemovalJob(**plain)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{out}/run.json does not describe a job: {error}") from error
    return run_job(
        job, out, recipe_of=lambda job, model: recipe, resume=True, minutes=minutes,
        progress=progress, say=say,
    )  # fmt: skip


def write_finished(
    run: Run,
    finished: HookedTransformer | None,
    folder: str | os.PathLike[str],
    *,
    source: str,
    errors: Mapping[str, MeasuredError],
) -> Target:
    """Write the model of a run.

    It is written for plain transformers; if no class there can hold it, without norm sites and in
    TransformerLens' layout.

    Args:
        run: A finished removal or control.
        finished: Its model, folded or in the frozen form; None if the norms are live.
        folder: A new folder.
        source: The name of the original, for the model card.
        errors: What was measured on the way, for the model card.

    Returns:
        The layout.
    """
    target = best_target(run.model if finished is None else finished)
    # With its sites, so that the export can be undone; a norm of another kind no class holds.
    undoable = target == "transformers" and not varied(run.model)
    model = run.model if finished is None or undoable else finished
    export(model, folder, target=target, recipe=run.recipe, errors=errors, source=source)
    return target


def _goes(site: NormSite, job: RemovalJob) -> bool:
    """Whether a site is to be removed."""
    kept = any(fnmatch.fnmatchcase(str(site), pattern) for pattern in job.keep or ())
    return not kept and (job.kinds is None or site.kind in job.kinds)


def _chosen(sites: Sequence[NormSite], job: RemovalJob) -> tuple[NormSite, ...]:
    """The sites to remove."""
    here = dict.fromkeys(site.kind for site in sites)
    if wrong := [kind for kind in job.kinds or () if kind not in here]:
        raise RecipeError(
            f"the model has no norm site of the kind {wrong[0]}; it has {', '.join(here)}"
        )
    for pattern in job.keep or ():
        if not fnmatch.filter(map(str, sites), pattern):
            raise RecipeError(
                f"keep: no norm site is called {pattern!r}; there are {name_sites(map(str, sites))}"
            )
    chosen = tuple(site for site in sites if _goes(site, job))
    if sites and not chosen:
        raise RecipeError("kinds and keep leave no norm site to remove: keep fewer")
    return chosen


def _require_made_for(sites: Sequence[NormSite], recipe: Recipe, job: RemovalJob) -> None:
    """Refuse a published recipe for a model of another size; a control freezes nothing."""
    frozen = {event.site for event in recipe.events}
    if frozen and frozen != set(sites):
        raise RecipeError(
            f"recipe {job.recipe} was made for another model: it freezes {len(frozen)} norm sites, "
            f"and this model has {len(sites)}. measured, distilled, published-style, taper and "
            "at-once are for any model"
        )


def _require_length(length: int, n_ctx: int) -> None:
    """Refuse sequences that the model cannot read, or that teach it nothing."""
    if length < 2:
        raise RecipeError("a sequence of one token has no next token to learn")
    if length > n_ctx:
        raise DataError(
            f"sequences of {length} tokens are too long: the model's context is {n_ctx} tokens, so "
            f"give a sequence_length of at most {n_ctx}"
        )


def _heldout_text(
    job: RemovalJob, recipe: Recipe, model: HookedTransformer, length: int, text: TokenSequences
) -> Int[Tensor, "sequence pos"] | None:
    if job.heldout < 1:
        return None
    if job.text == STDLIB and job.split == "train":
        text = open_sequences(
            STDLIB, model.tokenizer, length, split="heldout", seed=recipe.seed,
            prepend_bos=bool(job.prepend_bos),
        )  # fmt: skip
    return text.take(job.heldout)
