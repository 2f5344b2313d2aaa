"""Parts of the residual stream in factored form: activations times the weights that write them.

A part is expanded to d_model only if that is asked for. Otherwise a direction is carried back
through the weights and multiplied with the activations, and a matrix that reads the stream is
multiplied with the weights first.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.components import Component, find_components
from lnfree_interp.analysis.stream import Place
from lnfree_interp.analysis.sublayers import Attention

Direction = Float[Tensor, "batch pos d_model"]
Values = Float[Tensor, "batch pos part"]
Vectors = Float[Tensor, "batch pos part d_model"]


@dataclass(frozen=True, eq=False)
class Part(ABC):
    """A group of parts of the stream that one set of weights writes."""

    components: tuple[Component, ...]
    """The component of each part."""
    written: Place
    """The first place where the stream includes them."""

    @abstractmethod
    def onto(self, direction: Direction, out: Values) -> None:
        """Each part's share of a direction per position, written to `out`."""

    @abstractmethod
    def along(self, direction: Float[Tensor, "batch d_model"]) -> Values:
        """Each part's share of one direction for all positions."""

    @abstractmethod
    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """Each part times a matrix that reads the stream."""

    @abstractmethod
    def vectors(self, rows: list[int]) -> Vectors:
        """Some of the parts in full."""


@dataclass(frozen=True, eq=False)
class Dense(Part):
    """One part that is stored in full."""

    x: Float[Tensor, "batch pos d_model"]

    def onto(self, direction: Direction, out: Values) -> None:
        """As `Part.onto`."""
        torch.linalg.vecdot(self.x, direction, out=out[..., 0])

    def along(self, direction: Float[Tensor, "batch d_model"]) -> Values:
        """As `Part.along`."""
        return self.x @ direction[..., None]

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """As `Part.through`."""
        return (self.x @ W)[:, :, None]

    def vectors(self, rows: list[int]) -> Vectors:
        """As `Part.vectors`."""
        return self.x[:, :, None].expand(-1, -1, len(rows), -1)


@dataclass(frozen=True, eq=False)
class Constant(Part):
    """Biases, which are the same for every token."""

    biases: Float[Tensor, "part d_model"]
    shape: tuple[int, int]
    """The numbers of prompts and of positions."""

    def onto(self, direction: Direction, out: Values) -> None:
        """As `Part.onto`."""
        out.copy_(direction @ self.biases.T)

    def along(self, direction: Float[Tensor, "batch d_model"]) -> Values:
        """As `Part.along`."""
        return (direction @ self.biases.T)[:, None].expand(-1, self.shape[1], -1)

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """As `Part.through`."""
        parts = self.biases @ W
        return parts.expand(*self.shape, *parts.shape)

    def vectors(self, rows: list[int]) -> Vectors:
        """As `Part.vectors`."""
        return self.biases[rows].expand(*self.shape, -1, -1)


@dataclass(frozen=True, eq=False)
class Rows(Part):
    """Activations times rows: the neurons of an MLP, the features of a dictionary."""

    acts: Float[Tensor, "batch pos part"]
    W: Float[Tensor, "part d_model"]

    def onto(self, direction: Direction, out: Values) -> None:
        """As `Part.onto`."""
        torch.mul(direction @ self.W.T, self.acts, out=out)

    def along(self, direction: Float[Tensor, "batch d_model"]) -> Values:
        """As `Part.along`."""
        return self.acts * (direction @ self.W.T)[:, None]

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """As `Part.through`."""
        return self.acts[..., None] * (self.W @ W)

    def vectors(self, rows: list[int]) -> Vectors:
        """As `Part.vectors`."""
        return self.acts[..., rows, None] * self.W[rows]


