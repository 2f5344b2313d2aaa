"""The result of every decomposition: a labelled sum that knows its own error."""

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import MeasuredError, measure_error, sum_and_largest

ComponentKind = Literal[
    "embed",
    "pos_embed",
    "layer",
    "attn_out",
    "head",
    "b_V",
    "b_O",
    "mlp_out",
    "neuron",
    "b_in",
    "b_out",
    "ln1.b",
    "ln2.b",
    "ln_final.b",
    "b_Q",
    "b_K",
    "b_U",
    "rest",
]
Level = Literal["layer", "block", "head", "source", "neuron"]


@dataclass(frozen=True)
class Component:
    """One part of the residual stream, or of the path from it to the logits.

    Examples:
        >>> head = lf.Component.parse("L2H5")
        >>> head.kind, head.layer, head.index
        ('head', 2, 5)
        >>> lf.Component("mlp_out", 2).label
        '2_mlp_out'
    """

    kind: ComponentKind
    """What it is: an embedding, a head, a neuron, a whole sublayer or layer, or a bias by name."""
    layer: int | None = None
    """Block that it belongs to; None for what is in no block, and for `b_Q` and `b_K`."""
    index: int | None = None
    """Head or neuron."""
    pos: int | None = None
    """Position of the token that it comes from, where parts are told apart by it."""
    through: tuple["Component", ...] = ()
    """Heads that it passes, one after the other, where parts are paths."""

    @property
    def label(self) -> str:
        """Short name in TransformerLens' style: `L2H5`, `L2N310`, `2_mlp_out`, `embed`.

        What comes from one position has it after an @: `L2H5@3`, `embed@0`. A path has the heads
        that it passes: `embed > L0H1 > L2H5`.
        """
        return " > ".join([self._own_label, *(head._own_label for head in self.through)])

    @property
    def _own_label(self) -> str:
        if self.kind in ("head", "neuron"):
            name = f"L{self.layer}{'H' if self.kind == 'head' else 'N'}{self.index}"
        elif self.kind == "layer":
            name = f"L{self.layer}"
        elif self.index is not None:
            name = f"L{self.layer}H{self.index}.{self.kind}"
        else:
            name = self.kind if self.layer is None else f"{self.layer}_{self.kind}"
        return name if self.pos is None else f"{name}@{self.pos}"

    @classmethod
    def parse(cls, label: str) -> "Component":
        """The component with that label.

        Raises:
            DataError: if no component is written like that.
        """
        start, *heads = label.split(" > ")
        if heads:
            return replace(cls.parse(start), through=tuple(cls.parse(head) for head in heads))
        name, split, at = label.partition("@")
        pos = int(at) if at.isdigit() else None
        if not split or pos is not None:
            if match := re.fullmatch(r"L(\d+)([HN])(\d+)", name):
                kind = "head" if match[2] == "H" else "neuron"
                return cls(kind, int(match[1]), int(match[3]), pos)
            if match := re.fullmatch(r"L(\d+)H(\d+)\.(b_V)", name):
                return cls("b_V", int(match[1]), int(match[2]), pos)
            if match := re.fullmatch(r"L(\d+)", name):
                return cls("layer", int(match[1]), pos=pos)
            if match := re.fullmatch(
                r"(\d+)_(attn_out|mlp_out|b_O|b_out|b_in|b_V|ln[12]\.b)", name
            ):
                return cls(cast(ComponentKind, match[2]), int(match[1]), pos=pos)
            if name in ("embed", "pos_embed", "ln_final.b", "b_Q", "b_K", "b_U"):
                return cls(cast(ComponentKind, name), pos=pos)
        raise DataError(f"no component is called {label!r}; names are like L2H5, L2N310, 2_mlp_out")


def find_components(wanted: Sequence[str | Component], among: Sequence[Component]) -> list[int]:
    """The rows of components, by label.

    Raises:
        DataError: for a label that is not there (it names the nearest), or is named twice.
    """
    rows = {component.label: row for row, component in enumerate(among)}
    found = []
    for one in wanted:
        label = one.label if isinstance(one, Component) else one
        if label not in rows:
            raise DataError(f"no component {label!r} among these {len(rows)}{nearest(label, rows)}")
        if rows[label] in found:
            raise DataError(f"{label} is named twice")
        found.append(rows[label])
    return found


def nearest(name: object, names: Collection[str]) -> str:
    """A hint for a message: the names most like a wrong one, else some of those that there are."""
    by_lower = {one.lower(): one for one in names}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=3)
    if near:
        return f"; did you mean {' or '.join(by_lower[one] for one in near)}?"
    some = list(names)
    shown = [*some[:3], "...", *some[-2:]] if len(some) > 5 else some
    return f": there are {', '.join(shown)}"


