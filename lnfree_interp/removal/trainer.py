"""The fine-tuning that removes norms: fire events, train, log, with the user's hooks active.

The loop is `Trainer.run`. What it calls is in files of its own: the state of the norms
(`transition`), the loss (`losses`), divergence (`divergence`), the run's files (`run_folder`).
"""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformer_lens import HookedTransformer

from lnfree_interp.data.sequences import TokenSequences, share
from lnfree_interp.data.stretches import with_random_tokens, with_repeats
from lnfree_interp.errors import CheckpointError, PausedError, RecipeError, TrainingError
from lnfree_interp.models.precision import integer_bits, products_dtype
from lnfree_interp.models.running import require_tokens
from lnfree_interp.models.sites import split_norms, untie, with_norm_sites
from lnfree_interp.removal import training_state
from lnfree_interp.removal.divergence import DivergenceWatch, find_runaway
from lnfree_interp.removal.losses import Objective, require_terms
from lnfree_interp.removal.optimizer import adamw
from lnfree_interp.removal.probes import ResidualProbe, block_weights, gradient_sizes
from lnfree_interp.removal.processes import Processes, whole
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.run import Run, StepRecord
from lnfree_interp.removal.run_folder import Checkpoint, RunFolder
from lnfree_interp.removal.schedule import cosine_with_warmup, extremes, last_step
from lnfree_interp.removal.settings import RECENT
from lnfree_interp.removal.statistics import Hooks, common, measure
from lnfree_interp.removal.tracking import Progress
from lnfree_interp.removal.transition import SigmaError, Transition
from lnfree_interp.removal.weight_average import WeightAverage

CROSS_ENTROPY = {"cross_entropy": 1.0}
"""The weights of the loss in an evaluation."""