@dataclass(frozen=True, eq=False)
class Heads(Part):
    """The heads of a layer, with their value biases or without them."""

    z: Float[Tensor, "batch pos head d_head"]
    attention: Attention

    def onto(self, direction: Direction, out: Values) -> None:
        """As `Part.onto`."""
        torch.linalg.vecdot(self.z, self.attention.onto_z(direction), out=out)

    def along(self, direction: Float[Tensor, "batch d_model"]) -> Values:
        """As `Part.along`."""
        return torch.linalg.vecdot(self.z, self.attention.onto_z(direction)[:, None])

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """As `Part.through`."""
        return einsum(
            self.z, self.attention.onto_matrix(W), "b pos head k, head k m -> b pos head m"
        )

    def vectors(self, rows: list[int]) -> Vectors:
        """As `Part.vectors`."""
        return self.attention.write(self.z[:, :, rows], rows)


@dataclass(frozen=True, eq=False)
class Sources(Part):
    """Each head split by the token that it reads, ordered by head, then by token."""

    pattern: Float[Tensor, "batch head pos source"]
    v: Float[Tensor, "batch source head d_head"]
    attention: Attention

    def _moved(
        self, ahead: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head source"]:
        """What each head adds from each source along a direction of its output per position."""
        moved = einsum(ahead, self.v, "b pos head k, b source head k -> b head pos source")
        return moved.mul_(self.pattern).transpose(1, 2)

    def onto(self, direction: Direction, out: Values) -> None:
        """As `Part.onto`."""
        moved = self._moved(self.attention.onto_z(direction))
        out.unflatten(-1, (self.v.shape[2], -1)).copy_(moved)

    def along(self, direction: Float[Tensor, "batch d_model"]) -> Values:
        """As `Part.along`."""
        ahead = self.attention.onto_z(direction)[:, None].expand(-1, self.pattern.shape[2], -1, -1)
        return self._moved(ahead).flatten(2)

    def through(self, W: Float[Tensor, "d_model m"]) -> Float[Tensor, "batch pos part m"]:
        """As `Part.through`."""
        onto = self.attention.onto_matrix(W)
        read = einsum(self.v, onto, "b source head k, head k m -> b source head m")
        moved = einsum(
            self.pattern, read, "b head pos source, b source head m -> b pos head source m"
        )
        return moved.flatten(2, 3)

    def vectors(self, rows: list[int]) -> Vectors:
        """As `Part.vectors`."""
        n_sources, found = self.v.shape[1], []
        for row in rows:
            head, source = divmod(row, n_sources)
            whole = self.attention.write(self.v[:, source, [head]], [head])
            found.append(self.pattern[:, head, :, source, None] * whole)
        return torch.stack(found, dim=2)


def project(
    parts: Iterable[Part],
    direction: Direction,
    constants: Sequence[tuple[Component, Float[Tensor, "batch pos"]]] = (),
) -> tuple[Float[Tensor, "component batch pos"], tuple[Component, ...]]:
    """Every part, projected onto a direction per position.

    Args:
        parts: The parts of the stream.
        direction: [batch, pos, d_model], one direction per position.
        constants: Biases behind the stream, which are added as rows of their own.

    Returns:
        Values [component, batch, pos], a view of memory in which components are last, and the
        component of each row.
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
    parts: Iterable[Part], wanted: Sequence[str | Component] | None = None
) -> tuple[Float[Tensor, "component batch pos d_model"], tuple[Component, ...]]:
    """Parts in full, as vectors of d_model entries.

    Args:
        parts: The parts of the stream.
        wanted: The components to expand, which come out in the order of computation. Default: all.

    Raises:
        DataError: for a component that is not among them; the message names the nearest.
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
    parts: Iterable[Part], W: Float[Tensor, "d_model m"]
) -> tuple[Float[Tensor, "component batch pos m"], tuple[Component, ...]]:
    """Every part, multiplied with a matrix that reads the stream."""
    values, components = [], []
    for part in parts:
        values.append(part.through(W))
        components.extend(part.components)
    return torch.cat(values, dim=2).movedim(2, 0), tuple(components)
