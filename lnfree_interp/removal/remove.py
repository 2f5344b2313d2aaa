"""`remove_norms`: from a model, a recipe and text to a finished run."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.data.blocks import ShuffledBlocks, TokenBlocks
from lnfree_interp.errors import DataError, RecipeError, UnsupportedModelError
from lnfree_interp.models.running import require_tokens
from lnfree_interp.models.sites import with_norm_sites
from lnfree_interp.removal.processes import Processes
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.run import Run
from lnfree_interp.removal.rundir import RunFolder
from lnfree_interp.removal.statistics import Hooks
from lnfree_interp.removal.tracking import Watcher, require_trackers
from lnfree_interp.removal.trainer import Trainer


def remove_norms(
    model: HookedTransformer,
    recipe: Recipe,
    data: TokenBlocks | Int[Tensor, "blocks pos"],
    *,
    heldout: Int[Tensor, "heldout_blocks heldout_pos"] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    fwd_hooks: Hooks = (),
    bwd_hooks: Hooks = (),
    checkpoint_every: int = 50,
    log_every: int = 10,
    trackers: Sequence[str] = (),
    progress: bool = True,
    copy_weights: bool = True,
) -> Run:
    """Fine-tune a copy of the model while its norms are frozen one by one.

    Args:
        model: A stock `HookedTransformer` with live norms; not changed, unless `copy_weights` is
            False.
        recipe: What to do when; `recipe.vanilla()` gives the control run.
        data: Packed text: `pack(...)`, drawn without replacement in an order that depends on
            `recipe.seed` alone, every block once an epoch; or a stream such as `open_blocks(...)`.
        heldout: Text to evaluate on every `recipe.evaluate_every` steps, and for early stopping.
        out: A new folder for metrics and checkpoints. Default: nothing is written.
        resume: Go on with the run in `out`: the same call, plus this. On a CPU it ends with the
            weights that the uninterrupted run would have had, bit for bit.
        about: Plain data that `run.json` in `out` keeps beside the recipe.
        fwd_hooks: As in `run_with_hooks`; active in every training forward, and (without gradient)
            while a sigma is measured. A hook may change its activation, which is bfloat16 inside
            a block where `bf16_is_fast`. A step makes one forward per micro-batch. What is
            `blocks.{l}.ln1.hook_*` elsewhere is `ln1.qk.hook_*` and `ln1.v.hook_*` here.
        bwd_hooks: As in `run_with_hooks`; active in every backward.
        checkpoint_every: Steps between two checkpoints in `out`.
        log_every: Steps between two looks at sigma drift and residual norms; 0 for none.
        trackers: `"tensorboard"` or `"wandb"`, written beside the metrics.
        progress: Whether to show a progress bar.
        copy_weights: False: train the model's own weights, which saves the memory of a second
            copy. The model given is spent then: its weights are the trained ones, its norms live.

    Returns:
        A `Run`, of the trained model with its sites and what happened at each step.

    Raises:
        UnsupportedModelError: if the model's norms cannot be frozen one by one.
        NormSiteError: if the recipe names a site that the model does not have, or is frozen.
        InexactError: if a hook on the model changes its logits.
        RecipeError: if recipe and text do not go together, or a resumed run was another one.
        DataError: if the model cannot read the data.
        TrainingError: if the run diverges and is not, or no longer, set back.
        OutputError: if `out` holds something, or cannot be written.
        CheckpointError: if a run that should go on has no whole checkpoint.

    Source:
        arXiv 2409.13710; arXiv 2507.02559 for the order, the moving average and the auxiliary loss;
        arXiv 2602.10408 for gates. Guard, rollback and exact resuming are ours.

    Examples:
        >>> recipe = lf.recipes.distilled(model)  # doctest: +SKIP
        >>> run = lf.remove_norms(model, recipe, data, out="run")  # doctest: +SKIP
        >>> free = lf.fold(run.model)  # doctest: +SKIP
    """
    if out is None and (resume or recipe.guard.action == "rollback"):
        raise RecipeError("resuming and rolling back need the run's folder: give out=...")
    if checkpoint_every < 1 or log_every < 0:
        raise RecipeError("checkpoint_every must be positive, log_every cannot be negative")
    require_trackers(trackers)
    _require_sound(model, recipe, data, heldout, [*fwd_hooks, *bwd_hooks])
    source = _source(data, recipe)
    folder, before, start = None, {}, source.state_dict()
    if resume and out is not None:
        folder, before = RunFolder.open(out)
        start = before.get("start", start)
    source.load_state_dict(start)
    processes = Processes(model.W_E.device)
    if recipe.batch % processes.world:
        raise RecipeError(
            f"a batch of {recipe.batch} blocks cannot be shared by {processes.world} processes"
        )
    trainer = Trainer(model, recipe, source, processes, fwd_hooks, bwd_hooks, copy_weights)
    trainer.log_every = log_every
    if heldout is not None:
        trainer.heldout = processes.equal_rows(heldout)
        if len(trainer.heldout) == 0:
            raise RecipeError(f"{len(heldout)} held-out blocks for {processes.world} processes")
    if out is not None:
        config = {"recipe": recipe.to_json(), **trainer.fingerprints, "start": start}
        if folder is not None:
            _require_same_run(out, before, config)
        else:
            config["about"] = dict(about or {})
            folder = processes.on_main(lambda: RunFolder.create(out, config))
        trainer.folder, trainer.checkpoint_every = folder, checkpoint_every
    tokens = recipe.batch * source.block
    shows = progress and processes.is_main
    with Watcher(recipe, tokens, trackers if processes.is_main else (), out, shows) as watcher:
        trainer.watcher = watcher
        try:
            return trainer.run(resume)
        finally:
            trainer.transition.forward = None  # a circle that would keep the optimiser's memory


def _require_sound(
    model: HookedTransformer,
    recipe: Recipe,
    data: TokenBlocks | Tensor,
    heldout: Tensor | None,
    hooks: Hooks,
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
                    f"{what} must be token ids, [blocks, pos], not {text.dtype} of shape "
                    f"{list(text.shape)}"
                )
            require_tokens(model, text)
        block = text.shape[1] if isinstance(text, Tensor) else getattr(text, "block", 2)
        if block < 2:
            raise RecipeError("a block of one token has no next token to learn")
    if recipe.patience is not None and heldout is None:
        raise RecipeError("stopping early (patience) needs held-out text")
    known = set(with_norm_sites(model, copy_weights=False).hook_dict)
    for name, _ in hooks:
        found = name in known if isinstance(name, str) else any(map(name, known))
        if not found:
            hint = (
                " (ln1 is split while training: ln1.qk and ln1.v)" if ".ln1." in str(name) else ""
            )
            raise RecipeError(f"no hook point {name!s:.60}{hint}")


def _source(data: TokenBlocks | Tensor, recipe: Recipe) -> TokenBlocks:
    """Endless blocks from whatever text was given."""
    if not isinstance(data, Tensor):
        return data
    if len(data) < recipe.batch:
        raise RecipeError(f"the data has {len(data)} blocks, one batch takes {recipe.batch}")
    return ShuffledBlocks(data, recipe.seed)


def _require_same_run(
    out: str | os.PathLike[str], before: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    now = json.loads(json.dumps(config))  # tuples are lists there
    for what in ("model", "data", "recipe"):
        if before.get(what) != now[what]:
            raise RecipeError(f"{out} is a run with another {what}: resume it with the same one")
