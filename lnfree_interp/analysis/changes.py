"""The replacement of one component: which activations are edited, and what the stream loses."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from torch import Tensor

from lnfree_interp.analysis.components import Component, nearest
from lnfree_interp.analysis.parts import Part
from lnfree_interp.analysis.stream import Place, Stream
from lnfree_interp.errors import DataError
from lnfree_interp.models.running import Edit

WITHIN = {
    "head": ("z", "attn_out"), "attn_out": ("attn_out", "attn_out"),
    "neuron": ("post", "mlp_out"), "mlp_out": ("mlp_out", "mlp_out"),
}  # fmt: skip
"""The activations where a component is replaced in a run, and where what it writes shows."""


@dataclass(frozen=True, eq=False)
class Change:
    """The replacement of one component."""

    edits: Mapping[str, Edit]
    """The edits of a run that replace it, by hook name."""
    gone: Stream
    """What the stream loses by them, before anything reads it."""
    predicted: Stream
    """What the stream loses according to the level's parts, with patterns given."""
    written: Place
    """Where it is written."""
    held: tuple[str, ...] = ()
    """What the prediction holds: the divisor of attention weights, where it depends on tokens."""
    layer: int | None = None
    """The block of the head, where that does not see a token."""


def level_of(label: str, component: Component | None) -> str:
    """The level at which a component of the model is a part."""
    if component is None or component.kind not in (*WITHIN, "embed", "pos_embed"):
        raise DataError(
            f"{label} cannot be replaced: give a head (L2H5; what it reads from a token: L2H5@3), "
            "a neuron (L2N310), 2_attn_out, 2_mlp_out, embed, pos_embed, or a path (L0H1 > L2H5)"
        )
    if component.kind == "head" and component.pos is not None:
        return "source"
    return {"neuron": "neuron", "attn_out": "sublayer"}.get(component.kind, "head")


def find_part(parts: Iterable[Part], label: str) -> tuple[Part, int, int | None]:
    """The group that a part is in, its row there, and the position that its label restricts it to:
    `2_mlp_out@3` is what that MLP wrote at 3."""
    name, _, pos = label.partition("@")
    labels = []
    for part in parts:
        for row, component in enumerate(part.components):
            if component.label == label:
                return part, row, None
            if component.label == name and pos.isdigit():
                return part, row, int(pos)
            labels.append(component.label)
    raise DataError(f"the model has no {label}{nearest(label, labels)}")


def subtract(index: int, change: Tensor) -> Edit:
    """An edit that takes something from one head or neuron."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, index] = x[:, :, index] - change
        return x

    return edit


def put(index: int | None, at: slice, value: Tensor) -> Edit:
    """An edit that puts a value into one head or neuron, or the whole, at some positions."""

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        (x if index is None else x[:, :, index])[:, at] = value[:, at]
        return x

    return edit


def merged(changes: Sequence[Change]) -> dict[str, Edit]:
    """The edits of all changes by hook name; those of one hook are applied in turn."""
    by_hook: dict[str, list[Edit]] = {}
    for change in changes:
        for hook, edit in change.edits.items():
            by_hook.setdefault(hook, []).append(edit)

    def in_turn(edits: list[Edit]) -> Edit:
        return lambda x: reduce(lambda y, edit: y if (z := edit(y)) is None else z, edits, x)

    return {hook: in_turn(edits) for hook, edits in by_hook.items()}
