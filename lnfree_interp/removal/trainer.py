"""The fine-tuning that removes norms: fire events, train, log, with the user's hooks active.

The loop is `_Trainer.run`; everything that it calls is one idea in a file of its own: the norms on
their way (`transition`), the loss (`objectives`), divergence (`guard`), files (`rundir`).
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformer_lens import HookedTransformer

from lnfree_interp.data.blocks import ShuffledBlocks, TokenBlocks, share
from lnfree_interp.errors import RecipeError, TrainingError
from lnfree_interp.models.agreement import require_tokens
from lnfree_interp.models.sites import with_norm_sites
from lnfree_interp.removal import state
from lnfree_interp.removal.guard import Watch
from lnfree_interp.removal.objectives import Objective, bf16_is_fast
from lnfree_interp.removal.probes import ResidualProbe
from lnfree_interp.removal.processes import Processes
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.run import Run, StepRecord
from lnfree_interp.removal.rundir import Checkpoint, RunFolder
from lnfree_interp.removal.schedule import cosine_with_warmup, weight_at, widened
from lnfree_interp.removal.statistics import Hooks, common, measure
from lnfree_interp.removal.tracking import Watcher, require_trackers
from lnfree_interp.removal.transition import Transition


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
) -> Run:
    """Fine-tune a copy of the model while its norms are frozen one by one.

    Args:
        model: A stock `HookedTransformer` with live norms; it is not changed.
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

    Returns:
        The trained model with its sites, and what happened at each step.

    Raises:
        UnsupportedModelError: if the model's norms cannot be frozen one by one.
        NormSiteError: if the recipe names a site that the model does not have.
        RecipeError: if recipe and text do not go together, or a resumed run was another one.
        DataError: if the model cannot read the data.
        TrainingError: if the run diverges and is not, or no longer, set back.
        OutputError: if `out` holds something, or cannot be written.
        CheckpointError: if a run that should go on has no whole checkpoint.

    Example:
        >>> run = lf.remove_norms(model, lf.recipes.demo(model), data, out="run")  # doctest: +SKIP
        >>> free = lf.fold(run.model)  # doctest: +SKIP
    """
    if out is None and (resume or recipe.guard.action == "rollback"):
        raise RecipeError("resuming and rolling back need the run's folder: give out=...")
    if checkpoint_every < 1 or log_every < 0:
        raise RecipeError("checkpoint_every must be positive, log_every cannot be negative")
    require_trackers(trackers)
    source = _source(data, recipe)
    if source.block < 2:
        raise RecipeError("a block of one token has no next token to learn")
    if heldout is not None:
        require_tokens(model, heldout)
    processes = Processes(model.W_E.device)
    if recipe.batch % processes.world:
        raise RecipeError(
            f"a batch of {recipe.batch} blocks cannot be shared by {processes.world} processes"
        )
    trainer = _Trainer(model, recipe, source, processes, fwd_hooks, bwd_hooks)
    trainer.heldout, trainer.log_every = heldout, log_every
    if out is not None:
        config = {"recipe": recipe.to_json(), **trainer.fingerprints, "about": dict(about or {})}
        trainer.folder = processes.on_main(lambda: _run_folder(out, config, resume))
        trainer.checkpoint_every = checkpoint_every
    tokens = recipe.batch * source.block
    shows = progress and processes.is_main
    with Watcher(recipe, tokens, trackers, out, shows) as trainer.watcher:
        return trainer.run(resume)


def _source(data: TokenBlocks | Tensor, recipe: Recipe) -> TokenBlocks:
    """Endless blocks from whatever text was given."""
    if not isinstance(data, Tensor):
        return data
    if len(data) < recipe.batch:
        raise RecipeError(f"the data has {len(data)} blocks, one batch takes {recipe.batch}")
    return ShuffledBlocks(data, recipe.seed)


def _run_folder(out: str | os.PathLike[str], config: Mapping[str, Any], resume: bool) -> RunFolder:
    """The run's folder: a new one, or the one to go on with if it is of the same run."""
    if not resume:
        return RunFolder.create(out, config)
    folder, before = RunFolder.open(out)
    now = json.loads(json.dumps(config))  # tuples are lists there
    for what in ("model", "data", "recipe"):
        if before.get(what) != now[what]:
            raise RecipeError(f"{out} is a run with another {what}: resume it with the same one")
    return folder