class Trainer:
    """A run: its parts, and the loop over its steps."""

    def __init__(
        self,
        original: HookedTransformer,
        recipe: Recipe,
        data: TokenSequences,
        *,
        processes: Processes,
        progress: Progress,
        heldout: Int[Tensor, "sequence pos"] | None = None,
        folder: RunFolder | None = None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        checkpoint_every: int = 50,
        log_every: int = 10,
        minutes: float | None = None,
        copy_weights: bool = True,
        teacher: HookedTransformer | None = None,
    ):
        """A run before its first step.

        Args:
            original: A stock model with live norms, or one with norm sites.
            recipe: What to do when.
            data: The training text.
            processes: The processes that share the work.
            progress: Shows how the run is going.
            heldout: Text to evaluate on.
            folder: Where metrics and checkpoints go. Default: nothing is written.
            fwd_hooks: The user's forward hooks.
            bwd_hooks: The user's backward hooks.
            checkpoint_every: Steps between two checkpoints.
            log_every: Steps between two measurements of the probes; 0: none.
            minutes: Pause after so many. Default: never.
            copy_weights: False: train the original's own weights, and run the teacher's own.
            teacher: The model to distil from. Default: the original.

        Raises:
            LnfreeError: for what `remove_norms` refuses.
        """
        self.original, self.recipe, self.data = original, recipe, data
        self.processes, self.progress, self.folder = processes, progress, folder
        self.fwd_hooks, self.bwd_hooks = list(fwd_hooks), list(bwd_hooks)
        self.checkpoint_every, self.log_every = checkpoint_every, log_every
        self.minutes = math.inf if minutes is None else minutes
        require_terms(recipe.losses)
        model = with_norm_sites(original, copy_weights)
        _require_hook_points(model, [*fwd_hooks, *bwd_hooks])
        self.model = model.to(processes.device, print_details=False)
        self.fingerprints = {
            "model": training_state.fingerprint(self.model),
            "data": data.fingerprint(),
        }
        own = None
        if extremes(recipe.distillation)[1] > 0:
            if teacher is None:
                own = copy.deepcopy(self.model)
            else:
                own = with_norm_sites(teacher, copy_weights)
            own = own.requires_grad_(False).to(processes.device, print_details=False)
        if own is not None and teacher is not None:
            self.fingerprints["teacher"] = training_state.fingerprint(own)
        self.text = self._shared(processes.on_main(self._first_sequences), "sequences for sigma")
        self.heldout = None if heldout is None else self._shared(heldout, "held-out sequences")
        if recipe.embedding_cap:
            self._shorten_embeddings(recipe.embedding_cap)
        self.transition = Transition(self.model, recipe, self.text, self.fwd_hooks, processes.sum)
        dtype = products_dtype(recipe.precision, original.cfg.dtype, processes.device)
        self.optimizer = adamw(self.model, recipe)
        self.objective = Objective(
            self.model, own, dtype, self.transition.groups, recipe.special.keep_first,
            integer_bits(recipe.precision),
        )  # fmt: skip
        self.wrapped, self.stepper = processes.prepare(self.objective, self.optimizer)
        if self.optimizer.in_part and self._spread:
            raise RecipeError(
                "FSDP spreads whole parameters, and trains them from the first step on: let "
                "trainable choose whole ones, without release, or train without FSDP"
            )
        if self.objective.integers is not None and self._spread:
            raise RecipeError(
                f"precision={recipe.precision!r}: FSDP spreads the weights, whose integers share "
                "one exponent; train without FSDP, or in float32 or bfloat16"
            )
        self.average = WeightAverage(self.optimizer, self.wrapped, recipe.weight_average)
        self.residual = ResidualProbe(self.model)
        self.divergence = DivergenceWatch(recipe.guard, distils=recipe.always_distils)
        self.next_step = 0
        self.released_at = 0  # the step of the last release
        self.waited = 0  # steps for which the schedule has waited
        self.last_batch = self.text[:0]
        self.history: list[StepRecord] = []
        self.saved: dict[int, bool] = {}  # checkpoints, and whether the step after one went well
        self.heldout_best, self.heldout_since = float("inf"), 0

    def _shared(self, text: Tensor, what: str) -> Tensor:
        """This process's share of a text."""
        rows = self.processes.equal_rows(text)
        if len(rows) == 0:
            raise RecipeError(
                f"{len(text)} {what} cannot be shared by {self.processes.world} processes: give "
                "at least one to each"
            )
        return rows

    @property
    def _spread(self) -> bool:
        """Whether FSDP has spread the model over the processes."""
        return any(isinstance(p, DTensor) for p in self.model.parameters())

    def _run_model(self, tokens: Tensor) -> None:
        """A forward pass through the wrapper, which gathers what FSDP has spread."""
        self.wrapped(tokens, None)

    def _first_sequences(self) -> Tensor:
        """The text to measure sigma on. It stays part of the training text."""
        start = self.data.state_dict()
        text = self.data.take(self.recipe.statistics.sequences)
        self.data.load_state_dict(start)
        require_tokens(self.original, text)
        return text

    def _next_batch(self) -> Tensor:
        batch = self.data.take(self.recipe.batch)
        require_tokens(self.original, batch)  # a wrong id would end the process on a GPU
        recipe, seed = self.recipe, f"{self.recipe.seed}, {self.next_step}"
        batch = with_repeats(batch, recipe.repeats, seed)
        d_vocab = self.original.cfg.d_vocab
        return with_random_tokens(batch, recipe.random_tokens, f"{seed}, random", d_vocab)

    def run(self, resume: bool) -> Run:
        """Train from the first step to the last.

        Args:
            resume: Begin at the last checkpoint in the folder.

        Returns:
            The finished run.

        Raises:
            PausedError: if its minutes are over.
            TrainingError: if the run diverges and cannot go back.
            OutputError: if a file cannot be written.
            CheckpointError: if there is no intact checkpoint to resume from.
        """
        began = time.monotonic()
        if resume:
            checkpoint = self._latest()
            self._load(checkpoint)
            self.saved = dict(checkpoint.state["saved"])
        else:
            self._fix_anchor()
            if self.folder is not None:
                self._save()
        rollback = None
        while self.next_step < self.recipe.steps and not self._stopped_early():
            try:
                record = self._step(self.next_step, rollback)
            except SigmaError as error:
                rollback = str(error)
                self._roll_back(rollback)
                continue
            rollback = None
            drift = record.probes.get("drift")
            watched, *earlier = (
                one.losses[self.divergence.term] for one in (record, *self.history[-RECENT:])
            )
            wrong = self.divergence.verdict(watched, record.gradient, earlier, drift)
            if wrong is not None and self.divergence.diverged:
                self._roll_back(wrong)
                rollback = wrong
                continue
            if wrong is not None:
                self.progress.say(
                    f"step {record.step}: {wrong}; the run goes on, and counts as diverged after "
                    f"{self.recipe.guard.in_a_row} such steps in a row"
                )
            elif self.next_step in self.saved:
                self.saved[self.next_step] = True
            self.next_step += 1
            self.waited += self._waits(record)
            record = self._released(self._evaluated(record))
            self.history.append(record)
            self._log(record)
            if self.folder is not None and self.next_step % self.checkpoint_every == 0:
                self._save()
            if self.next_step < self.recipe.steps:
                self._pause_after(time.monotonic() - began)
        if self.folder is not None and self.next_step not in self.saved:
            self._save()
        model = self._finished_model()
        return Run(model, self.recipe, tuple(self.history), time.monotonic() - began)

    def _pause_after(self, seconds: float) -> None:
        """End this call, but not the run, if its minutes are over."""
        if math.isinf(self.minutes):
            return
        # One clock for all processes.
        if not self.processes.on_main(lambda: seconds >= 60 * self.minutes):
            return
        assert self.folder is not None  # remove_norms asks for it
        if self.next_step not in self.saved:
            self._save()
        raise PausedError(
            f"paused at step {self.next_step} of {self.recipe.steps}; `lnfree remove --resume "
            f"{self.folder.path}`, or the same call with resume=True, continues"
        )

    def _finished_model(self) -> HookedTransformer:
        self.average.exchange()
        self.optimizer.thaw()
        if not self._spread:
            return self.model.eval()
        # Put the weights into a whole model.
        finished = split_norms(self.original).to(self.processes.device, print_details=False)
        if self.recipe.embedding_cap:
            untie(finished)
        training_state.load_tensors(finished, training_state.tensors(self.model))
        return finished.eval()

    @torch.no_grad()
    def _shorten_embeddings(self, cap: float) -> None:
        """Bring each row of W_E that is longer than `cap` times the text's mean down to that."""
        untie(self.model)
        W_E = self.model.W_E
        norms = W_E.norm(dim=-1, keepdim=True).double()
        seen = norms[self.text.to(W_E.device)]
        total, count = self.processes.sum(torch.stack([seen.sum(), seen.new_tensor(seen.numel())]))
        W_E.mul_((cap * total / count / norms.clamp(min=1e-12)).clamp(max=1))

    def _fix_anchor(self) -> None:
        """Measure the anchor's fixed target before the first step, if the recipe has one."""
        if self.recipe.anchor_target == "frozen" and self.recipe.scale_anchor:
            found = measure(
                self.model,
                ["ln_final"],
                self.text,
                self.fwd_hooks,
                groups=self.transition.groups,
                reduce=self.processes.sum,
                forward=self._run_model,
            )
            ordinary = replace(self.recipe.statistics, tokens="ordinary", average="mean")
            self.objective.anchor_target = common(found["ln_final"], ordinary)

    @property
    def scheduled(self) -> int:
        """The step of the schedule that comes next."""
        return self.next_step - self.waited

    def _waits(self, record: StepRecord) -> bool:
        """Whether the schedule stands still after this step."""
        wait, events = self.recipe.wait, self.recipe.events
        if wait is None or not events or self.waited >= wait.steps:
            return False
        if not min(e.step for e in events) < self.scheduled <= self.recipe.removed_at:
            return False
        return not record.losses["distillation"] <= wait.above  # nor if it is not a number

    def _step(self, step: int, rollback: str | None) -> StepRecord:
        """Events, one batch in micro-batches, one step of the optimiser."""
        began, recipe = time.monotonic(), self.recipe
        frozen = self.transition.before(self.scheduled, self._run_model)
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
        # Drift is not wrong in one step alone: while something is, every step is looked at.
        due = step % max(self.log_every, 1) == 0 or self.divergence.in_a_row > 0
        probing = self.log_every > 0 and due
        hooks = [*self.fwd_hooks, *self.transition.hooks(metering=probing)]
        if probing:
            hooks += self.residual.hooks
        weights = recipe.loss_weights(self.scheduled)
        sums = torch.zeros(len(weights), dtype=torch.float64, device=self.processes.device)
        self.objective.train()
        with self.model.hooks(hooks, self.bwd_hooks), torch.enable_grad():
            micro_batches = batch.to(self.processes.device).split(recipe.micro_batch)
            for index, tokens in enumerate(micro_batches):
                part = len(tokens) / len(batch)
                if self.objective.integers is not None:
                    key = f"{recipe.seed}, {step}, {index}, {self.processes.rank}"
                    self.objective.integers.draws.begin(key)
                with self.processes.synchronised(index == len(micro_batches) - 1):
                    losses = self.wrapped(tokens, weights)
                    (part * losses.total).backward()
                terms = [losses.terms[name].double() for name in weights]
                sums += part * torch.stack(terms)
        gradients = gradient_sizes(block_weights(self.model), whole) if probing else {}
        moved = [*self.objective.parameters(), *self.optimizer.select()]
        gradient = self.processes.clip(moved, recipe.clip)
        means = (self.processes.sum(sums) / self.processes.world).tolist()
        # A gradient of more parameters is not compared with one of fewer.
        since = max(self.released_at, len(self.history) - RECENT)
        earlier = [record.gradient for record in self.history[since:]]
        kept = self.divergence.keeps(gradient, earlier)
        if kept:  # else the weights stay; if the run ends here, they say where it came from
            self.stepper.step()
        self.objective.zero_grad()  # what is trained in part is not in the optimiser itself
        if recipe.weight_average and self.scheduled >= last_step(recipe.events):
            self.average.update()
        self.last_batch = batch
        measured = self.transition.after()
        probes = {}
        if probing:
            drift = self.transition.drift(measured)
            probes = {"drift": drift, "gradients": gradients, **self.residual.read()}
        return StepRecord(
            step, dict(zip(weights, means, strict=True)), lr, frozen, gradient,
            time.monotonic() - began, probes, rollback=rollback, skipped=not kept,
        )  # fmt: skip

    def _evaluated(self, record: StepRecord) -> StepRecord:
        """The record with the held-out loss, if this step is to be evaluated."""
        due = (
            self.next_step % self.recipe.evaluate_every == 0 or self.next_step == self.recipe.steps
        )
        if self.heldout is None or not due:
            return record
        heldout = self._heldout_loss(self.heldout)
        if record.step >= self.recipe.removed_at + self.waited:
            better = heldout < self.heldout_best  # not if it is not a number
            self.heldout_best = heldout if better else self.heldout_best
            self.heldout_since = 0 if better else self.heldout_since + 1
        return replace(record, heldout=heldout)

    @torch.no_grad()
    def _heldout_loss(self, heldout: Tensor) -> float:
        sums = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
        # What is still special when all norms are gone, a cap, the finished model does not have.
        gone = self.scheduled > self.recipe.removed_at
        hooks = [] if gone else self.transition.hooks()
        with self.average.in_place(), self.model.hooks(hooks):
            for tokens in heldout.split(self.recipe.micro_batch):
                loss = self.wrapped(tokens, CROSS_ENTROPY).terms["cross_entropy"]
                sums[0] += loss.double() * len(tokens)
                sums[1] += len(tokens)
        self.transition.meter.sums = {}
        total, count = self.processes.sum(sums).tolist()
        return total / count

    def _released(self, record: StepRecord) -> StepRecord:
        """The record, with what is trained from the next step on, if that is more."""
        released = []
        for release in self.recipe.release[self.optimizer.active - 1 :]:
            steps = (*self.history, record)[self.released_at :]
            if not release.due(self.next_step, [one.losses[self.divergence.term] for one in steps]):
                break
            self.optimizer.active, self.released_at = self.optimizer.active + 1, self.next_step
            self.progress.say(f"step {self.next_step}: released: {release}")
            released.append(str(release))
        return replace(record, released="; ".join(released)) if released else record

    def _stopped_early(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and self.heldout_since >= patience

    def _roll_back(self, wrong: str) -> None:
        """Go back to the last good checkpoint with wider gaps, or end the run."""
        guard, where = self.recipe.guard, f"at step {self.next_step}: {wrong}"
        began = find_runaway(
            self.model, self.transition.watched, self.last_batch.to(self.processes.device),
            [*self.fwd_hooks, *self.transition.hooks()], guard.sigma_factor, self._run_model,
            self.recipe.micro_batch,
        )  # fmt: skip
        self.transition.meter.sums = {}
        where += "" if began is None else f"; {began}"
        if guard.action == "stop" or self.folder is None:
            advice = "lower lr, or widen the gaps" if self.recipe.events else "lower lr"
            if began is not None:
                advice = (
                    "freeze that site later, or keep such tokens apart for longer (outliers_until "
                    "of Special)"
                )
            raise TrainingError(f"the run diverged {where}; {advice}")
        if self.divergence.rollbacks >= guard.rollbacks:
            raise TrainingError(
                f"the run diverged {where}; {guard.rollbacks} rollbacks did not help"
            )
        good, folder = self._last_good(), self.folder
        if good is None:
            raise TrainingError(f"the run diverged {where}; no checkpoint is left to go back to")
        rollbacks = self.divergence.rollbacks + 1
        self._load(folder.load(good))
        # A run that is interrupted now resumes from here, not from what was taken back.
        self.processes.on_main(lambda: folder.forget_after(good))
        self.saved = {step: went_well for step, went_well in self.saved.items() if step <= good}
        # The schedule in the checkpoint may have been widened before.
        factor = guard.widen ** (rollbacks - self.divergence.rollbacks)
        slower = guard.slower ** (rollbacks - self.divergence.rollbacks)
        recipe = self.recipe.widened(self.scheduled, factor)
        if recipe is self.recipe and guard.slower == 1:
            raise TrainingError(
                f"the run diverged {where}; no event is left whose gap could be wider: lower lr"
            )
        recipe = replace(recipe, lr=recipe.lr * slower)
        self.recipe, self.divergence.rollbacks = recipe, rollbacks
        self.transition.follow(recipe)
        self.progress.say(
            f"diverged {where}; back to step {self.next_step}, gaps from there {factor:g} times as "
            f"wide, learning rate {slower:g} times as high (rollback {rollbacks} of "
            f"{guard.rollbacks})"
        )
        self.progress.reset(self.next_step, recipe.steps)

    def _last_good(self) -> int | None:
        """The step of the newest checkpoint from which a step went well."""
        assert self.folder is not None
        good = [step for step in self.folder.checkpoints if self.saved.get(step)]
        return good[-1] if good else None

    def _log(self, record: StepRecord) -> None:
        if self.folder is not None and self.processes.is_main:
            self.folder.log(asdict(record))
        self.progress.show(record, sum(norm.frozen for norm in self.transition.norms.values()))

    def _save(self) -> None:
        """Write a checkpoint of everything, in the main process."""
        assert self.folder is not None
        plain = {
            "recipe": self.recipe.to_json(),
            "transition": self.transition.state_dict(),
            "data": self.data.state_dict(),
            "divergence": [
                self.divergence.best,
                self.divergence.rollbacks,
                self.divergence.in_a_row,
            ],
            "heldout": [self.heldout_best, self.heldout_since],
            "anchor_target": self.objective.anchor_target,
            "waited": self.waited,
            "released": [self.optimizer.active, self.released_at],
            "averaged": self.average.steps,
            "saved": [*self.saved.items(), (self.next_step, False)],
            "random": self.processes.gather(training_state.random_state()),
        }
        model = training_state.tensors(self.model)
        optimizer = training_state.optimizer_tensors(self.model, self.optimizer)
        folder, checkpoint = self.folder, Checkpoint(self.next_step, model, optimizer, plain)
        self.processes.on_main(lambda: folder.save(checkpoint, spare=self._last_good()))
        self.saved[self.next_step] = False

    def _latest(self) -> Checkpoint:
        assert self.folder is not None
        self.processes.on_main(self.folder.tidy)
        return self.folder.latest()

    def _load(self, checkpoint: Checkpoint) -> None:
        """Restore everything as it was when the checkpoint was written."""
        folder, plain = self.folder, checkpoint.state
        assert folder is not None
        if len(plain["random"]) != self.processes.world:
            raise CheckpointError(
                f"the run had {len(plain['random'])} processes, now there are "
                f"{self.processes.world}: resume it with as many"
            )
        training_state.load_tensors(self.model, checkpoint.model)
        training_state.load_optimizer_tensors(self.model, self.optimizer, checkpoint.optimizer)
        self.transition.load_state_dict(plain["transition"])
        self.data.load_state_dict(plain["data"])
        self.recipe, self.next_step = Recipe.from_json(plain["recipe"]), checkpoint.step
        self.waited = plain["waited"]
        self.optimizer.active, self.released_at = plain.get("released", (1, 0))  # not in old files
        self.average.steps = plain["averaged"]
        self.transition.follow(self.recipe)
        watch = self.divergence
        watch.best, watch.rollbacks, watch.in_a_row = plain["divergence"]
        self.heldout_best, self.heldout_since = plain["heldout"]
        self.objective.anchor_target = plain["anchor_target"]
        training_state.set_random_state(plain["random"][self.processes.rank])
        records = self.processes.on_main(lambda: folder.history(checkpoint.step))
        self.history = [StepRecord(**record) for record in records]
        self.progress.reset(self.next_step, self.recipe.steps)


def _require_hook_points(
    model: HookedTransformer, hooks: Iterable[tuple[str | Callable[[str], bool], Any]]
) -> None:
    """Refuse a hook whose hook point the model does not have in training."""
    known = set(model.hook_dict)
    for name, _ in hooks:
        found = name in known if isinstance(name, str) else any(map(name, known))
        if not found:
            hint = ": ln1 is two sites in training, ln1.qk and ln1.v"
            raise RecipeError(f"no hook point {name!s:.60}{hint if '.ln1.' in str(name) else ''}")
