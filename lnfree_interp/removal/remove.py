"""`remove_norms`: from a model, a recipe and text to a finished run."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.data.sequences import ShuffledSequences, TokenSequences
from lnfree_interp.errors import DataError, RecipeError, UnsupportedModelError
from lnfree_interp.models.running import require_hooked, require_tokens
from lnfree_interp.models.sites import list_norm_sites
from lnfree_interp.removal.processes import Processes
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.run import Run
from lnfree_interp.removal.run_folder import RunFolder
from lnfree_interp.removal.schedule import extremes
from lnfree_interp.removal.statistics import Hooks
from lnfree_interp.removal.tracking import Progress, require_trackers
from lnfree_interp.removal.trainer import Trainer


def remove_norms(
    model: HookedTransformer,
    recipe: Recipe,
    data: TokenSequences | Int[Tensor, "sequence pos"],
    *,
    heldout: Int[Tensor, "heldout_sequence heldout_pos"] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    fwd_hooks: Hooks = (),
    bwd_hooks: Hooks = (),
    checkpoint_every: int = 50,
    log_every: int = 10,
    trackers: Sequence[str] = (),
    minutes: float | None = None,
    progress: bool = True,
    copy_weights: bool = True,
    teacher: HookedTransformer | None = None,
) -> Run:
    """Fine-tune a copy of the model while its norms are frozen one by one.

    Args:
        model: A `HookedTransformer`, stock or with norm sites, some of them live. It does not
            change unless `copy_weights` is False.
        recipe: What to do when; `recipe.vanilla()` gives the control run.
        data: Packed text. A tensor, such as `pack(...)`, is drawn in an order that depends on
            `recipe.seed` alone, every sequence once per epoch; `open_sequences(...)` reads a text
            as it is needed.
        heldout: Text to evaluate on every `recipe.evaluate_every` steps, and for early stopping.
        out: A new folder for metrics and checkpoints. Default: nothing is written.
        resume: Continue the run in `out`: make the same call again with `resume=True`. On a CPU it
            ends with the same weights, bit for bit, as a run that was not interrupted.
        about: Plain data that `run.json` in `out` keeps beside the recipe.
        fwd_hooks: As in `run_with_hooks`; active in every training forward pass, and (without
            gradient) while a sigma is measured. A hook may change its activation, which is bfloat16
            inside a transformer block if products are. A step makes one forward pass per
            micro-batch. The hooks of `blocks.{l}.ln1` are those of `ln1.qk` and `ln1.v` here.
        bwd_hooks: As in `run_with_hooks`; active in every backward pass.
        checkpoint_every: Steps between two checkpoints in `out`.
        log_every: Steps between two measurements of sigma drift and residual norms; 0: none.
        trackers: `"tensorboard"` or `"wandb"`, which write beside the metrics.
        minutes: Pause after so many minutes of training, with a checkpoint in `out`. One step at
            least is made, so that a run goes on however short its calls are. Default: never.
        progress: Whether to show a progress bar.
        copy_weights: False: train the model's own weights, which saves the memory of a copy. The
            model given then has the trained weights, and its norms are live: do not use it.
        teacher: The model that a recipe with a distillation distils from, with live or frozen
            norms, such as the original of a model some of whose norms are gone, or the one that a
            variant was made of. It does not change. Default: the model before the first step.

    Returns:
        A `Run`: the trained model with norm sites, and what happened at each step.

    Raises:
        UnsupportedModelError: if the model's norms cannot be frozen one by one.
        NormSiteError: if the recipe names a site that the model does not have, or is frozen.
        InexactError: if a hook on the model changes its logits.
        RecipeError: if recipe and text do not fit, or the run to resume is another one.
        DataError: if the model cannot read the data.
        PausedError: if it paused: make the same call with `resume=True`.
        TrainingError: if the run diverges and cannot go back to a checkpoint.
        OutputError: if there is something in `out`, or it cannot be written.
        CheckpointError: if there is no intact checkpoint to resume from.

    Source:
        arXiv 2409.13710; arXiv 2507.02559 for the order, the moving average and the auxiliary loss;
        arXiv 2602.10408 for gates. Guard, rollback and exact resumption are ours.

    Examples:
        >>> recipe = lf.recipes.distilled(model)  # doctest: +SKIP
        >>> run = lf.remove_norms(model, recipe, data, out="run")  # doctest: +SKIP
        >>> free = lf.fold(run.model)  # doctest: +SKIP
    """
    require_hooked(model)
    if out is None and (resume or recipe.guard.action == "rollback"):
        raise RecipeError("resuming and rolling back need the run's folder: give out=...")
    if out is None and minutes is not None:
        raise RecipeError("pausing needs the run's folder, to continue from: give out=...")
    require_records(checkpoint_every, log_every, trackers)
    _require_sound(model, recipe, data, heldout)
    if teacher is not None:
        length = data.shape[1] if isinstance(data, Tensor) else data.sequence_length
        _require_teacher(model, recipe, teacher, length)
    source = _source(data, recipe)
    processes = Processes(model.W_E.device)
    if recipe.batch % processes.world:
        raise RecipeError(
            f"a batch of {recipe.batch} sequences cannot be shared by {processes.world} processes: "
            f"make it a multiple of {processes.world}"
        )
    folder, before, start = None, {}, source.state_dict()
    if out is not None:
        folder = RunFolder(out)
        if resume:
            before = folder.read()
            start = before.get("start", start)
    source.load_state_dict(start)
    tokens, shows = recipe.batch * source.sequence_length, progress and processes.is_main
    trainer = Trainer(
        model,
        recipe,
        source,
        processes=processes,
        progress=Progress(recipe, tokens, trackers if processes.is_main else (), out, shows),
        heldout=heldout,
        folder=folder,
        fwd_hooks=fwd_hooks,
        bwd_hooks=bwd_hooks,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        minutes=minutes,
        copy_weights=copy_weights,
        teacher=teacher,
    )
    if folder is not None:
        run = {"recipe": recipe.to_json(), **trainer.fingerprints, "start": start}
        if resume:
            _require_same_run(folder, before, run)
        else:
            processes.on_main(lambda: folder.create(run | {"about": dict(about or {})}))
    with trainer.progress:
        return trainer.run(resume)


def require_records(checkpoint_every: int, log_every: int, trackers: Sequence[str]) -> None:
    """Refuse what cannot be recorded as `remove_norms` is asked to.

    Raises:
        RecipeError: if a number of steps is not allowed, or a tracker is not installed.
    """
    if checkpoint_every < 1 or log_every < 0:
        raise RecipeError(
            f"checkpoint_every is {checkpoint_every} and log_every {log_every}: the first must be "
            "1 or more, the second 0 or more"
        )
    require_trackers(trackers)


def _require_sound(
    model: HookedTransformer, recipe: Recipe, data: TokenSequences | Tensor, heldout: object
) -> None:
    """Refuse, before the work, what would only fail in the middle of it."""
    if model.cfg.dtype not in (torch.float32, torch.float64):
        raise UnsupportedModelError(
            f"training needs float32 weights, these are {model.cfg.dtype}: load the model with "
            "dtype=torch.float32; products are bfloat16 where that is fast"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UnsupportedModelError("no parameter of the model requires a gradient")
    for what, text in (("data", data), ("heldout", heldout)):
        if isinstance(text, Tensor):
            if text.ndim != 2 or text.is_floating_point():
                raise DataError(
                    f"{what} must be token ids, [sequence, pos], not {text.dtype} of shape "
                    f"{list(text.shape)}"
                )
            require_tokens(model, text)
        elif text is not None and (what == "heldout" or not isinstance(text, TokenSequences)):
            source = "pack" if what == "heldout" else "pack or open_sequences"
            raise DataError(f"{what} is a {type(text).__name__}: give packed text, from {source}")
        length = text.shape[1] if isinstance(text, Tensor) else getattr(text, "sequence_length", 2)
        if length < 2:
            raise RecipeError("a sequence of one token has no next token to learn")
    if recipe.patience is not None and heldout is None:
        raise RecipeError("stopping early (patience) needs held-out text: give heldout=...")


def _require_teacher(
    model: HookedTransformer, recipe: Recipe, teacher: HookedTransformer, length: int
) -> None:
    """Refuse a teacher that is not asked, or whose predictions cannot be compared."""
    require_hooked(teacher)
    if extremes(recipe.distillation)[1] == 0:
        raise RecipeError(
            f"a teacher was given, and the recipe {recipe.name} does not distil: set distillation "
            "above 0"
        )
    if not list_norm_sites(teacher):
        raise RecipeError(
            "the teacher has no norms any more: give it with norm sites, live or frozen, such as "
            "lf.load(folder, form='sites')"
        )
    sizes = [(m.cfg.d_vocab, m.cfg.d_vocab_out) for m in (teacher, model)]
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"the teacher has {sizes[0][1]} tokens and the model {sizes[1][1]}: distil from a "
            "model with the same tokenizer"
        )
    if length > teacher.cfg.n_ctx:
        raise RecipeError(
            f"sequences have {length} tokens, and the teacher's context {teacher.cfg.n_ctx}: give "
            "shorter sequences"
        )
    shapes = [(m.cfg.n_layers, m.cfg.d_model) for m in (teacher, model)]
    if recipe.losses and shapes[0] != shapes[1]:
        raise RecipeError(
            f"the recipe compares residual streams ({', '.join(recipe.losses)}), and the teacher "
            f"has {shapes[0][0]} layers of width {shapes[0][1]}, the model {shapes[1][0]} of "
            f"{shapes[1][1]}: set losses={{}}"
        )


def _source(data: TokenSequences | Tensor, recipe: Recipe) -> TokenSequences:
    """The text as an endless source."""
    if not isinstance(data, Tensor):
        return data
    if len(data) < recipe.batch:
        raise RecipeError(
            f"the data has {len(data)} sequences, one batch takes {recipe.batch}: give more text "
            "or a smaller batch"
        )
    return ShuffledSequences(data, recipe.seed)


def _require_same_run(folder: RunFolder, before: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    def known(what: str, value: Any) -> Any:
        # An older run.json lacks the settings that came later: they have their defaults.
        return Recipe.from_json(value) if what == "recipe" and value else value

    now = json.loads(json.dumps(run))  # tuples become lists
    for what in ("model", "data", "recipe", "teacher"):
        if known(what, before.get(what)) != known(what, now.get(what)):
            raise RecipeError(
                f"{folder.path} is a run with another {what}: resume it with the same one"
            )
