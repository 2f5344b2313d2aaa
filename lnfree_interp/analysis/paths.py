"""Paths through attention: every way from a source to a target, with attention patterns given.

A target is a sum over sources (embeddings, MLP outputs, biases) and heads. What a head adds is
again a sum over what it read, moved by its pattern and its OV circuit. Applied head by head, this
is the path expansion of the circuits framework (Elhage et al. 2021), which without norms involves
no approximation. There are far too many paths to list, so the heads that add most are opened first,
and a head that was not opened stays in the sum with its exact value.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import count
from operator import add
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.affine import Backward, as_target, carry_back, needed
from lnfree_interp.analysis.asking import analysis
from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.parts import Constant
from lnfree_interp.analysis.positions import whole_number
from lnfree_interp.analysis.prompts import Answers
from lnfree_interp.analysis.results import Contributions
from lnfree_interp.analysis.stream import Place
from lnfree_interp.analysis.targets import Target
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.errors import DataError

Weights = Float[Tensor, "batch read pos"]
Directions = Float[Tensor, "batch read d_model"]
"""A path reads the stream along one direction, weighted by position; or along several."""


@dataclass(frozen=True, eq=False)
class _Row:
    """Sources that reach the target along one path: by position, unless they are biases."""

    components: tuple[Component, ...]
    via: tuple[Component, ...]
    values: Float[Tensor, "batch pos part"]
    by_position: bool

    def named(self, index: int) -> Component:
        pos, part = divmod(index, len(self.components))
        found = self.components[part]
        return replace(found, pos=pos if self.by_position else found.pos, through=self.via)


@dataclass(frozen=True, eq=False)
class _Closed:
    """A head that was not opened."""

    head: Component
    via: tuple[Component, ...]
    values: Float[Tensor, "batch pos"]
    weights: Weights
    directions: Directions

    def row(self) -> _Row:
        return _Row((self.head,), self.via, self.values.sum(1)[:, None, None], False)


@analysis
def expand_paths(
    trace: Trace,
    answer: Answers | Target,
    foil: Answers | None = None,
    *,
    by: str | Level = "head",
    top_k: int | None = 20,
    expansions: SupportsIndex = 200,
) -> Contributions:
    """A logit as a sum over paths: a source at its position, and the heads that move it.

    Attention patterns and the outputs of MLPs are given. The path `embed@3 > L0H1 > L2H5` is the
    embedding of token 3, moved by L0H1 and then by L2H5. Biases have no position.

    Args:
        trace: A trace; or a model and a prompt, as two arguments.
        answer: The next token, as in `attribute_logits`, one for each prompt; or any target.
        foil: The token whose logit is subtracted.
        by: How finely the stream is taken apart, as in `attribute_logits`. The level's heads are
            opened, everything else is a source.
        top_k: How many paths to list; the others are one row `rest`. None: all.
        expansions: How many heads to open, those that add most first. A head that was not opened
            is listed as a whole: `L0H1 > L2H5` is all that L2H5 got from L0H1. To open all takes
            many, since there are about (1 + heads) ** layers paths.

    Returns:
        Values [path], or [path, prompt] for several prompts, in logits, largest first, then `rest`;
        each is exact, and so is their sum. Where all paths are listed there is no `rest`.

    Raises:
        InexactError: if a norm that values are read through, or the final one, is live or the
            logits are capped, and the trace does not hold.
        DataError: as for `attribute_logits`; for more than one answer, `top_k` less than one or
            negative `expansions`.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Path expansion: Elhage et al. 2021, https://transformer-circuits.pub/2021/framework. Ours:
        the largest heads are opened first, and what stays closed is summed.

    Examples:
        >>> paths = lf.expand_paths(free, "for i in", " range", top_k=3).verify()
        >>> len(paths), paths.labels[-1]
        (4, 'rest')
    """
    if whole_number(expansions, "expansions") < 0:
        raise DataError(f"expansions={expansions}: give how many heads to open, 0 or more")
    if top_k is not None and whole_number(top_k, "top_k") < 1:
        raise DataError(f"top_k={top_k}: give how many paths to list, at least 1, or None for all")
    chosen = level(by)
    mlps = [f"{layer}_mlp_out" for layer in range(trace.view.n_layers)]
    target = as_target(answer, foil)
    needed(trace, target, chosen)
    way = carry_back(trace, target, given=mlps)
    rows: list[_Row] = []
    closed: list[tuple[float, int, _Closed]] = []
    order = count()

    def open_up(
        weights: Weights, directions: Directions, place: Place, via: tuple[Component, ...]
    ) -> None:
        for found in _sources(trace, chosen, weights, directions, place, via):
            if isinstance(found, _Row):
                rows.append(found)
            else:
                size = -found.values.sum(1).abs().sum().item()
                heapq.heappush(closed, (size, next(order), found))

    reading = way.reading
    numbers = reading.at.numbers(trace.n_pos, trace.batch).to(reading.direction.device)
    weights = torch.nn.functional.one_hot(numbers, trace.n_pos).to(reading.direction)
    open_up(weights, reading.direction, reading.place, ())
    for component, value in way.constants():
        rows.append(_Row((component,), (), value[..., None], False))
    for _ in range(expansions):
        if not closed:
            break
        _, _, one = heapq.heappop(closed)
        open_up(*_opened(trace, one, rows))
    rows += [one.row() for _, _, one in closed]
    return _listed(trace, way, rows, top_k)


def _sources(
    trace: Trace,
    by: Level,
    weights: Weights,
    directions: Directions,
    place: Place,
    via: tuple[Component, ...],
) -> Iterator[_Row | _Closed]:
    """The parts of the stream at a place, read along directions with a weight per position."""
    pairs = list(zip(weights.unbind(1), directions.unbind(1), strict=True))
    for part in by.parts(trace, place):
        if isinstance(part, Constant):
            part = replace(part, shape=(trace.batch, 1))
            once = [part.along(u) * weight.sum(1)[:, None, None] for weight, u in pairs]
            yield _Row(part.components, via, reduce(add, once), False)
            continue
        values = reduce(add, (part.along(u) * weight[..., None] for weight, u in pairs))
        heads = [c.kind == "head" and c.pos is None for c in part.components]
        if all(heads):
            for column, head in enumerate(part.components):
                yield _Closed(head, via, values[..., column], weights, directions)
        elif any(c.pos is not None for c in part.components):  # these have a position already
            yield _Row(part.components, via, values.sum(1, keepdim=True), False)
        else:
            yield _Row(part.components, via, values, True)


def _opened(
    trace: Trace, one: _Closed, rows: list[_Row]
) -> tuple[Weights, Directions, Place, tuple[Component, ...]]:
    """What a head reads. Its bias becomes a row; the stream before the head is read next."""
    layer, index = one.head.layer, one.head.index
    assert layer is not None
    assert index is not None
    block = trace.block(layer)
    ahead = block.attention.onto_z(one.directions)[:, :, index]
    b_V = block.b_V[..., index, :]
    weighed = one.weights.sum(2)[..., None] * b_V if b_V.ndim == 1 else one.weights @ b_V
    bias = (ahead * weighed).sum((1, 2))
    rows.append(_Row((Component("b_V", layer, index),), one.via, bias[:, None, None], False))
    moved = one.weights @ block.pattern[:, index]
    found = ahead @ block.attention.W_V[index].T
    weights, directions = block.before.back_weighted(moved.movedim(1, 0), found.movedim(1, 0))
    return weights.movedim(0, 1), directions.movedim(0, 1), Place(layer), (one.head, *one.via)


def _listed(trace: Trace, way: Backward, rows: list[_Row], top_k: int | None) -> Contributions:
    """The largest rows by name, and the sum of the others."""
    values = torch.cat([row.values.flatten(1) for row in rows], dim=1)
    starts = torch.tensor([row.values[0].numel() for row in rows]).cumsum(0)
    size = values.abs().mean(0)
    keep = len(size) if top_k is None else min(top_k, len(size))
    largest = size.topk(keep).indices
    components = []
    for index in largest.tolist():
        row = int(torch.searchsorted(starts, index, right=True))
        components.append(rows[row].named(index - (int(starts[row - 1]) if row else 0)))
    listed = values[:, largest].T
    if keep < len(size):
        left = values.sum(1, dtype=torch.float64) - listed.sum(0, dtype=torch.float64)
        listed = torch.cat([listed, left.to(listed)[None]])
        components.append(Component("rest"))
    reading = way.reading
    result = Contributions(
        listed, tuple(components), reading.total[:, 0], "path", ("prompt",), reading.of,
        trace.prompts, unit=reading.unit, held=way.held, gap=way.gap,
        identity=f"paths + rest = {reading.identity.removeprefix('parts = ')}, patterns given",
        scale=max(reading.scale, values.abs().max().item()),
    )  # fmt: skip
    return result.select(prompt=0) if trace.single else result
