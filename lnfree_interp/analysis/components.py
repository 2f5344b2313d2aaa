"""Components: the parts that a model is taken apart into, and their labels."""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from lnfree_interp.errors import DataError

BEHIND_STREAM = ("ln1.b", "ln2.b", "ln_final.b", "b_Q", "b_K", "b_U", "b_in", "probe.b")
"""Kinds that are no part of the stream: biases between the stream and what is explained."""
KINDS = (
    "embed", "pos_embed", "layer", "attn_out", "head", "mlp_out", "neuron", "b_V", "b_O", "b_out",
    *BEHIND_STREAM, "rest",
)  # fmt: skip
"""Kinds that the built-in levels give; a level of your own may add others."""
_LETTERS = {"head": "H", "neuron": "N"}


@dataclass(frozen=True)
class Component:
    """One part of the residual stream, or a bias between it and what is explained.

    Examples:
        >>> head = lf.Component.parse("L2H5")
        >>> head.kind, head.layer, head.index
        ('head', 2, 5)
        >>> lf.Component("mlp_out", 2).label
        '2_mlp_out'
    """

    kind: str
    """Its kind: an embedding, a head, a neuron, a whole sublayer or layer, a bias by name, or a
    name that a level of your own gives its parts."""
    layer: int | None = None
    """The block that it belongs to; None if it is in no block, and for `b_Q` and `b_K`."""
    index: int | None = None
    """The index of the head, the neuron, or the row of a dictionary."""
    pos: int | None = None
    """The position of the token that it comes from, where parts differ by position."""
    through: tuple["Component", ...] = ()
    """The heads that it passes through, in order, where parts are paths."""

    @property
    def label(self) -> str:
        """The short name in TransformerLens' style: `L2H5`, `L2N310`, `2_mlp_out`, `embed`.

        A position follows an @: `L2H5@3`, `embed@0`. The heads that a path passes through follow
        a >: `embed@0 > L0H1 > L2H5`. Row 17 of a dictionary that a level of your own reads in
        layer 1 is `L1.feature17`.
        """
        return " > ".join([self._own_label, *(head._own_label for head in self.through)])

    @property
    def _own_label(self) -> str:
        if self.kind in _LETTERS:
            name = f"L{self.layer}{_LETTERS[self.kind]}{self.index}"
        elif self.kind == "layer":
            name = f"L{self.layer}"
        elif self.kind == "b_V" and self.index is not None:
            name = f"L{self.layer}H{self.index}.b_V"
        elif self.index is not None:
            name = f"L{self.layer}.{self.kind}{self.index}"
        else:
            name = self.kind if self.layer is None else f"{self.layer}_{self.kind}"
        return name if self.pos is None else f"{name}@{self.pos}"

    @property
    def in_stream(self) -> bool:
        """Whether it is a part of the residual stream, so that it can be taken out of it."""
        return self.kind not in BEHIND_STREAM

    @classmethod
    def parse(cls, label: str) -> "Component":
        """The component with that label.

        Raises:
            DataError: if no component can have that label.
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
            if match := re.fullmatch(r"L(\d+)(H|\.)(\D*?)(\d+)(\.b_V)?", name):
                if match[2] == "H" and not match[3] and match[5]:
                    return cls("b_V", int(match[1]), int(match[4]), pos)
                if match[2] == "." and match[3] and not match[5]:
                    return cls(match[3], int(match[1]), int(match[4]), pos)
            if match := re.fullmatch(r"L(\d+)", name):
                return cls("layer", int(match[1]), pos=pos)
            if match := re.fullmatch(
                r"(\d+)_(attn_out|mlp_out|b_O|b_out|b_in|b_V|ln[12]\.b)", name
            ):
                return cls(match[2], int(match[1]), pos=pos)
            if name in ("embed", "pos_embed", "ln_final.b", "b_Q", "b_K", "b_U", "probe.b"):
                return cls(name, pos=pos)
        raise DataError(
            f"no component is called {label!r}: give a label such as L2H5, L2N310, 2_mlp_out, "
            "L2H5@3, or embed > L0H1"
        )


def as_component(component: str | Component) -> Component:
    """A component, given as one or by its label."""
    return component if isinstance(component, Component) else Component.parse(component)


def as_labels(given: str | Component | Sequence[str | Component]) -> list[str]:
    """The labels of one component or several."""
    several = [given] if isinstance(given, str | Component) else given
    return [one if isinstance(one, str) else one.label for one in several]


def find_components(wanted: Sequence[str | Component], among: Sequence[Component]) -> list[int]:
    """The rows of components, by label.

    Raises:
        DataError: for a label that is not among them (the message names the nearest), or that is
            named twice.
    """
    rows = {component.label: row for row, component in enumerate(among)}
    found = []
    for label in as_labels(wanted):
        if label not in rows:
            raise DataError(f"no component {label!r} among these {len(rows)}{nearest(label, rows)}")
        if rows[label] in found:
            raise DataError(f"{label} is named twice: name each component once")
        found.append(rows[label])
    return found


def nearest(name: object, names: Collection[str]) -> str:
    """A hint for a message: the names most like a wrong one, or else some of the names."""
    by_lower = {one.lower(): one for one in names}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=3)
    if near:
        return f"; did you mean {' or '.join(by_lower[one] for one in near)}?"
    some = list(names)
    shown = [*some[:3], "...", *some[-2:]] if len(some) > 5 else some
    return f": there are {', '.join(shown)}"