class _Trainer:
    """A run: its parts, and the loop over its steps."""

    def __init__(
        self,
        original: HookedTransformer,
        recipe: Recipe,
        data: TokenBlocks,
        processes: Processes,
        fwd_hooks: Hooks,
        bwd_hooks: Hooks,
    ):
        self.recipe, self.data, self.processes = recipe, data, processes
        self.fwd_hooks, self.bwd_hooks = list(fwd_hooks), list(bwd_hooks)
        self.folder: RunFolder | None = None
        self.heldout: Tensor | None = None
        self.checkpoint_every = self.log_every = 0
        self.watcher: Watcher
        distils = weight_at(recipe.distillation, 0) or weight_at(recipe.distillation, recipe.steps)
        self.original = original
        self.model = self._original_sites()
        teacher = self._original_sites().requires_grad_(False) if distils else None
        self.fingerprints = {
            "model": state.fingerprint(self.model),
            "data": data.fingerprint(),
        }
        text = processes.on_main(self._first_blocks)
        require_tokens(original, text)
        self.text = text[processes.rank :: processes.world].to(processes.device)
        self.transition = Transition(
            self.model, recipe, self.text, self.fwd_hooks, processes.sum
        )  # fmt: skip
        low = {"auto": bf16_is_fast(processes.device), "bfloat16": True, "float32": False}
        dtype = torch.bfloat16 if low[recipe.precision] else original.cfg.dtype
        self.objective = Objective(self.model, teacher, dtype, self.transition.groups)
        self.optimizer = state.adamw(self.model, recipe)
        self.wrapped, self.stepper = processes.prepare(self.objective, self.optimizer)
        self.residual = ResidualProbe(self.model)
        self.watch = Watch(recipe.guard)
        self.steps = recipe.steps
        self.next_step = 0
        self.history: list[StepRecord] = []
        self.heldout_best, self.heldout_since = float("inf"), 0

    def _original_sites(self) -> HookedTransformer:
        """A copy of the original with norm sites, where this process computes."""
        sites = with_norm_sites(self.original)
        return sites.to(self.processes.device, print_details=False)

    def _first_blocks(self) -> Tensor:
        """What sigma is measured on; the training sees it again, and its order does not change."""
        start = self.data.state_dict()
        text = self.data.take(self.recipe.statistics.blocks)
        self.data.load_state_dict(start)
        return text

    def run(self, resume: bool) -> Run:
        """The loop."""
        began = time.monotonic()
        if resume:
            self._load(self._latest())
        else:
            self._fix_anchor()
            if self.folder is not None:
                self._save()
        rollback = None
        while self.next_step < self.steps and not self._stopped_early():
            record = self._step(self.next_step, rollback)
            rollback = None
            wrong = self.watch.verdict(record.loss, record.gradient, record.probes.get("drift"))
            if wrong is not None:
                self._roll_back(record, wrong)
                rollback = wrong
                continue
            self.next_step += 1
            record = self._evaluated(record)
            self.history.append(record)
            self._log(record)
            if self.checkpoint_every and self.next_step % self.checkpoint_every == 0:
                self._save()
        if self.folder is not None and self.next_step % self.checkpoint_every:
            self._save()
        model = self._finished_model()
        return Run(model, self.recipe, tuple(self.history), time.monotonic() - began)

    def _finished_model(self) -> HookedTransformer:
        if not any(isinstance(p, DTensor) for p in self.model.parameters()):
            return self.model.eval()
        finished = self._original_sites()
        state.load_tensors(finished, state.tensors(self.model))
        return finished.eval()

    def _fix_anchor(self) -> None:
        """The anchor's fixed target, if the recipe has one: the scale before the first step."""
        if self.recipe.anchor_target == "frozen" and self.recipe.scale_anchor:
            found = measure(
                self.model,
                ["ln_final"],
                self.text,
                self.fwd_hooks,
                groups=self.transition.groups,
                reduce=self.processes.sum,
            )
            ordinary = replace(self.recipe.statistics, tokens="ordinary", average="mean")
            self.objective.anchor_target = common(found["ln_final"], ordinary)

    def _step(self, step: int, rollback: str | None) -> StepRecord:
        """Events, one batch in micro-batches, one step of the optimiser."""
        began, recipe = time.monotonic(), self.recipe
        frozen = self.transition.before(step)
        lr = recipe.lr * cosine_with_warmup(
            step,
            steps=(recipe.decay_steps or recipe.steps) + self.steps - recipe.steps,
            warmup=recipe.warmup,
            floor=recipe.final_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self.processes.on_main(lambda: self.data.take(recipe.batch))
        batch = share(batch, self.processes.rank, self.processes.world)
        probing = self.log_every > 0 and step % self.log_every == 0
        hooks = [*self.fwd_hooks, *self.transition.hooks(metering=probing)]
        if probing:
            hooks += self.residual.hooks
        weights = weight_at(recipe.distillation, step), weight_at(recipe.scale_anchor, step)
        sums = torch.zeros(3, dtype=torch.float64, device=self.processes.device)
        self.objective.train()
        with self.model.hooks(hooks, self.bwd_hooks), torch.enable_grad():
            micro_batches = batch.to(self.processes.device).split(recipe.micro_batch)
            for index, tokens in enumerate(micro_batches):
                part = len(tokens) / len(batch)
                with self.processes.synchronised(index == len(micro_batches) - 1):
                    losses = self.wrapped(tokens, *weights)
                    self.processes.backward(part * losses.total)
                parts = (losses.cross_entropy, losses.distillation, losses.anchor)
                sums += part * torch.stack(parts).double()
        gradient = self.processes.clip(list(self.objective.parameters()), recipe.clip)
        loss, distilled, anchor = (self.processes.sum(sums) / self.processes.world).tolist()
        self.stepper.step()
        self.stepper.zero_grad()
        measured = self.transition.after()
        probes = {}
        if probing:
            probes = {"drift": self.transition.drift(measured), **self.residual.read()}
        return StepRecord(
            step, loss, anchor, lr, frozen, distilled, gradient,
            time.monotonic() - began, probes, rollback=rollback,
        )  # fmt: skip

    def _evaluated(self, record: StepRecord) -> StepRecord:
        """With the held-out loss, if it is time for it."""
        due = self.next_step % self.recipe.evaluate_every == 0 or self.next_step == self.steps
        if self.heldout is None or not due:
            return record
        heldout = self._heldout_loss()
        if record.step >= self.recipe.removed_at + self.steps - self.recipe.steps:
            better = heldout < self.heldout_best
            self.heldout_best = min(heldout, self.heldout_best)
            self.heldout_since = 0 if better else self.heldout_since + 1
        return replace(record, heldout=heldout)

    @torch.no_grad()
    def _heldout_loss(self) -> float:
        assert self.heldout is not None
        ours = self.heldout[self.processes.rank :: self.processes.world]
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        with self.model.hooks(self.transition.hooks()):
            for tokens in ours.to(self.processes.device).split(self.recipe.micro_batch):
                sums[0] += self.wrapped(tokens, 0.0, 0.0).cross_entropy.double() * len(tokens)
                sums[1] += len(tokens)
        self.transition.meter.sums = {}
        total, count = self.processes.sum(sums).tolist()
        return total / count

    def _stopped_early(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and self.heldout_since >= patience

    def _roll_back(self, record: StepRecord, wrong: str) -> None:
        """Back to the last checkpoint with wider gaps, or the end of the run."""
        guard, where = self.recipe.guard, f"at step {record.step}: {wrong}"
        if guard.action == "stop" or self.folder is None:
            raise TrainingError(f"the run diverged {where}; lower lr, or widen the gaps")
        if self.watch.rollbacks >= guard.rollbacks:
            raise TrainingError(
                f"the run diverged {where}; {guard.rollbacks} rollbacks did not help"
            )
        rollbacks = self.watch.rollbacks + 1
        self._load(self._latest())
        self.watch.rollbacks = rollbacks
        before = max((event.end for event in self.transition.events), default=0)
        self.transition.events = widened(
            self.transition.events, self.next_step, guard.widen**rollbacks
        )
        after = max((event.end for event in self.transition.events), default=0)
        self.steps += after - before  # as much time to recover as planned
        self.watcher.say(
            f"diverged {where}; back to step {self.next_step} with "
            f"{guard.widen**rollbacks:g} times the gaps (rollback {rollbacks} of {guard.rollbacks})"
        )
        self.watcher.reset(self.next_step, self.steps)

    def _log(self, record: StepRecord) -> None:
        if self.folder is not None and self.processes.is_main:
            self.folder.log(asdict(record))
        self.watcher.show(record, sum(norm.frozen for norm in self.transition.norms.values()))

    def _save(self) -> None:
        """A checkpoint of everything, written by the main process."""
        assert self.folder is not None
        plain = {
            "transition": self.transition.state_dict(),
            "data": self.data.state_dict(),
            "steps": self.steps,
            "watch": [self.watch.best, self.watch.rollbacks],
            "heldout": [self.heldout_best, self.heldout_since],
            "anchor_target": self.objective.anchor_target,
            "random": self.processes.gather(state.random_state()),
        }
        model = state.tensors(self.model)
        optimizer = state.optimizer_tensors(self.model, self.optimizer)
        folder, checkpoint = self.folder, Checkpoint(self.next_step, model, optimizer, plain)
        self.processes.on_main(lambda: folder.save(checkpoint))

    def _latest(self) -> Checkpoint:
        assert self.folder is not None
        self.processes.on_main(self.folder.tidy)
        return self.folder.latest()

    def _load(self, checkpoint: Checkpoint) -> None:
        """Everything as it was when the checkpoint was written."""
        folder, plain = self.folder, checkpoint.state
        assert folder is not None
        state.load_tensors(self.model, checkpoint.model)
        state.load_optimizer_tensors(self.model, self.optimizer, checkpoint.optimizer)
        self.transition.load_state_dict(plain["transition"])
        self.data.load_state_dict(plain["data"])
        self.steps, self.next_step = plain["steps"], checkpoint.step
        self.watch.best, self.watch.rollbacks = plain["watch"]
        self.heldout_best, self.heldout_since = plain["heldout"]
        self.objective.anchor_target = plain["anchor_target"]
        state.set_random_state(plain["random"][self.processes.rank])
        records = self.processes.on_main(lambda: folder.history(checkpoint.step))
        self.history = [StepRecord(**record) for record in records]
        self.watcher.reset(self.next_step, self.steps)