@dataclass(frozen=True, eq=False)
class Contributions:
    """Parts, their labels, and the whole that they must add up to.

    Attributes:
        values: [component, *batch], in logits, or in the unit of what was taken apart. `*batch` is
            what the function that made it says under Returns.
        components: What each row of `values` is.
        total: [*batch], the whole as the model itself computed it, independently of the parts.
        level: How finely the model was taken apart.
        of: For each prompt, what was attributed, e.g. `" self" - " cls"`.
        prompts: The prompts' tokens as strings, where there are prompts.
        answers: For each prompt, the several answers, where several were asked for: the last
            dimension of `values`.
        dtype: What the model computed in. Default: that of `total`.
        frozen_scale: True if something was held at the value it had (a live norm's scale, a soft
            cap's slope): the parts then still add up, but taking one away would change the others.
        identity: What the sum says, for the certificate.
        gap: Where something was held: the largest difference between a part and what the logit
            loses without it, measured for the largest parts, relative to the largest loss.
    """

    values: Float[Tensor, "component *batch"]
    components: tuple[Component, ...]
    total: Float[Tensor, "*batch"]
    level: Level | Literal["path", "token"]
    of: tuple[str, ...] = ()
    prompts: tuple[tuple[str, ...], ...] = ()
    frozen_scale: bool = False
    identity: str = "parts = the model's logits"
    gap: MeasuredError | None = None
    answers: tuple[tuple[str, ...], ...] = ()
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if len(self.components) != len(self.values):
            raise ValueError(f"{len(self.values)} values, {len(self.components)} labels")

    @cached_property
    def error(self) -> MeasuredError:
        """Sum of the parts against the whole, relative to the largest part or whole in the batch.

        Not to the whole alone: two logits can be close while their parts are large, and rounding
        goes with the parts.
        """
        found, largest = sum_and_largest(self.values)
        error = measure_error(found, self.total, max(largest, self.total.abs().max().item()))
        return replace(error, dtype=self.dtype or self.total.dtype)

    @property
    def certificate(self) -> Certificate:
        """The identity behind the sum, its error, and whether it holds."""
        return Certificate(f"sum over {self.level}s: {self.identity}", self.error)

    def verify(self, tolerance: float | None = None) -> "Contributions":
        """Return self if the parts add up to the whole.

        Args:
            tolerance: Largest relative error allowed. Default: what rounding in the model's dtype
                explains, 1e-5 in float32 and 1e-10 in float64.

        Raises:
            InexactError: if they do not.
        """
        self.certificate.require(tolerance)
        return self

    @property
    def labels(self) -> list[str]:
        """Component labels, in the order of `values`."""
        return [component.label for component in self.components]

    def __len__(self) -> int:
        return len(self.components)

    def __iter__(self) -> Iterator[tuple[Component, Float[Tensor, "*batch"]]]:
        return iter(zip(self.components, self.values, strict=True))

    def __getitem__(self, component: str | Component) -> Float[Tensor, "*batch"]:
        """[*batch], the values of one component, by label.

        Raises:
            DataError: if there is none; it names the nearest. Rows by number are in `values`.
        """
        if not isinstance(component, str | Component):
            raise DataError(f"a component is a label such as {self.labels[0]!r}, not {component!r}")
        return self.values[find_components([component], self.components)[0]]

    def select(self, prompt: int) -> "Contributions":
        """The result for one prompt of a batch, without the batch dimension; of several answers
        to one prompt, for one answer.

        Args:
            prompt: Its index, from the end if negative.

        Raises:
            DataError: if there is no such prompt, or no batch.
        """
        if self.values.ndim == 1:
            raise DataError("this is one prompt's result already")
        n = self.values.shape[1]
        if not -n <= prompt < n:
            raise DataError(f"there is no {prompt} among {n}")
        row = prompt % n
        chosen = replace(self, values=self.values[:, row], total=self.total[row])
        if self.values.ndim == 2 and self.answers:
            return replace(chosen, of=(self.answers[0][row],), answers=())
        one = slice(row, row + 1)
        return replace(
            chosen, of=self.of[one], prompts=self.prompts[one], answers=self.answers[one]
        )

    def of_kind(self, kind: ComponentKind) -> Float[Tensor, "component *batch"]:
        """The values of one kind of component, e.g. all heads, layer by layer.

        Raises:
            DataError: if there is no such kind. One that the model lacks gives no rows.
        """
        if kind not in get_args(ComponentKind):
            raise DataError(f"no kind {kind!r}{nearest(kind, get_args(ComponentKind))}")
        rows = [i for i, component in enumerate(self.components) if component.kind == kind]
        return self.values[rows]

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k components of largest absolute value: `component`, `value`.

        Raises:
            DataError: for a batch, or if k is less than one.
        """
        if self.values.ndim != 1:
            raise DataError("the largest of one prompt and answer: take it with select(i)")
        if k < 1:
            raise DataError(f"the {k} largest are none")
        rows = self.values.abs().topk(min(k, len(self))).indices.tolist()
        frame = self.to_frame().iloc[rows][["component", "value"]]
        return frame.reset_index(drop=True)

    def to_frame(self) -> pd.DataFrame:
        """One row per component: `component`, `kind`, `layer`, `index`, and a `value` column (or
        `value_0`, `value_1`, ... for a batch), in the unit of `values`; `pos` where parts have
        one."""
        frame = pd.DataFrame(
            {
                "component": self.labels,
                "kind": [component.kind for component in self.components],
                "layer": pd.array([component.layer for component in self.components], "Int64"),
                "index": pd.array([component.index for component in self.components], "Int64"),
            }
        )
        if any(component.pos is not None for component in self.components):
            frame["pos"] = pd.array([component.pos for component in self.components], "Int64")
        columns = self.values.detach().cpu().double().reshape(len(self), -1).numpy()
        if self.values.ndim == 1:
            return frame.assign(value=columns[:, 0])
        return frame.assign(**{f"value_{i}": columns[:, i] for i in range(columns.shape[1])})

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.values.shape))
        held = f", held: gap {self.gap}" if self.gap is not None else ""
        return f"Contributions({self.level} level, values [{shape}], error {self.error}{held})"
