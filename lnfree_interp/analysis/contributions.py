"""The result of every decomposition: a labelled sum that knows its own error."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.numerics import MeasuredError, measure_error

ComponentKind = Literal[
    "embed",
    "pos_embed",
    "attn_out",
    "head",
    "b_O",
    "mlp_out",
    "neuron",
    "b_out",
    "ln_final.b",
    "b_U",
]
Level = Literal["block", "head", "neuron"]


@dataclass(frozen=True)
class Component:
    """One part of the residual stream, or of the path from it to the logits."""

    kind: ComponentKind
    layer: int | None = None
    index: int | None = None
    """Head or neuron."""

    @property
    def label(self) -> str:
        """Short name in TransformerLens' style: `L2H5`, `L2N310`, `2_mlp_out`, `embed`."""
        if self.kind == "head":
            return f"L{self.layer}H{self.index}"
        if self.kind == "neuron":
            return f"L{self.layer}N{self.index}"
        return self.kind if self.layer is None else f"{self.layer}_{self.kind}"


@dataclass(frozen=True, eq=False)
class Contributions:
    """Parts, their labels, and the whole that they must add up to.

    Attributes:
        values: [component, *batch], in logits.
        components: What each row of `values` is.
        total: [*batch], the whole as the model itself computed it, independently of the parts.
        level: How finely the model was taken apart.
        of: For each prompt, what was attributed, e.g. `" self" - " cls"`.
        prompts: The prompts' tokens as strings, where there are prompts.
        frozen_scale: True if a live final norm was read at the scale it had: the parts then still
            add up, but taking one away would change the scale of the others.
    """

    values: Float[Tensor, "component *batch"]
    components: tuple[Component, ...]
    total: Float[Tensor, "*batch"]
    level: Level
    of: tuple[str, ...] = ()
    prompts: tuple[tuple[str, ...], ...] = ()
    frozen_scale: bool = False

    def __post_init__(self) -> None:
        if len(self.components) != len(self.values):
            raise ValueError(f"{len(self.values)} values, {len(self.components)} labels")

    @cached_property
    def error(self) -> MeasuredError:
        """Sum of the parts against the whole, relative to the largest part or whole in the batch.

        Not to the whole alone: two logits can be close while their parts are large, and rounding
        goes with the parts.
        """
        scale = max(self.values.abs().max().item(), self.total.abs().max().item())
        error = measure_error(self.values.double().sum(0), self.total, scale)
        return replace(error, dtype=self.total.dtype)

    def verify(self, tolerance: float | None = None) -> "Contributions":
        """Return self if the parts add up to the whole.

        Args:
            tolerance: Largest relative error allowed. Default: what rounding in the model's dtype
                explains, 1e-5 in float32 and 1e-10 in float64.

        Raises:
            InexactError: if they do not.
        """
        self.error.require(f"sum over {self.level}s against the model's logits", tolerance)
        return self

    @property
    def labels(self) -> list[str]:
        """Component labels, in the order of `values`."""
        return [component.label for component in self.components]

    def __len__(self) -> int:
        return len(self.components)

    def __iter__(self) -> Iterator[tuple[Component, Float[Tensor, "*batch"]]]:
        return iter(zip(self.components, self.values, strict=True))

    def select(self, prompt: int) -> "Contributions":
        """The result for one prompt of a batch, without the batch dimension."""
        return replace(
            self,
            values=self.values[:, prompt],
            total=self.total[prompt],
            of=self.of[prompt : prompt + 1],
            prompts=self.prompts[prompt : prompt + 1],
        )

    def of_kind(self, kind: ComponentKind) -> Float[Tensor, "component *batch"]:
        """The values of one kind of component, e.g. all heads, layer by layer."""
        rows = [i for i, component in enumerate(self.components) if component.kind == kind]
        return self.values[rows]

    def to_frame(self) -> pd.DataFrame:
        """One row per component: `component`, `kind`, `layer`, `index`, and a `value` column (or
        `value_0`, `value_1`, ... for a batch), in logits."""
        frame = pd.DataFrame(
            {
                "component": self.labels,
                "kind": [component.kind for component in self.components],
                "layer": pd.array([component.layer for component in self.components], "Int64"),
                "index": pd.array([component.index for component in self.components], "Int64"),
            }
        )
        columns = self.values.detach().cpu().double().reshape(len(self), -1).numpy()
        if self.values.ndim == 1:
            return frame.assign(value=columns[:, 0])
        return frame.assign(**{f"value_{i}": columns[:, i] for i in range(columns.shape[1])})

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.values.shape))
        return f"Contributions({self.level} level, values [{shape}], error {self.error})"
