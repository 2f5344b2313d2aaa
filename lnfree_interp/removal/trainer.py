"""The fine-tuning that removes norms: fire events, train, log, with the user's hooks active.

The loop is `Trainer.run`; everything that it calls is one idea in a file of its own: the norms on
their way (`transition`), the loss (`objectives`), divergence (`guard`), files (`rundir`).
"""

import time
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformer_lens import HookedTransformer

from lnfree_interp.data.blocks import TokenBlocks, share
from lnfree_interp.errors import (
    CheckpointError,
    RecipeError,
    TrainingError,
)
from lnfree_interp.models.precision import bf16_is_fast
from lnfree_interp.models.running import require_tokens
from lnfree_interp.models.sites import with_norm_sites
from lnfree_interp.removal import state
from lnfree_interp.removal.guard import Watch
from lnfree_interp.removal.objectives import Objective
from lnfree_interp.removal.probes import ResidualProbe
from lnfree_interp.removal.processes import Processes
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.run import Run, StepRecord
from lnfree_interp.removal.rundir import Checkpoint, RunFolder
from lnfree_interp.removal.schedule import cosine_with_warmup, extremes, weight_at
from lnfree_interp.removal.statistics import Hooks, common, measure
from lnfree_interp.removal.tracking import Watcher
from lnfree_interp.removal.transition import Transition


