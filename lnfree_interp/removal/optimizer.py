"""The optimiser of a run, and what it trains."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from lnfree_interp.models.site_names import stock_name
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.trainable import chosen_by, parameters_of


class _Entries:
    """The chosen entries of a parameter, as a parameter of their own."""

    def __init__(self, parameter: nn.Parameter, mask: Tensor):
        self.parameter = parameter
        mask = mask.to(parameter.device)
        self.index = mask.flatten().nonzero()[:, 0]
        self.values = nn.Parameter(self._whole[self.index])
        # What is not chosen has no share in the gradient's norm either.
        self.hook = parameter.register_hook(lambda g: torch.where(mask, g, 0))

    @property
    def _whole(self) -> Tensor:
        return self.parameter.detach().view(-1)

    def read(self) -> None:
        """Take the values, and their gradient, from the parameter."""
        self.values.detach().copy_(self._whole[self.index])
        grad = self.parameter.grad
        self.values.grad = None if grad is None else grad.reshape(-1)[self.index]

    def write(self) -> None:
        """Put the values into the parameter."""
        self._whole[self.index] = self.values.detach()


class PartialAdamW(torch.optim.AdamW):
    """AdamW on whole parameters, and on some entries of others: only these have moments, decay, and
    ever change."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        entries: Mapping[str, _Entries],
        frozen: list[nn.Parameter],
        **settings: Any,
    ):
        """The optimiser.

        Args:
            groups: As for AdamW.
            entries: The parameters that are trained in part, by name.
            frozen: The parameters that are not trained.
            settings: As for AdamW.
        """
        self.entries, self.frozen = entries, frozen
        super().__init__(groups, **settings)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """A step, as AdamW's."""
        self.read()
        loss = super().step(closure)
        self.write()
        return loss

    def read(self) -> None:
        """Follow parameters that were changed by somebody else."""
        for entries in self.entries.values():
            entries.read()

    def write(self) -> None:
        """Put entries that were changed by somebody else into their parameters."""
        for entries in self.entries.values():
            entries.write()

    def moved(self, model: HookedTransformer) -> dict[str, nn.Parameter]:
        """What the optimiser changes, by the names of a model's parameters."""
        whole = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return whole | {name: entries.values for name, entries in self.entries.items()}

    def release(self) -> None:
        """Leave the model as a model that was trained whole."""
        for entries in self.entries.values():
            entries.hook.remove()
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
    places, mask = parameters_of(model), chosen_by(model, recipe.trainable, recipe.seed)
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    entries, frozen = {}, []
    for name, parameter in model.named_parameters():
        # Fused AdamW goes through weights and moments side by side in memory, and moments that come
        # from a checkpoint are contiguous.
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        stock, moved = stock_name(name), parameter
        if stock not in places:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        if stock not in mask.chosen:
            parameter.requires_grad_(False)
            frozen.append(parameter)
            continue
        if not mask.chosen[stock].all():
            entries[name] = _Entries(parameter, mask.chosen[stock])
            moved = entries[name].values
        leaf = name.rpartition(".")[2].lstrip("_")
        (matrices if leaf.startswith("W_") else others).append(moved)
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return PartialAdamW(groups, entries, frozen, lr=recipe.lr, betas=recipe.betas, fused=True)
