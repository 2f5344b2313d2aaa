"""Predicted and measured changes by deletions, and how well they agree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, SupportsIndex, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.results import CertifiedResult, largest_rows
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import measure_error

KINDS = ("score at query", "score at key", "pattern", "logit")
"""What deletions change."""
_LABELS = ("kind", "prompt", "head", "side", "key", "k", "chosen", "deleted")
_NUMBERS = ("before", "predicted", "measured")


class Deletion(NamedTuple):
    """One deletion and one number that it changes: a row of a `DeletionCheck`."""

    kind: str
    prompt: int
    head: str
    side: str
    key: int
    k: int
    chosen: str
    deleted: str
    before: float
    predicted: float
    measured: float


@dataclass(frozen=True, eq=False, repr=False)
class DeletionCheck(CertifiedResult):
    """Predicted and measured changes, one row for each deletion and each number that it changes.

    Attributes:
        kind: [row], what changes: `"score at query"`, `"score at key"`, by the side whose stream
            lost the components; `"pattern"`, the attention weight; `"logit"`.
        prompt: [row], the number of the prompt.
        head: [row], the head, such as `L2H5`; empty for logits.
        side: [row], the side whose stream lost the components, `"query"` or `"key"`; empty for
            logits.
        key: [row], the position of the key; -1 for logits.
        k: [row], how many components were deleted.
        chosen: [row], `"top"`: those of largest absolute share; `"random"`: the control.
        deleted: [row], their labels.
        before: [row], the number before the deletion: a score, an attention weight, a logit.
        predicted: [row], what it loses according to the shares, in its unit.
        measured: [row], what it loses in the model, in its unit.
        level: The level whose components were deleted.
        seed: The seed of heads and of random components.
        certificate: Predicted and measured changes are equal. It holds on a model on which these
            questions are exact; on any other, it says what was held for the prediction.
    """

    kind: tuple[str, ...]
    prompt: tuple[int, ...]
    head: tuple[str, ...]
    side: tuple[str, ...]
    key: tuple[int, ...]
    k: tuple[int, ...]
    chosen: tuple[str, ...]
    deleted: tuple[str, ...]
    before: Float[Tensor, " row"]
    predicted: Float[Tensor, " row"]
    measured: Float[Tensor, " row"]
    level: str
    seed: int
    certificate: Certificate

    @classmethod
    def of(
        cls, rows: Sequence[Deletion], level: str, seed: int, held: tuple[str, ...],
        dtype: torch.dtype,
    ) -> "DeletionCheck":  # fmt: skip
        """The result of some rows, with the largest error of any kind as its certificate."""
        columns: dict[str, Any] = dict(zip(Deletion._fields, zip(*rows, strict=True), strict=True))
        for name in _NUMBERS:
            columns[name] = torch.tensor(columns[name], dtype=torch.float64)
        errors = []
        for kind in dict.fromkeys(columns["kind"]):
            its = torch.tensor([row.kind == kind for row in rows])
            before, predicted, measured = (columns[name][its] for name in _NUMBERS)
            size = max(before.abs().max().item(), predicted.abs().max().item())
            errors.append(measure_error(predicted, measured, size))
        worst = max(errors, key=lambda error: (math.isnan(error.relative), error.relative))
        certificate = Certificate(
            "predicted = measured changes by deletions", replace(worst, dtype=dtype), held
        )
        return cls(**columns, level=level, seed=seed, certificate=certificate)

    def to_frame(self) -> pd.DataFrame:
        """One row per deletion and number: the columns are those of this result; `held` where
        something was held for the prediction."""
        frame = pd.DataFrame({name: getattr(self, name) for name in _LABELS})
        numbers = {name: getattr(self, name).tolist() for name in _NUMBERS}
        return self._noted(frame.assign(**numbers))

    def summary(self, per: Sequence[str] = ("kind", "k", "chosen")) -> pd.DataFrame:
        """How well the predictions do: a row per kind, number of components and choice.

        Args:
            per: The columns of `to_frame` to group by, such as `["kind"]`.

        Returns:
            These columns, and `n`, the number of deletions; `correlation` (Pearson) and `slope` of
            measured over predicted changes; `nmae`, mean |predicted - measured| / mean |measured|;
            `sign`, the share of deletions whose change has the predicted sign.

        Raises:
            DataError: if there is no such column.
        """
        frame = self.to_frame()
        if unknown := [name for name in per if name not in _LABELS]:
            raise DataError(f"there is no column {unknown[0]!r}: there are {', '.join(_LABELS)}")
        rows: list[dict[str, Any]] = []
        for values, some in frame.groupby(list(per), sort=False):
            found = agreement(*(torch.tensor(some[x].to_numpy()) for x in _NUMBERS[1:]))
            group = zip(per, cast(tuple[Any, ...], values), strict=True)
            rows.append({**dict(group), "n": len(some), **found})
        if "kind" in per:
            rows.sort(key=lambda row: KINDS.index(row["kind"]))
        return pd.DataFrame(rows)

    def top(self, k: SupportsIndex = 10) -> pd.DataFrame:
        """The k rows in which prediction and measurement are furthest apart, relative to the
        largest change of their kind.

        Raises:
            DataError: if k is less than one.
        """
        kinds = torch.tensor([KINDS.index(kind) for kind in self.kind])
        largest = torch.ones(len(KINDS), dtype=self.measured.dtype)
        for kind in kinds.unique():
            largest[kind] = self.measured[kinds == kind].abs().max()
        missed = (self.predicted - self.measured) / largest[kinds].clamp(min=1e-300)
        return largest_rows(self.to_frame().assign(missed=missed.tolist()), "missed", k)

    def __repr__(self) -> str:
        found = ", ".join(
            f"{row['kind']} r {row['correlation']:.3f} NMAE {row['nmae']:.2g}"
            for row in self.summary(["kind"]).to_dict("records")
        )
        return self._line(f"{len(self.kind):,} changes by {self.level}: {found}")


def agreement(
    predicted: Float[Tensor, " row"], measured: Float[Tensor, " row"]
) -> dict[str, float]:
    """Correlation, slope of measured over predicted, NMAE, and the share of equal signs."""
    p, m = (x - x.mean() for x in (predicted.double(), measured.double()))
    pp, pm, mm = (p @ p).item(), (p @ m).item(), (m @ m).item()
    error, size = (predicted - measured).abs().mean().item(), measured.abs().mean().item()
    return {
        "correlation": pm / math.sqrt(pp * mm) if pp * mm > 0 else math.nan,
        "slope": pm / pp if pp > 0 else math.nan,
        "nmae": error / size if size else math.inf if error else 0.0,
        "sign": (predicted.sign() == measured.sign()).double().mean().item(),
    }