class Trainer:
    """A run: its parts, and the loop over its steps."""

    def __init__(
        self,
        original: HookedTransformer,
        recipe: Recipe,
        data: TokenBlocks,
        processes: Processes,
        fwd_hooks: Hooks,
        bwd_hooks: Hooks,
        copy_weights: bool = True,
    ):
        self.recipe, self.data, self.processes = recipe, data, processes
        self.fwd_hooks, self.bwd_hooks = list(fwd_hooks), list(bwd_hooks)
        self.folder: RunFolder | None = None
        self.heldout: Tensor | None = None
        self.checkpoint_every = self.log_every = 0
        self.watcher: Watcher
        self.original = original
        distils = extremes(recipe.distillation)[1] > 0
        teacher = self._original_sites().requires_grad_(False) if distils else None
        self.model = self._original_sites(copy_weights)
        self.fingerprints = {
            "model": state.fingerprint(self.model),
            "data": data.fingerprint(),
        }
        text = processes.equal_rows(processes.on_main(self._first_blocks))
        if len(text) == 0:
            raise RecipeError(
                f"sigma needs a block of text for each of {processes.world} processes"
            )
        self.text = text
        self.transition = Transition(
            self.model, recipe, text, self.fwd_hooks, processes.sum, self._measuring_forward
        )
        float32 = original.cfg.dtype == torch.float32
        low = {
            "auto": float32 and bf16_is_fast(processes.device),
            "bfloat16": True,
            "float32": False,
        }
        dtype = torch.bfloat16 if low[recipe.precision] else original.cfg.dtype
        self.optimizer = state.adamw(self.model, recipe)
        self.objective = Objective(self.model, teacher, dtype, self.transition.groups)
        self.wrapped, self.stepper = processes.prepare(self.objective, self.optimizer)
        self.residual = ResidualProbe(self.model)
        self.watch = Watch(recipe.guard)
        self.next_step = 0
        self.history: list[StepRecord] = []
        self.saved: dict[int, bool] = {}  # checkpoints, and whether the step after one went well
        self.heldout_best, self.heldout_since = float("inf"), 0

    def _measuring_forward(self, tokens: Tensor) -> None:
        """Through the wrapper, which gathers what FSDP has spread."""
        self.wrapped(tokens, 0.0, 0.0, loss=False)

    def _original_sites(self, copy_weights: bool = True) -> HookedTransformer:
        """A copy of the original with norm sites, where this process computes."""
        sites = with_norm_sites(self.original, copy_weights)
        return sites.to(self.processes.device, print_details=False)

    def _first_blocks(self) -> Tensor:
        """What sigma is measured on; the training sees it again, and its order does not change."""
        start = self.data.state_dict()
        text = self.data.take(self.recipe.statistics.blocks)
        self.data.load_state_dict(start)
        require_tokens(self.original, text)
        return text

    def _next_batch(self) -> Tensor:
        batch = self.data.take(self.recipe.batch)
        require_tokens(self.original, batch)  # on a GPU, a wrong id would take the process down
        return batch

    def run(self, resume: bool) -> Run:
        """The loop."""
        began = time.monotonic()
        if resume:
            self._load(self._latest())
            assert self.folder is not None
            # The run went on from all but the last.
            self.saved = {step: step < self.next_step for step in self.folder.checkpoints}
        else:
            self._fix_anchor()
            if self.folder is not None:
                self._save()
        rollback = None
        while self.next_step < self.recipe.steps and not self._stopped_early():
            record = self._step(self.next_step, rollback)
            rollback = None
            wrong = self.watch.verdict(record.loss, record.gradient, record.probes.get("drift"))
            if wrong is not None:
                self._roll_back(record, wrong)
                rollback = wrong
                continue
            if self.next_step in self.saved:
                self.saved[self.next_step] = True
            self.next_step += 1
            record = self._evaluated(record)
            self.history.append(record)
            self._log(record)
            if self.checkpoint_every and self.next_step % self.checkpoint_every == 0:
                self._save()
        if self.folder is not None and self.next_step not in self.saved:
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
                forward=self._measuring_forward,
            )
            ordinary = replace(self.recipe.statistics, tokens="ordinary", average="mean")
            self.objective.anchor_target = common(found["ln_final"], ordinary)

    def _step(self, step: int, rollback: str | None) -> StepRecord:
        """Events, one batch in micro-batches, one step of the optimiser."""
        began, recipe = time.monotonic(), self.recipe
        frozen = self.transition.before(step)
        lr = recipe.lr * cosine_with_warmup(
            step,
            steps=recipe.decay_steps or recipe.steps,
            warmup=recipe.warmup,
            floor=recipe.final_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self.processes.on_main(self._next_batch)
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
                    (part * losses.total).backward()
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
        due = (
            self.next_step % self.recipe.evaluate_every == 0 or self.next_step == self.recipe.steps
        )
        if self.heldout is None or not due:
            return record
        heldout = self._heldout_loss()
        if record.step >= self.recipe.removed_at:
            better = heldout < self.heldout_best
            self.heldout_best = min(heldout, self.heldout_best)
            self.heldout_since = 0 if better else self.heldout_since + 1
        return replace(record, heldout=heldout)

    @torch.no_grad()
    def _heldout_loss(self) -> float:
        assert self.heldout is not None
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        with self.model.hooks([*self.transition.hooks()]):
            for tokens in self.heldout.split(self.recipe.micro_batch):
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
        checkpoint = self._last_good()
        if checkpoint is None:
            raise TrainingError(f"the run diverged {where}; no checkpoint is left to go back to")
        rollbacks = self.watch.rollbacks + 1
        self._load(checkpoint)
        # A checkpoint may hold a schedule that was widened already.
        factor = guard.widen ** (rollbacks - self.watch.rollbacks)
        recipe = self.recipe.widened(self.next_step, factor)
        if recipe is self.recipe:
            raise TrainingError(
                f"the run diverged {where}; no event is left whose gap could be wider: lower lr"
            )
        self.recipe, self.watch.rollbacks = recipe, rollbacks
        self.transition.follow(recipe)
        self.watcher.say(
            f"diverged {where}; back to step {self.next_step}, gaps from there {factor:g} times as "
            f"wide (rollback {rollbacks} of {guard.rollbacks})"
        )
        self.watcher.reset(self.next_step, recipe.steps)

    def _last_good(self) -> Checkpoint | None:
        """The newest checkpoint from which a step went well."""
        assert self.folder is not None
        good = [step for step in self.folder.checkpoints if self.saved.get(step)]
        return self.folder.load(good[-1]) if good else None

    def _log(self, record: StepRecord) -> None:
        if self.folder is not None and self.processes.is_main:
            self.folder.log(asdict(record))
        self.watcher.show(record, sum(norm.frozen for norm in self.transition.norms.values()))

    def _save(self) -> None:
        """A checkpoint of everything, written by the main process."""
        assert self.folder is not None
        plain = {
            "recipe": self.recipe.to_json(),
            "transition": self.transition.state_dict(),
            "data": self.data.state_dict(),
            "watch": [self.watch.best, self.watch.rollbacks],
            "heldout": [self.heldout_best, self.heldout_since],
            "anchor_target": self.objective.anchor_target,
            "random": self.processes.gather(state.random_state()),
        }
        model = state.tensors(self.model)
        optimizer = state.optimizer_tensors(self.model, self.optimizer)
        folder, checkpoint = self.folder, Checkpoint(self.next_step, model, optimizer, plain)
        self.processes.on_main(lambda: folder.save(checkpoint))
        self.saved[self.next_step] = False

    def _latest(self) -> Checkpoint:
        assert self.folder is not None
        self.processes.on_main(self.folder.tidy)
        return self.folder.latest()

    def _load(self, checkpoint: Checkpoint) -> None:
        """Everything as it was when the checkpoint was written."""
        folder, plain = self.folder, checkpoint.state
        assert folder is not None
        if len(plain["random"]) != self.processes.world:
            raise CheckpointError(
                f"the run had {len(plain['random'])} processes, now there are "
                f"{self.processes.world}: resume it with as many"
            )
        state.load_tensors(self.model, checkpoint.model)
        state.load_optimizer_tensors(self.model, self.optimizer, checkpoint.optimizer)
        self.transition.load_state_dict(plain["transition"])
        self.data.load_state_dict(plain["data"])
        self.recipe, self.next_step = Recipe.from_json(plain["recipe"]), checkpoint.step
        self.transition.follow(self.recipe)
        self.watch.best, self.watch.rollbacks = plain["watch"]
        self.heldout_best, self.heldout_since = plain["heldout"]
        self.objective.anchor_target = plain["anchor_target"]
        state.set_random_state(plain["random"][self.processes.rank])
        records = self.processes.on_main(lambda: folder.history(checkpoint.step))
        self.history = [StepRecord(**record) for record in records]
        self.watcher.reset(self.next_step, self.recipe.steps)
