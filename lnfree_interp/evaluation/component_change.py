"""Component change: which parts of a model a fine-tuning rewrote."""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.results import read_top
from lnfree_interp.errors import DataError
from lnfree_interp.models.running import require_hooked
from lnfree_interp.models.sites import stock_weights
from lnfree_interp.models.weight_components import WeightComponent, list_weight_components

MEASURES = {
    "mean_abs": "mean absolute change of a parameter",
    "relative": "norm of the change over the norm before",
    "largest": "largest absolute change of a parameter",
}
"""How a change is told, in words."""


@dataclass(frozen=True, eq=False)
class ComponentChange:
    """How far the parameters of each component moved."""

    components: tuple[WeightComponent, ...]
    """In the order of the model's parameters; all else is in the same order."""
    parameters: tuple[int, ...]
    """How many each of them has."""
    mean_abs: Float[Tensor, " component"]
    """The mean absolute change of a parameter, in its own unit."""
    squares: Float[Tensor, " component"]
    """The squared norm of the change."""
    squares_before: Float[Tensor, " component"]
    """The squared norm of the parameters before."""
    largest: Float[Tensor, " component"]
    """The largest absolute change of a parameter, in its own unit."""

    @property
    def relative(self) -> Float[Tensor, " component"]:
        """The norm of the change over the norm of the parameters before; infinite where they were
        zero, and 0 where nothing changed."""
        return _relative(self.squares, self.squares_before)

    def values(self, by: str = "relative") -> Float[Tensor, " component"]:
        """One of the three measures.

        Raises:
            DataError: if there is no such measure.
        """
        if by not in MEASURES:
            raise DataError(f"no change is measured by {by!r}: give one of {list(MEASURES)}")
        return getattr(self, by)

    def to_frame(self) -> pd.DataFrame:
        """A row for each component, in the order of the model's parameters."""
        return pd.DataFrame(
            {
                "component": [one.name for one in self.components],
                "kind": [one.kind for one in self.components],
                "layer": pd.array([one.layer for one in self.components], dtype="Int64"),
                "parameters": self.parameters,
                **{by: self.values(by).tolist() for by in MEASURES},
            }
        )

    def top(self, k: int = 10, by: str = "relative") -> pd.DataFrame:
        """The components that changed most, as a table.

        Raises:
            DataError: if k is less than one, or there is no such measure.
        """
        order = self.values(by).argsort(descending=True, stable=True)
        rows = order[: read_top(k, len(order))].tolist()
        return self.to_frame().iloc[rows].reset_index(drop=True)

    def by_layer(self, by: str = "relative") -> dict[str, dict[int | None, float]]:
        """The same for all components of a kind in a block together: by kind, then by layer, which
        is None outside of blocks.

        Raises:
            DataError: if there is no such measure.
        """
        self.values(by)  # refuses what is none
        groups: dict[str, dict[int | None, list[int]]] = {}
        for i, one in enumerate(self.components):
            groups.setdefault(one.kind, {}).setdefault(one.layer, []).append(i)
        return {
            kind: {layer: self._together(rows, by) for layer, rows in layers.items()}
            for kind, layers in groups.items()
        }

    def _together(self, rows: list[int], by: str) -> float:
        if by == "largest":
            return self.largest[rows].max().item()
        if by == "relative":
            return _relative(self.squares[rows].sum(), self.squares_before[rows].sum()).item()
        sizes = torch.tensor([self.parameters[i] for i in rows], dtype=torch.float64)
        return ((self.mean_abs[rows] * sizes).sum() / sizes.sum()).item()

    def __repr__(self) -> str:
        order = self.relative.argsort(descending=True, stable=True)[:3].tolist()
        most = ", ".join(f"{self.components[i].name} {self.relative[i]:.3g}" for i in order)
        return f"ComponentChange({len(self.components)} components; relative change, most: {most})"


def _relative(squares: Tensor, before: Tensor) -> Tensor:
    return torch.where(squares == 0, 0.0, (squares / before).sqrt())


@torch.no_grad()
def component_change(before: HookedTransformer, after: HookedTransformer) -> ComponentChange:
    """Which parts of a model a fine-tuning rewrote: every parameter in exactly one component.

    What a removal rewrote is seen beside the same fine-tuning without it, the control that
    `recipe.vanilla()` makes of a recipe. The constants of frozen norms are no parameters; what they
    became is in the run's records.

    Args:
        before: The model before, such as `lf.load(...)`.
        after: The same model afterwards, with norm sites or without, such as `run.model`. Folding
            rewrites weights without changing the function, so that a folded model is refused.

    Returns:
        A `ComponentChange`; `.top()` ranks the components, and `lf.plots.component_change(...)`
            draws one change or several over the layers.

    Raises:
        DataError: if the two models do not have the same parameters.

    Source:
        arXiv 2403.20284 ranks components by their change in a fine-tuning; its measure is not given
        there, so that three are here.

    Examples:
        >>> run = lf.train(model, lf.recipes.finetuning(steps=2, batch=2), tokens, progress=False)
        >>> change = lf.component_change(model, run.model)
        >>> change.top(3).columns.tolist()
        ['component', 'kind', 'layer', 'parameters', 'mean_abs', 'relative', 'largest']
    """
    require_hooked(before)
    require_hooked(after)
    old, new = stock_weights(before), stock_weights(after)
    for name in [*old, *new]:
        shapes = [tuple(W[name].shape) if name in W else None for W in (old, new)]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"the models differ in more than values: {name} is {shapes[0] or 'missing'} before "
                f"and {shapes[1] or 'missing'} after. Give both before `lf.fold`, such as "
                "`run.model`, and of one architecture"
            )
    components, rows, sizes = list_weight_components(before), [], []
    for one in components:
        n, total, squares, was, largest = 0, 0.0, 0.0, 0.0, 0.0
        for W, V in zip(one.of(old), one.of(new), strict=True):
            W, V = W.double(), V.to(W.device).double()
            moved = (V - W).abs()
            n += W.numel()
            total += moved.sum().item()
            squares += moved.square().sum().item()
            was += W.square().sum().item()
            largest = max(largest, moved.max().item())
        sizes.append(n)
        rows.append((total / n, squares, was, largest))
    return ComponentChange(
        components, tuple(sizes), *torch.tensor(rows, dtype=torch.float64).unbind(1)
    )
