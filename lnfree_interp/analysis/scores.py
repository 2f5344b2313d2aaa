"""The result of taking an attention score apart: a sum over pairs of components."""

from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.contributions import (
    Component,
    Contributions,
    Level,
    find_components,
)
from lnfree_interp.analysis.questions import read_position
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import MeasuredError, measure_error, sum_and_largest


@dataclass(frozen=True, eq=False, repr=False)
class ScoreAttribution:
    """Attention scores of one query as a sum over pairs of components.

    Attributes:
        values: [query_component, key_component, key], in units of the score (pre-softmax).
        query_components: What each row is, at the query's position.
        key_components: What each column is, at the key's position.
        total: [key], the scores as the model computed them, before the softmax.
        log_pattern: [key], the logarithm of the attention pattern.
        head: As in `L2H5`.
        query: Its position.
        keys: Their positions.
        tokens: The prompt, as strings.
        level: How finely the stream was taken apart.
        frozen_scale: True if a live norm or a soft cap was held at the value it had.
        gap: Then, the largest difference between what a component at the query claims and what the
            scores lose without it, for the largest components, relative to the largest loss.
    """

    values: Float[Tensor, "query_component key_component key"]
    query_components: tuple[Component, ...]
    key_components: tuple[Component, ...]
    total: Float[Tensor, " key"]
    log_pattern: Float[Tensor, " key"]
    head: Component
    query: int
    keys: tuple[int, ...]
    tokens: tuple[str, ...]
    level: Level
    frozen_scale: bool = False
    gap: MeasuredError | None = None

    @cached_property
    def error(self) -> MeasuredError:
        """Sum over all pairs against the model's score, relative to the largest term."""
        found, largest = sum_and_largest(self.values.flatten(0, 1))
        scale = max(largest, self.total.abs().max().item())
        return replace(measure_error(found, self.total, scale), dtype=self.total.dtype)

    @property
    def certificate(self) -> Certificate:
        """The identity behind the sum."""
        name = f"sum over pairs of {self.level}s = attention scores of {self.head.label}"
        return Certificate(name, self.error)

    def verify(self, tolerance: float | None = None) -> "ScoreAttribution":
        """Return self if the pairs add up to the scores.

        Args:
            tolerance: As in `Contributions.verify`.

        Raises:
            InexactError: if they do not.
        """
        self.certificate.require(tolerance)
        return self

    def by_query(self) -> Contributions:
        """What each component at the query contributes to each score, whatever the key is made of.

        Returns:
            Values [query_component, key], in units of the score.
        """
        return self._sum(1, self.query_components)

    def by_key(self) -> Contributions:
        """What each component at the key contributes to its score, whatever the query is made of.

        Returns:
            Values [key_component, key], in units of the score.
        """
        return self._sum(0, self.key_components)

    def _sum(self, dim: int, components: tuple[Component, ...]) -> Contributions:
        of = (f"score of {self.head.label} from {self.query}",)
        return Contributions(
            self.values.sum(dim), components, self.total, self.level, of, (self.tokens,),
            self.frozen_scale, f"parts = attention scores of {self.head.label}",
            self.gap if dim else None,
        )  # fmt: skip

    def log_odds(self, key: int, other: int) -> Contributions:
        """The logarithm of how much more the head looks at one key than at another.

        log pattern[key] - log pattern[other], a sum over what is at the query times the difference
        of what is at the two keys.

        Args:
            key: Position.
            other: Position.

        Returns:
            Values [query_component], in log-odds; its total comes from the pattern, behind the
            softmax.

        Raises:
            DataError: if a position is not among the keys.
        """
        a, b = (self.column(position) for position in (key, other))
        values = self.values[:, :, a].sum(1) - self.values[:, :, b].sum(1)
        return Contributions(
            values, self.query_components, self.log_pattern[a] - self.log_pattern[b], self.level,
            (f"log-odds of {key} over {other}, {self.head.label} from {self.query}",),
            (self.tokens,), self.frozen_scale, "parts = log-odds between two keys",
        )  # fmt: skip

    def __getitem__(self, pair: tuple[str | Component, str | Component]) -> Float[Tensor, " key"]:
        """[key], the values of one pair, by the labels at the query and at the key.

        Raises:
            DataError: if there is none; it names the nearest.
        """
        query = find_components([pair[0]], self.query_components)[0]
        return self.values[query, find_components([pair[1]], self.key_components)[0]]

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.values.shape))
        held = f", held: gap {self.gap}" if self.gap is not None else ""
        return (
            f"ScoreAttribution({self.head.label} from {self.query}, {self.level} level, "
            f"values [{shape}], error {self.error}{held})"
        )

    def column(self, position: int) -> int:
        """The column of a key, by its position.

        Raises:
            DataError: if it is not among the keys.
        """
        position = read_position(position, len(self.tokens))
        if position not in self.keys:
            raise DataError(f"position {position} is not among the keys {list(self.keys)}")
        return self.keys.index(position)

    def top(self, key: int, k: int = 10) -> pd.DataFrame:
        """The pairs that matter most for one key: `query`, `key`, `value`.

        Args:
            key: Position.
            k: How many pairs, those of largest absolute value.

        Raises:
            DataError: if the position is not among the keys, or k is less than one.
        """
        if k < 1:
            raise DataError(f"the {k} largest are none")
        values = self.values[:, :, self.column(key)]
        rows = values.abs().flatten().topk(min(k, values.numel())).indices.tolist()
        width = values.shape[1]
        return pd.DataFrame(
            {
                "query": [self.query_components[row // width].label for row in rows],
                "key": [self.key_components[row % width].label for row in rows],
                "value": [values.flatten()[row].item() for row in rows],
            }
        )
