"""A few real steps of a recipe on random tokens: how long a run will take, in how much memory."""

import copy
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.errors import RecipeError
from lnfree_interp.models.precision import integer_bits, products_dtype
from lnfree_interp.models.sites import untie, with_norm_sites
from lnfree_interp.removal.losses import Objective
from lnfree_interp.removal.optimizer import adamw
from lnfree_interp.removal.plan import aligned
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import extremes
from lnfree_interp.removal.statistics import TokenGroups, end_of_text

STEPS = 3
"""How many micro-batches are timed, after one that is not."""

SECONDS = 20.0
"""How long the trial may take; if micro-batches take longer, smaller ones are timed."""

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a few steps took, and what follows for a run of the recipe."""

    recipe: Recipe
    sequences: int
    """Sequences in each micro-batch that was timed."""
    sequence_length: int
    """Tokens in each of them."""
    heldout: int
    """Sequences that a run will be evaluated on."""
    micro_batch: Mapping[bool, float]
    """Seconds of a micro-batch, forward and backward: with distillation, and without."""
    optimizer: float
    """Seconds of the optimiser's step."""
    forward: float
    """Seconds of a forward pass of a micro-batch, as for a sigma or an evaluation."""
    weights: int
    """Bytes of the weights."""
    gradients: int
    """Bytes of the gradients."""
    trained: int
    """Bytes of what is trained of the weights, for each of which AdamW keeps two numbers."""
    original: int
    """Bytes of the model that the recipe distils from; 0 if it does not distil."""
    activations: int
    """Bytes that a micro-batch of the trial keeps for its backward pass."""
    peak: str
    """The largest memory use so far."""
    machine: str
    """Where it was measured."""

    @property
    def seconds(self) -> float:
        """How long a run of the recipe takes by this trial, without its checkpoints."""
        recipe = self.recipe
        distilled = [distils_at(recipe, step) for step in range(recipe.steps)]
        batches = recipe.batch / self.sequences * sum(self.micro_batch[one] for one in distilled)
        measured = len({event.step for event in recipe.events})
        if recipe.statistics.source != "event":
            measured = min(measured, 1)
        evaluated = -(-recipe.steps // recipe.evaluate_every)
        read = recipe.statistics.sequences * measured + self.heldout * evaluated
        return batches + recipe.steps * self.optimizer + self.forward * read / self.sequences

    def __str__(self) -> str:
        recipe, of = self.recipe, f"{self.sequences} x {self.sequence_length} random tokens"
        kinds = {True: "with distillation", False: "without distillation"}
        each = ", ".join(
            f"{seconds:.3g} s {kinds[kind]}" for kind, seconds in self.micro_batch.items()
        )
        kept = self.activations * recipe.micro_batch // self.sequences
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "AdamW": 2 * self.trained,
            "original": self.original if True in self.micro_batch else 0,
            "average of the weights": self.trained if recipe.weight_average else 0,
            f"activations of {recipe.micro_batch} sequences": kept,
        }
        memory = " + ".join(f"{what} {_size(size)}" for what, size in parts.items() if size)
        rows = [
            ("time", f"about {_duration(self.seconds)} for {recipe.steps} steps, by one process"),
            (
                "measured",
                f"on {STEPS} micro-batches of {of}: {each}; optimiser {self.optimizer:.3g} s",
            ),
            ("memory", f"{memory} = about {_size(sum(parts.values()))}"),
            ("peak", self.peak),
        ]
        return "\n".join([f"on this machine ({self.machine}), by a trial:", *aligned(rows)])


def distils_at(recipe: Recipe, step: int) -> bool:
    """Whether a step runs the original too."""
    return recipe.loss_weights(step)["distillation"] > 0


def try_steps(
    model: HookedTransformer,
    recipe: Recipe,
    sequence_length: int,
    *,
    heldout: int = 0,
    teacher: HookedTransformer | None = None,
    clock: Clock = time.perf_counter,
) -> Trial:
    """Time a few micro-batches of a recipe, and the optimiser's step, on random tokens.

    Args:
        model: A stock model with live norms. Its weights are trained: do not use it afterwards.
        recipe: The recipe. Its norms stay live, which takes as long.
        sequence_length: Tokens per sequence.
        heldout: Sequences that a run will be evaluated on.
        teacher: What the recipe distils from. Default: a copy of the model.
        clock: Says what time it is, in seconds.

    Returns:
        What was measured.

    Raises:
        RecipeError: if the device has not enough memory.
    """
    device = model.W_E.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        return _Bench(model, recipe, sequence_length, teacher, clock).trial(heldout)
    except torch.OutOfMemoryError as error:
        raise RecipeError(
            f"a micro-batch of {recipe.micro_batch} x {sequence_length} tokens does not fit into "
            f"the memory of {device}: give a smaller micro_batch or sequence_length"
        ) from error


