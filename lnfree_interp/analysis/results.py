"""What every result has in common, and the result of most questions: a labelled sum."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.certificates import Certificate, describe_held
from lnfree_interp.analysis.components import KINDS, Component, find_components, nearest
from lnfree_interp.analysis.positions import read_key_position, read_number, whole_number
from lnfree_interp.analysis.saving import read_saved, saved
from lnfree_interp.errors import DataError, HeldWarning
from lnfree_interp.files import write_new_file
from lnfree_interp.numerics import MeasuredError, measure_error, sum_and_largest

R = TypeVar("R", bound="Result")


class Result:
    """What every result can do: verify itself, say what was held, and be saved.

    Its `certificate` is the identity behind the numbers, the error of that identity, what was held
    for it, and the gap.
    """

    @property
    def _certificate(self) -> Certificate:
        return getattr(self, "certificate")  # noqa: B009  a field here, computed there

    @property
    def error(self) -> MeasuredError:
        """The error with which the identity holds."""
        return self._certificate.error

    def verify(self: R, tolerance: float | None = None) -> R:
        """Return self if the identity holds.

        Args:
            tolerance: Largest relative error allowed. Default: what rounding in the model's dtype
                explains, 1e-5 in float32 and 1e-10 in float64.

        Raises:
            InexactError: if the identity does not hold.

        Warns:
            HeldWarning: if it holds only because something that is not affine was held; with the
                measured gap.
        """
        certificate = self._certificate.require(tolerance)
        if certificate.held:
            held = describe_held(certificate.held, certificate.gap)
            message = f"{certificate.identity}: this adds up{held}; it is not exact"
            warnings.warn(message, HeldWarning, stacklevel=2)
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to a file: tensors as safetensors, the rest as JSON in its header.

        Args:
            path: The file to write, which must not exist yet; `lf.load_result` reads it.

        Returns:
            The path, absolute.

        Raises:
            OutputError: if the path exists already, or the file cannot be written.
        """
        return write_new_file(path, saved(self))

    def _noted(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A table of the result, with a column `held` if something was held."""
        one = self._certificate
        if not one.held:
            return frame
        return frame.assign(held=describe_held(one.held, one.gap).removeprefix(" with "))

    def _line(self, what: str) -> str:
        """The line that `__repr__` shows."""
        held = describe_held(self._certificate.held, self._certificate.gap)
        return f"{type(self).__name__}({what}, error {self.error}{held})"


class CertifiedResult(Result):
    """A result whose certificate was measured when it was made."""

    @property
    def held(self) -> tuple[str, ...]:
        """What is not affine and was held; empty for an exact result."""
        return self._certificate.held

    @property
    def gap(self) -> MeasuredError | None:
        """What holding misses, measured; None where nothing was held."""
        return self._certificate.gap


@dataclass(frozen=True, eq=False, repr=False)
class Contributions(Result):
    """Parts, their labels, and the whole that they must add up to.

    Attributes:
        values: [component, *batch], in logits, or in the unit of what was taken apart. `*batch` is
            named by `dims`.
        components: What each row of `values` is.
        total: [*batch], the whole as the model itself computed it, independently of the parts.
        level: How finely the model was taken apart: the level's name, `"path"` or `"token"`.
        dims: What the dimensions behind the first are: `"prompt"`, `"answer"`, `"target"`, `"pos"`,
            `"key"`, `"d_model"`.
        of: For each prompt, what was attributed, e.g. `" self" - " cls"`.
        prompts: The prompts' tokens as strings, where there are prompts.
        answers: The names of each prompt's answers, where there are several.
        unit: What `values` are measured in: `"logit"`, `"score"`, `"log-odds"`, `"pre"`, `"post"`
            or `"projection"`.
        identity: What the sum says, for the certificate.
        held: What is not affine and was held at the value it had (a live norm's scale, a soft
            cap's slope): the parts then still add up, but taking one away would change the others.
        gap: Where something was held: the largest difference between a part and what the whole
            loses without it, measured for the largest parts, relative to the largest loss.
        dtype: The precision that the model computed in. Default: that of `total`.
        scale: The largest number that the parts or the whole were computed from, where that is
            larger than both: rounding errors grow with it.
        keys: The positions along the dimension `"key"`, by which `select(key=...)` chooses.
    """

    values: Float[Tensor, "component *batch"]
    components: tuple[Component, ...]
    total: Float[Tensor, "*batch"]
    level: str
    dims: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    prompts: tuple[tuple[str, ...], ...] = ()
    answers: tuple[tuple[str, ...], ...] = ()
    unit: str = "logit"
    identity: str = "parts = the model's logits"
    held: tuple[str, ...] = ()
    gap: MeasuredError | None = None
    dtype: torch.dtype | None = None
    scale: float = 0.0
    keys: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.components) != len(self.values):
            raise ValueError(f"{len(self.values)} values, {len(self.components)} labels")
        if len(self.dims) != self.values.ndim - 1:
            raise ValueError(f"dimensions {self.dims} of values {list(self.values.shape)}")

    @cached_property
    def certificate(self) -> Certificate:
        """The identity behind the sum, its error, and whether it holds.

        The error is the sum of the parts against the whole, relative to the largest part or whole
        in the batch. It is not relative to the whole alone: two logits can be close while their
        parts are large, and rounding errors grow with the parts.
        """
        found, largest = sum_and_largest(self.values)
        error = measure_error(
            found, self.total, max(largest, self.total.abs().max().item(), self.scale)
        )
        error = replace(error, dtype=self.dtype or self.total.dtype)
        return Certificate(f"sum over {self.level}s: {self.identity}", error, self.held, self.gap)

    @property
    def labels(self) -> list[str]:
        """Component labels, in the order of `values`."""
        return [component.label for component in self.components]

    def __len__(self) -> int:
        return len(self.components)

    def __iter__(self) -> Iterator[tuple[Component, Float[Tensor, "*batch"]]]:
        return iter(zip(self.components, self.values, strict=True))

    def __getitem__(self, component: str | Component) -> Float[Tensor, "*batch"]:
        """[*batch], the values of one component, by label; `values` has the rows by number.

        Raises:
            DataError: if there is no such component; the message names the nearest.
        """
        if not isinstance(component, str | Component):
            raise DataError(
                f"a component is a label such as {self.labels[0]!r}, not {component!r}: "
                "rows by number are in `values`"
            )
        return self.values[find_components([component], self.components)[0]]

    def select(
        self, index: SupportsIndex | None = None, /, **named: SupportsIndex
    ) -> "Contributions":
        """The result for one prompt, answer, position or key, without that dimension.

        Args:
            index: The index along the first of `dims`, from the end if negative.
            named: The index along a dimension, by its name: `select(prompt=0, answer=1)`.

        Raises:
            DataError: if there is no such dimension or index.
        """
        chosen = named if index is None else {(self.dims or ("prompt",))[0]: index, **named}
        result = self
        for dim, number in chosen.items():
            result = result._selected(dim, number)
        return result

    def _selected(self, dim: str, number: SupportsIndex) -> "Contributions":
        if dim not in self.dims:
            there = ", ".join(self.dims) or "none: this is one prompt's result already"
            raise DataError(f"there is no dimension {dim!r} to select from: there are {there}")
        axis = self.dims.index(dim)
        if dim == "key" and self.keys:
            n_pos = max(map(len, self.prompts), default=max(self.keys) + 1)
            row = read_key_position(number, n_pos, self.keys)
        else:
            row = read_number(number, self.total.shape[axis], dim)
        chosen: dict[str, Any] = {
            "values": self.values.select(axis + 1, row),
            "total": self.total.select(axis, row),
            "dims": self.dims[:axis] + self.dims[axis + 1 :],
        }
        one = slice(row, row + 1)
        if dim == "prompt":
            chosen |= {"of": self.of[one], "prompts": self.prompts[one]}
            chosen |= {"answers": self.answers[one]}
        elif dim == "answer":
            chosen |= {"of": tuple(names[row] for names in self.answers), "answers": ()}
        elif self.of:
            which = self.keys[row] if dim == "key" and self.keys else row
            chosen |= {"of": tuple(f"{what}, {dim} {which}" for what in self.of)}
        if dim == "key":
            chosen |= {"keys": ()}
        return replace(self, **chosen)

    def mean(self, dim: str = "prompt") -> "Contributions":
        """The mean over a dimension, by default over prompts.

        Raises:
            DataError: if there is no such dimension.
        """
        if dim not in self.dims:
            raise DataError(
                f"there is no dimension {dim!r} to average over: there are "
                f"{', '.join(self.dims) or 'none'}"
            )
        axis = self.dims.index(dim)
        n, dims = self.total.shape[axis], self.dims[:axis] + self.dims[axis + 1 :]
        over: dict[str, Any] = {}
        if dim == "prompt":
            over = {"of": (f"mean over {n} prompts",), "prompts": ()}
            columns = [" or ".join(dict.fromkeys(each)) for each in zip(*self.answers, strict=True)]
            over |= {"answers": (tuple(columns),) if columns else ()}
        elif dim == "answer":
            over = {"of": tuple(f"mean of {', '.join(names)}" for names in self.answers)}
            over |= {"answers": ()}
        elif dim == "key":
            over = {"keys": ()}
        return replace(
            self, values=self.values.mean(axis + 1), total=self.total.mean(axis), dims=dims,
            dtype=self.dtype or self.total.dtype, scale=self._size(), **over,
        )  # fmt: skip

    def _size(self) -> float:
        sizes = [x.abs().max().item() for x in (self.values, self.total) if x.numel()]
        return max([self.scale, *sizes])

    def __sub__(self, other: object) -> "Contributions":
        """The difference of two results with the same labels, dimensions and unit, part by part.

        Raises:
            DataError: if labels, dimensions or units differ.
        """
        if not isinstance(other, Contributions):
            return NotImplemented
        if self.labels != other.labels:
            apart = sorted(set(self.labels) ^ set(other.labels)) or ["their order"]
            raise DataError(f"results of different parts cannot be subtracted: {apart[0]}")
        if self.values.shape != other.values.shape or self.dims != other.dims:
            shapes = [dict(zip(r.dims, r.total.shape, strict=True)) for r in (self, other)]
            raise DataError(f"results of {shapes[0]} and {shapes[1]} cannot be subtracted")
        if self.keys != other.keys:
            raise DataError(
                f"results at the keys {list(self.keys)} and {list(other.keys)} cannot be subtracted"
            )
        if self.unit != other.unit:
            raise DataError(f"results in {self.unit} and {other.unit} cannot be subtracted")
        gaps = [gap for gap in (self.gap, other.gap) if gap is not None]
        return replace(
            self,
            values=self.values - other.values,
            total=self.total - other.total,
            of=_minus(self.of, other.of),
            answers=tuple(map(_minus, self.answers, other.answers)),
            prompts=self.prompts if self.prompts == other.prompts else (),
            identity=f"{self.identity}, minus the same of another result",
            held=tuple(dict.fromkeys((*self.held, *other.held))),
            gap=max(gaps, key=lambda gap: gap.relative, default=None),
            dtype=max(self.error, other.error, key=lambda error: error.tolerance).dtype,
            scale=max(self._size(), other._size()),
        )

    def of_kind(self, kind: str) -> Float[Tensor, "component *batch"]:
        """The values of one kind of component, e.g. all heads, layer by layer; no rows where the
        result has no component of that kind.

        Raises:
            DataError: if there is no such kind.
        """
        known = dict.fromkeys([*KINDS, *(component.kind for component in self.components)])
        if kind not in known:
            raise DataError(f"no kind {kind!r}{nearest(kind, known)}")
        rows = [i for i, component in enumerate(self.components) if component.kind == kind]
        return self.values[rows]

    def top(self, k: SupportsIndex = 10) -> pd.DataFrame:
        """The k components of largest absolute value: `component`, `value`, and `held` where
        something was held.

        Raises:
            DataError: for a batch, or if k is less than one.
        """
        if self.dims:
            raise DataError(
                f"the values have the dimensions {', '.join(self.dims)}: choose with select(...) "
                "or average with mean(...) first, then call top"
            )
        rows = self.values.abs().topk(read_top(k, len(self))).indices.tolist()
        frame = self.to_frame().iloc[rows]
        return frame[[c for c in frame if c in ("component", "value", "held")]].reset_index(
            drop=True
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per component: `component`, `kind`, `layer`, `index`, and a `value` column (or
        `value_0`, `value_1`, ... for a batch), in the unit of `values`; `pos` where parts have
        one, `held` where something was held for the numbers."""
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
        named = ["value"] if not self.dims else [f"value_{i}" for i in range(columns.shape[1])]
        return self._noted(pd.concat([frame, pd.DataFrame(columns, columns=named)], axis=1))

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.values.shape))
        return self._line(f"{self.level} level, values [{shape}]")


