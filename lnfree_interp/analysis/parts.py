"""Parts of the residual stream in factored form: activations times the weights that write them.

A part is never expanded to d_model unless it is asked for: a direction is carried back through the
weights and meets the activations there, and a matrix that reads the stream is multiplied with the
weights first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.contributions import Component, ComponentKind, find_components

Direction = Float[Tensor, "batch pos d_model"]
Values = Float[Tensor, "batch pos part"]
Vectors = Float[Tensor, "batch pos part d_model"]


@dataclass(frozen=True, eq=False)
class Dense:
    """One part that is there in full."""

    components: tuple[Component, ...]
    x: Float[Tensor, "batch pos d_model"]

    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""
        torch.linalg.vecdot(self.x, direction, out=out[..., 0])

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""
        return (self.x @ W)[:, :, None]

    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""
        return self.x[:, :, None].expand(-1, -1, len(rows), -1)


@dataclass(frozen=True, eq=False)
class Constant:
    """Biases, the same for every token."""

    components: tuple[Component, ...]
    biases: Float[Tensor, "part d_model"]
    shape: tuple[int, int]
    """Batch and positions."""

    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""
        out.copy_(direction @ self.biases.T)

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""
        parts = self.biases @ W
        return parts.expand(*self.shape, *parts.shape)

    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""
        return self.biases[rows].expand(*self.shape, -1, -1)


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads, or what they add before their biases."""

    components: tuple[Component, ...]
    z: Float[Tensor, "batch pos head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]

    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""
        torch.linalg.vecdot(self.z, onto_z(direction, self.W_O), out=out)

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""
        return einsum(
            self.z, self.W_O @ W, "batch pos head d_head, head d_head m -> batch pos head m"
        )

    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""
        return einsum(self.z[:, :, rows], self.W_O[rows], "b p h k, h k d -> b p h d")


@dataclass(frozen=True, eq=False)
class Sources:
    """Each head split by the token that it reads; head by head, then token by token."""

    components: tuple[Component, ...]
    pattern: Float[Tensor, "batch head pos source"]
    v: Float[Tensor, "batch source head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]

    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""
        moved = einsum(
            onto_z(direction, self.W_O), self.v,
            "batch pos head d_head, batch source head d_head -> batch head pos source",
        ).mul_(self.pattern)  # fmt: skip
        out.unflatten(-1, (self.v.shape[2], -1)).copy_(moved.transpose(1, 2))

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""
        read = einsum(
            self.v, self.W_O @ W, "batch source head d_head, head d_head m -> batch source head m"
        )
        moved = einsum(
            self.pattern,
            read,
            "batch head pos source, batch source head m -> batch pos head source m",
        )
        return moved.flatten(2, 3)

    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""
        n_sources = self.v.shape[1]
        found = []
        for row in rows:
            head, source = divmod(row, n_sources)
            whole = self.v[:, source, head] @ self.W_O[head]
            found.append(self.pattern[:, head, :, source, None] * whole[:, None])
        return torch.stack(found, dim=2)


@dataclass(frozen=True, eq=False)
class Neurons:
    """The neurons of an MLP."""

    components: tuple[Component, ...]
    post: Float[Tensor, "batch pos neuron"]
    W_out: Float[Tensor, "neuron d_model"]

    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""
        torch.mul(direction @ self.W_out.T, self.post, out=out)

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""
        return self.post[..., None] * (self.W_out @ W)

    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""
        return self.post[..., rows, None] * self.W_out[rows]


@lru_cache(maxsize=256)
def labels(kind: ComponentKind, layer: int, n: int) -> tuple[Component, ...]:
    """Heads or neurons of a layer; made once, since there are many."""
    return tuple(Component(kind, layer, index) for index in range(n))


@lru_cache(maxsize=24)
def source_labels(layer: int, n_heads: int, sources: int) -> tuple[Component, ...]:
    """Heads of a layer by source token; few are kept, since every length has its own."""
    return tuple(Component("head", layer, i, pos) for i in range(n_heads) for pos in range(sources))


Write = Dense | Constant | Heads | Sources | Neurons
"""A group of parts that one set of weights writes."""


def onto_z(
    direction: Float[Tensor, "batch pos d_model"], W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "batch pos head d_head"]:
    """A direction of the stream, as heads' outputs see it."""
    return (direction @ W_O.flatten(0, 1).T).unflatten(-1, W_O.shape[:2])


def project(
    parts: Iterable[Write],
    direction: Float[Tensor, "batch pos d_model"],
    constants: Sequence[tuple[Component, Float[Tensor, "batch pos"]]] = (),
) -> tuple[Float[Tensor, "component batch pos"], tuple[Component, ...]]:
    """Every part, projected onto a direction per position.

    Args:
        parts: Of the stream.
        direction: [batch, pos, d_model].
        constants: What else belongs to the sum.

    Returns:
        Values [component, batch, pos], a view of memory that has the components last, and what
        each row is.
    """
    parts = list(parts)
    components = [component for part in parts for component in part.components]
    values = direction.new_empty(*direction.shape[:-1], len(components) + len(constants))
    start = 0
    for part in parts:
        end = start + len(part.components)
        part.onto(direction, values[..., start:end])
        start = end
    for column, (component, value) in enumerate(constants, start):
        values[..., column] = value
        components.append(component)
    return values.movedim(-1, 0), tuple(components)


def expand(
    parts: Iterable[Write], wanted: Sequence[str | Component] | None = None
) -> tuple[Float[Tensor, "component batch pos d_model"], tuple[Component, ...]]:
    """Parts in full, d_model and all.

    Args:
        parts: Of the stream.
        wanted: Only these, in the order of computation. Default: all.

    Raises:
        DataError: for a component that is not among them; it names the nearest.
    """
    parts = list(parts)
    components = [component for part in parts for component in part.components]
    chosen = range(len(components)) if wanted is None else find_components(wanted, components)
    chosen, start, vectors = sorted(set(chosen)), 0, []
    for part in parts:
        rows = [i - start for i in chosen if start <= i < start + len(part.components)]
        if rows:
            vectors.append(part.vectors(rows))
        start += len(part.components)
    return torch.cat(vectors, dim=2).movedim(2, 0), tuple(components[i] for i in chosen)


def transform(
    parts: Iterable[Write], W: Float[Tensor, "d_model m"]
) -> tuple[Float[Tensor, "component batch pos m"], tuple[Component, ...]]:
    """Every part, through a matrix that reads the stream."""
    values, components = [], []
    for part in parts:
        values.append(part.through(W))
        components.extend(part.components)
    return torch.cat(values, dim=2).movedim(2, 0), tuple(components)