class _Bench:
    """The parts of a trainer that take time."""

    def __init__(
        self, model: HookedTransformer, recipe: Recipe, length: int,
        teacher: HookedTransformer | None, clock: Clock,
    ):  # fmt: skip
        self.recipe, self.length, self.clock = recipe, length, clock
        self.model = with_norm_sites(model, copy_weights=False)
        if recipe.embedding_cap:
            untie(self.model)
        self.device = model.W_E.device
        distils = extremes(recipe.distillation)[1] > 0
        self.original = None
        if distils:
            of = copy.deepcopy(self.model) if teacher is None else with_norm_sites(teacher, False)
            self.original = of.requires_grad_(False)
        dtype = products_dtype(recipe.precision, model.cfg.dtype, self.device)
        self.objective = Objective(
            self.model, self.original, dtype, TokenGroups(end_of_text(model)),
            bits=integer_bits(recipe.precision),
        )  # fmt: skip
        self.objective.train()
        self.optimizer = adamw(self.model, recipe)

    def trial(self, heldout: int) -> Trial:
        kinds = {distils_at(self.recipe, step): step for step in range(self.recipe.steps)}
        weights = {kind: self.recipe.loss_weights(step) for kind, step in kinds.items()}
        slowest = weights[max(weights)]
        self._step(1, slowest)
        self._update()  # AdamW has its memory from here on
        one = self._seconds(lambda: self._step(1, slowest))
        fit = int(SECONDS / (max(one, 1e-9) * (STEPS + 1) * len(kinds)))
        n = max(1, min(self.recipe.micro_batch, fit))
        kept = _Saved(self.model)
        with kept:
            self._step(n, slowest)
        timed = {kind: self._mean(partial(self._step, n, these)) for kind, these in weights.items()}
        update = self._seconds(self._update)
        with torch.no_grad():
            self._forward(n)
            forward = self._mean(partial(self._forward, n))
        return Trial(
            recipe=self.recipe,
            sequences=n,
            sequence_length=self.length,
            heldout=heldout,
            micro_batch=timed,
            optimizer=update,
            forward=forward,
            weights=_nbytes(self.model),
            gradients=sum(p.nbytes for p in self.model.parameters() if p.requires_grad),
            trained=sum(p.nbytes for p in self.optimizer.moved(self.model).values()),
            original=0 if self.original is None else _nbytes(self.original),
            activations=kept.bytes,
            peak=_peak(self.device),
            machine=_machine(self.device),
        )

    def _tokens(self, n: int) -> Tensor:
        return torch.randint(self.model.cfg.d_vocab, (n, self.length), device=self.device)

    def _step(self, n: int, weights: Mapping[str, float]) -> None:
        """A forward and a backward pass."""
        with torch.enable_grad():
            self.objective(self._tokens(n), weights).total.backward()

    def _forward(self, n: int) -> None:
        self.objective(self._tokens(n), None)

    def _update(self) -> None:
        moved = [*self.objective.parameters(), *self.optimizer.select()]
        torch.nn.utils.clip_grad_norm_(moved, self.recipe.clip)
        self.optimizer.step()
        self.objective.zero_grad()

    def _mean(self, action: Callable[[], object]) -> float:
        return fmean(self._seconds(action) for _ in range(STEPS))

    def _seconds(self, action: Callable[[], object]) -> float:
        self._wait()
        began = self.clock()
        action()
        self._wait()
        return self.clock() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that are kept for a backward pass, beside the weights."""

    def __init__(self, model: HookedTransformer):
        super().__init__(self._keep, lambda x: x)
        own = {W.untyped_storage().data_ptr() for W in model.parameters()}
        self._known, self.bytes = own, 0

    def _keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return x


def _nbytes(model: HookedTransformer) -> int:
    return sum(p.nbytes for p in model.parameters())


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _peak(device: torch.device) -> str:
    """The largest memory use so far, in words."""
    if device.type == "cuda":
        return f"{_size(torch.cuda.max_memory_allocated(device))} on the GPU in the trial"
    if sys.platform == "win32":
        return "is not known on this system"
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = used if sys.platform == "darwin" else 1024 * used
    return f"{_size(size)} of this process so far, with loading and libraries"


def _size(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n / 1e3:.3g} kB"


def _duration(seconds: float) -> str:
    for unit, size, most in (("seconds", 1, 90), ("minutes", 60, 5400), ("hours", 3600, 172800)):
        if seconds < most:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.2g} days"
