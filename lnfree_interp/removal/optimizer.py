"""The optimiser of a run, and what it trains."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from lnfree_interp.errors import RecipeError
from lnfree_interp.models.site_names import stock_name
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.tuning.parameter_mask import ParameterMask
from lnfree_interp.tuning.selection import chosen_by, parameters_of


class _Entries:
    """Some entries of a parameter, as a parameter of their own."""

    def __init__(self, parameter: nn.Parameter, mask: Tensor):
        self.parameter = parameter
        self.index = mask.flatten().nonzero()[:, 0].to(parameter.device)
        self.values = nn.Parameter(self._whole[self.index])

    @property
    def _whole(self) -> Tensor:
        return self.parameter.detach().view(-1)

    def take_gradient(self) -> None:
        """Take the entries of the parameter's gradient."""
        grad = self.parameter.grad
        self.values.grad = None if grad is None else grad.reshape(-1)[self.index]

    def read(self) -> None:
        """Take the values from the parameter."""
        self.values.detach().copy_(self._whole[self.index])

    def write(self) -> None:
        """Put the values into the parameter."""
        self._whole[self.index] = self.values.detach()


class Stage:
    """What is trained from some step on."""

    def __init__(self) -> None:
        self.whole: list[nn.Parameter] = []
        self.entries: dict[str, _Entries] = {}


class PartialAdamW(torch.optim.AdamW):
    """AdamW on whole parameters, and on some entries of others, stage by stage: only these have
    moments, decay, and ever change."""

    def __init__(
        self, groups: list[dict[str, Any]], stages: Sequence[Stage], frozen: list[nn.Parameter],
        **settings: Any,
    ):  # fmt: skip
        """The optimiser, at its first stage.

        Args:
            groups: As for AdamW.
            stages: What is trained from when on.
            frozen: The parameters that are never trained.
            settings: As for AdamW.
        """
        self.stages, self.frozen = stages, frozen
        self.active = 1
        """How many stages are trained."""
        super().__init__(groups, **settings)

    @property
    def in_part(self) -> bool:
        """Whether there is more to do than AdamW on whole parameters."""
        return len(self.stages) > 1 or any(stage.entries for stage in self.stages)

    @property
    def _entries(self) -> list[tuple[int, str, _Entries]]:
        """With the number of their stage, and the name of the parameter."""
        return [
            (number, name, entries)
            for number, stage in enumerate(self.stages)
            for name, entries in stage.entries.items()
        ]

    def select(self) -> list[nn.Parameter]:
        """Leave gradients of what is trained now alone; returns the entries that have one of their
        own."""
        for number, _, entries in self._entries:
            if number < self.active:
                entries.take_gradient()
            else:
                entries.values.grad = None
        for _, _, entries in self._entries:
            entries.parameter.grad = None
        for stage in self.stages[self.active :]:
            for parameter in stage.whole:
                parameter.grad = None
        return [entries.values for _, _, entries in self._entries]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """A step, as AdamW's, with the gradients that `select` has left."""
        self.read()
        loss = super().step(closure)
        self.write()
        return loss

    def read(self) -> None:
        """Follow parameters that were changed by somebody else."""
        for _, _, entries in self._entries:
            entries.read()

    def write(self) -> None:
        """Put entries that were changed by somebody else into their parameters."""
        for _, _, entries in self._entries:
            entries.write()

    def moved(self, model: HookedTransformer) -> dict[str, nn.Parameter]:
        """What the optimiser changes, by the names of a model's parameters; entries of one that are
        trained from a later stage on have its number in their name."""
        in_part = {name for _, name, _ in self._entries}
        whole = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in in_part
        }
        return whole | {
            f"{name}#{number}" if number else name: entries.values
            for number, name, entries in self._entries
        }

    def thaw(self) -> None:
        """Leave the model as a model that was trained whole."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)


def adamw(model: HookedTransformer, recipe: Recipe) -> PartialAdamW:
    """AdamW for what the recipe trains, with weight decay on matrices and embeddings only.

    The names decide, because TransformerLens' b_Q is a matrix by its shape. Parameters that the
    architecture in transformers does not have, such as a Llama's biases, are not trained: they
    could not be exported.

    Raises:
        RecipeError: if the recipe trains what the model does not have.
    """
    places = parameters_of(model)
    masks = _masks(model, recipe)
    able = {stock_name(name) for name, W in model.named_parameters() if W.requires_grad}
    if not masks[0].chosen.keys() & able:
        raise RecipeError(
            f"trainable={recipe.trainable!r:.80} leaves nothing to train: it chooses no entry, or "
            "parameters whose requires_grad is False"
        )
    stages = [Stage() for _ in masks]
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    frozen = []
    for name, parameter in model.named_parameters():
        # Fused AdamW goes through weights and moments side by side in memory, and moments that come
        # from a checkpoint are contiguous.
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        stock = stock_name(name)
        if stock not in places:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        leaf = name.rpartition(".")[2].lstrip("_")
        group = matrices if leaf.startswith("W_") else others
        chosen = [(s, mask.chosen[stock]) for s, mask in zip(stages, masks, strict=True)
                  if stock in mask.chosen]  # fmt: skip
        for stage, mask in chosen:
            if mask.all():
                stage.whole.append(parameter)
                group.append(parameter)
            else:
                stage.entries[name] = _Entries(parameter, mask)
                group.append(stage.entries[name].values)
        if not chosen:
            parameter.requires_grad_(False)
            frozen.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return PartialAdamW(groups, stages, frozen, lr=recipe.lr, betas=recipe.betas, fused=True)


def _masks(model: HookedTransformer, recipe: Recipe) -> list[ParameterMask]:
    """What each stage adds to those before it."""
    masks = []
    before = ParameterMask({})
    for trainable in (recipe.trainable, *(one.trainable for one in recipe.release)):
        mask = chosen_by(model, trainable, recipe.seed)
        masks.append(mask - before)
        before |= mask
    return masks
