"""Attention scores as bilinear sums over pairs of components, before the softmax.

    score[q, k] = sum_ij (c_i W_Q) . (c_j W_K) / sqrt(d_head)

over the parts c_i of the stream at the query and c_j at the key, including biases. The softmax is
not additive, but its log-odds between two keys are: the normaliser cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.asking import analysis
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.components import Component, find_components
from lnfree_interp.analysis.gaps import measured_gap
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.parts import transform
from lnfree_interp.analysis.positions import (
    Positions,
    read_key_position,
    read_number,
    read_position,
)
from lnfree_interp.analysis.results import Contributions, Result, largest_rows
from lnfree_interp.analysis.score_targets import ScoreParts, require_head
from lnfree_interp.analysis.stream import Place, divided
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.analysis.view import Side
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import MeasuredError, measure_error, sum_and_largest

_LARGEST = 2**28
"""The most entries of a bilinear attribution, a gigabyte in float32."""


@dataclass(frozen=True, eq=False, repr=False)
class ScoreAttribution(Result):
    """Attention scores of one query as a sum over pairs of components.

    Attributes:
        values: [query_component, key_component, *batch, key], in units of the score (pre-softmax).
        query_components: The component of each row, at the query's position.
        key_components: The component of each column, at the key's position.
        total: [*batch, key], the scores as the model computed them, before the softmax. Where a
            query does not see a key, they are zero, and so are the values.
        log_pattern: [*batch, key], the logarithm of the attention pattern.
        head: The head, such as `L2H5`.
        query: The query's position, for each prompt.
        keys: The keys' positions.
        prompts: The tokens of each prompt, as strings.
        level: How finely the stream was taken apart.
        dims: `("key",)`, or `("prompt", "key")` for a batch.
        held: What is not affine and was held: a live norm or a soft cap.
        gap: Where something was held, the largest difference between what a component at the query
            adds and what the scores lose without it, for the largest components, relative to the
            largest loss.
    """

    values: Float[Tensor, "query_component key_component *batch key"]
    query_components: tuple[Component, ...]
    key_components: tuple[Component, ...]
    total: Float[Tensor, "*batch key"]
    log_pattern: Float[Tensor, "*batch key"]
    head: Component
    query: tuple[int, ...]
    keys: tuple[int, ...]
    prompts: tuple[tuple[str, ...], ...]
    level: str
    dims: tuple[str, ...] = ("key",)
    held: tuple[str, ...] = ()
    gap: MeasuredError | None = None

    @cached_property
    def certificate(self) -> Certificate:
        """The identity behind the sum; its error is relative to the largest term."""
        found, largest = sum_and_largest(self.values.flatten(0, 1))
        scale = max(largest, self.total.abs().max().item())
        error = replace(measure_error(found, self.total, scale), dtype=self.total.dtype)
        name = f"sum over pairs of {self.level}s = attention scores of {self.head.label}"
        return Certificate(name, error, self.held, self.gap)

    def by_query(self) -> Contributions:
        """What each component at the query contributes to each score, whatever the key is made of.

        Returns:
            Values [query_component, *batch, key], in units of the score.
        """
        return self._sum(1, self.query_components)

    def by_key(self) -> Contributions:
        """What each component at the key contributes to its score, whatever the query is made of.

        Returns:
            Values [key_component, *batch, key], in units of the score.
        """
        return self._sum(0, self.key_components)

    def _sum(self, dim: int, components: tuple[Component, ...]) -> Contributions:
        of = tuple(f"score of {self.head.label} from {query}" for query in self.query)
        return Contributions(
            self.values.sum(dim), components, self.total, self.level, self.dims, of, self.prompts,
            keys=self.keys, unit="score", identity=f"parts = attention scores of {self.head.label}",
            held=self.held, gap=self.gap, scale=self.values.abs().max().item(),
        )  # fmt: skip

    def log_odds(self, key: SupportsIndex, other: SupportsIndex) -> Contributions:
        """The logarithm of how much more the head looks at one key than at another.

        log pattern[key] - log pattern[other], as a sum over components at the query, times the
        difference between the two keys. `lf.LogOdds(..., side="key")` is the sum over components at
        the keys.

        Args:
            key: Position of the one key.
            other: Position of the other key.

        Returns:
            Values [query_component, *batch], in log-odds; its total comes from the pattern, behind
            the softmax.

        Raises:
            DataError: if a position is not among the keys, or a query does not see one.
        """
        a, b = (self.column(position) for position in (key, other))
        values = self.values[..., a].sum(1) - self.values[..., b].sum(1)
        logs, scores = (torch.stack([x[..., a], x[..., b]]) for x in (self.log_pattern, self.total))
        if not logs.isfinite().all():
            raise DataError(
                f"a query does not see both keys, {key} and {other}, since one is masked: give "
                "keys that every query sees"
            )
        head = self.head.label
        of = tuple(f"log-odds of {key} over {other}, {head} from {query}" for query in self.query)
        return Contributions(
            values, self.query_components, logs[0] - logs[1], self.level, self.dims[:-1], of,
            self.prompts, unit="log-odds", identity="parts at the query = log-odds",
            held=self.held, gap=self.gap,
            # Rounding errors grow with what the two logarithms were computed from.
            scale=max(x.abs().max().item() for x in (logs, scores, self.values)),
        )  # fmt: skip

    def __getitem__(self, pair: tuple[str | Component, str | Component]) -> Float[Tensor, "*batch"]:
        """[*batch, key], the values of one pair, by the labels at the query and at the key.

        Raises:
            DataError: if there is no such component; the message names the nearest.
        """
        query = find_components([pair[0]], self.query_components)[0]
        return self.values[query, find_components([pair[1]], self.key_components)[0]]

    def select(self, index: int | None = None, /, **named: SupportsIndex) -> "ScoreAttribution":
        """The result for one prompt of a batch (`prompt=`, or the number alone), or for one key
        (`key=`, its position), which stays as the only one.

        Raises:
            DataError: if there is no such dimension, prompt or key.
        """
        result = self
        for dim, number in (named if index is None else {self.dims[0]: index, **named}).items():
            if dim not in result.dims:
                raise DataError(f"there is no dimension {dim!r}: there are {', '.join(self.dims)}")
            if dim == "key":
                column = result.column(number)
                one, keys = [column], (result.keys[column],)
                result = replace(
                    result, values=result.values[..., one], total=result.total[..., one],
                    log_pattern=result.log_pattern[..., one], keys=keys,
                )  # fmt: skip
                continue
            row = read_number(number, len(result.total), dim)
            result = replace(
                result, values=result.values[:, :, row], total=result.total[row],
                log_pattern=result.log_pattern[row], dims=("key",),
                query=result.query[row : row + 1], prompts=result.prompts[row : row + 1],
            )  # fmt: skip
        return result

    def column(self, position: SupportsIndex) -> int:
        """The column of a key, by its position.

        Raises:
            DataError: if it is not among the keys.
        """
        return read_key_position(position, max(map(len, self.prompts)), self.keys)

    def top(self, key: SupportsIndex, k: SupportsIndex = 10) -> pd.DataFrame:
        """The pairs of largest absolute value for one key: `query`, `key`, `value`, and `held`
        where something was held.

        Args:
            key: Position of the key.
            k: How many pairs to list.

        Raises:
            DataError: if the position is not among the keys, for a batch, or if k is less than one.
        """
        return largest_rows(self.select(key=key).to_frame(), "value", k)

    def to_frame(self) -> pd.DataFrame:
        """One row per pair: `query`, `key`, and a `value` column for one key (or `value_4`, ... by
        the keys' positions), in units of the score; `held` where something was held.

        Raises:
            DataError: for a batch.
        """
        if self.dims != ("key",):
            raise DataError("a table shows one prompt: take it with select(prompt=i)")
        width, n = len(self.key_components), len(self.query_components)
        frame = pd.DataFrame(
            {
                "query": [one.label for one in self.query_components for _ in range(width)],
                "key": [one.label for one in self.key_components] * n,
            }
        )
        values = self.values.detach().cpu().double().flatten(0, 1).numpy()
        named = ["value"] if len(self.keys) == 1 else [f"value_{key}" for key in self.keys]
        return self._noted(pd.concat([frame, pd.DataFrame(values, columns=named)], axis=1))

    def __repr__(self) -> str:
        shape, queries = ", ".join(map(str, self.values.shape)), ", ".join(map(str, self.query))
        what = f"{self.head.label} from {queries}, {self.level} level, values [{shape}]"
        return self._line(what)


@analysis
def attribute_scores(
    trace: Trace,
    layer: SupportsIndex,
    head: SupportsIndex,
    query: SupportsIndex = -1,
    keys: Any = None,
    *,
    by: str | Level = "head",
) -> ScoreAttribution:
    """One head's attention scores from one query, by pairs of components at the query and the key.

    The head's biases `b_Q` and `b_K` are components too, and so is the bias of its norm, `2_ln1.b`,
    if any. The scores are those before the softmax, divided by the head's scale.

    Args:
        trace: A trace; or a model and a prompt, as two arguments.
        layer: The head's layer, counted from 0.
        head: The head's index in its layer, counted from 0.
        query: Position of the token that looks, from each prompt's own end if negative.
        keys: Positions of the keys, or of one key. Default: all that the query sees.
        by: How finely both sides are taken apart, as in `attribute_logits`.

    Returns:
        Values [query_component, key_component, key], or [query_component, key_component, prompt,
        key] for several prompts, in units of the score.

    Raises:
        InexactError: if a norm that the head reads through is live, or scores are capped, and the
            trace does not hold.
        DataError: for a head, level or position that does not exist, a key that the query does not
            see, or a result of more than 2**28 values.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts, or a
            `TransformerBridge` with norms on queries and keys.

    Source:
        The QK circuit, with the stream on both of its sides taken apart: Elhage et al. 2021,
        https://transformer-circuits.pub/2021/framework. Ours: the log-odds between two keys, which
        are additive where the softmax is not.

    Examples:
        >>> scores = lf.attribute_scores(free, "for i in", layer=2, head=5).verify()
        >>> scores.values.shape
        torch.Size([19, 19, 4])
        >>> scores.by_key().values.shape
        torch.Size([19, 4])
        >>> _ = scores.log_odds(key=1, other=0).verify()
    """
    trace.require_text()
    layer, head = require_head(trace.view, layer, head)
    parts, chosen, place = ScoreParts(trace, layer, head), level(by), Place(layer)
    trace.need(*parts.needs(), *chosen.needs(trace.view, place))
    at = trace.positions(query)
    held = trace.require_affine(parts.sites(), scores=True)
    queries = at.numbers(trace.n_pos, trace.batch).to(trace.view.device)
    rows = torch.arange(trace.batch, device=queries.device)[:, None]
    sees = parts.sees[rows, queries][:, 0]
    seen = _read_keys(keys, trace, sees, queries)
    n_parts = sum(len(part.components) for part in chosen.parts(trace, place, at))
    if n_parts * max(n_parts, trace.view.cfg.d_head) * len(seen) * trace.batch > _LARGEST:
        raise DataError(
            f"{n_parts} x {n_parts} pairs for {len(seen)} keys of {trace.batch} prompts do not fit "
            "into memory: give fewer keys or prompts, or a coarser level"
        )
    where = torch.tensor(seen, device=queries.device).expand(trace.batch, -1)
    q, q_components = project_side(parts, chosen, "query", at)
    k, k_components = project_side(parts, chosen, "key", _contiguous(seen, where))
    values = einsum(q[:, :, 0], k, "i b d, j b key d -> i j b key")
    values = values / trace.view.attention(layer).scale
    if trace.view.score_cap > 0:  # the soft cap is held at its slope
        values = values * parts.slope(queries.expand_as(where), where)
    masked = ~sees[:, seen]
    total, log_pattern = (x[rows, queries, where] for x in (parts.scores, parts.log_pattern))
    if masked.any():
        values, total = values.masked_fill(masked, 0.0), total.masked_fill(masked, 0.0)
        log_pattern = log_pattern.masked_fill(masked, -torch.inf)
    gap = None
    if held:

        def lost(changed: Tensor) -> Tensor:
            moved = parts.scores - parts.again("query", at, changed)
            return moved[rows, queries, where].masked_fill(masked, 0.0)

        stream = at.of(trace.stream(place))
        at_query = list(chosen.parts(trace, place, at))
        gap = measured_gap(at_query, stream, values.sum(1), q_components, lost)
    result = ScoreAttribution(
        values, q_components, k_components, total, log_pattern, Component("head", layer, head),
        tuple(queries[:, 0].tolist()), tuple(seen), trace.prompts, chosen.name,
        ("prompt", "key"), held, gap,
    )  # fmt: skip
    return result.select(prompt=0) if trace.single else result


def _read_keys(keys: Any, trace: Trace, sees: Tensor, queries: Tensor) -> list[int]:
    """The positions of keys that at least one query sees; a key that was asked for must be seen."""
    looks = sees.any(0).nonzero()[:, 0].tolist()
    if not looks:
        raise DataError(
            f"position {int(queries[0])} sees no key, since its scores are masked or not finite: "
            "give another query"
        )
    if keys is None:
        return looks
    keys = keys.tolist() if isinstance(keys, Tensor | np.ndarray) else keys
    given = list(keys) if isinstance(keys, Sequence | range) else [keys]
    seen = [read_position(key, trace.n_pos) for key in given]
    if not seen or not set(seen) <= set(looks):
        raise DataError(
            f"position {int(queries[0])} sees keys {looks[0]} to {looks[-1]}, not all of {seen}: "
            "give keys that it sees"
        )
    return seen


def _contiguous(seen: list[int], where: Tensor) -> Positions:
    """The positions of the keys, as a slice where they are contiguous, which makes no copies."""
    if seen == list(range(seen[0], seen[0] + len(seen))):
        return Positions(slice(seen[0], seen[0] + len(seen)))
    return Positions(where)


def project_side(
    parts: ScoreParts, by: Level, side: Side, at: Positions
) -> tuple[Float[Tensor, "component batch kept d_head"], tuple[Component, ...]]:
    """What each component and each bias adds to a head's queries or keys, rotated if these are."""
    trace, (W, b) = parts.trace, parts.weights(side)
    read = trace.read(parts.site, at)
    values, components = transform(by.parts(trace, Place(parts.layer), at), read.weights_back(W))
    values = divided(values, read.scale)
    constants = [(Component("b_Q" if side == "query" else "b_K"), b)]
    if read.bias is not None:
        constants.insert(0, (Component("ln1.b", parts.layer), read.bias @ W))
    shape = (1, *values.shape[1:])
    values = torch.cat([values, *(constant.expand(shape) for _, constant in constants)])
    values = parts.rotated(parts.normed(side, at).forward(values), at)
    return values, (*components, *(component for component, _ in constants))