def _minus(these: tuple[str, ...], those: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"({a}) - ({b})" for a, b in zip(these, those, strict=False))


def largest_rows(frame: pd.DataFrame, column: str, k: Any) -> pd.DataFrame:
    """The k rows of largest absolute value in a column.

    Raises:
        DataError: if k is less than one.
    """
    order = frame[column].abs().to_numpy().argsort(kind="stable")[::-1]
    return frame.iloc[order[: read_top(k, len(frame))]].reset_index(drop=True)


def read_top(k: Any, n: int) -> int:
    """How many rows `top(k)` gives of n.

    Raises:
        DataError: if k is less than one.
    """
    number = whole_number(k, "the number of rows")
    if number < 1:
        raise DataError(f"top({number}): give how many rows to show, at least 1")
    return min(number, n)


def load_result(path: str | os.PathLike[str]) -> Any:
    """A result that `.save(path)` wrote.

    Args:
        path: The file to read.

    Returns:
        The result, of the same class, on the CPU: values, total, error, gap, prompts.

    Raises:
        DataError: if the file is not a saved result, or is damaged.

    Source:
        Ours: safetensors with a JSON header; nothing in the file is executed.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "dla.safetensors"
        >>> _ = lf.attribute_logits(free, "for i in", " range").save(path)
        >>> lf.load_result(path).verify().prompts[0][-1]
        ' in'
    """
    return read_saved(path, Result)
