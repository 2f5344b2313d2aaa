"""Attribution averaged over more text than fits into memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsIndex

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lnfree_interp.analysis.attribute import attribute_next_tokens
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.components import Component, find_components
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.prompts import batches
from lnfree_interp.analysis.results import Contributions, Result
from lnfree_interp.analysis.trace import trace
from lnfree_interp.analysis.view import Model
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import MeasuredError

_AT_ONCE = 1024  # components that are in float64 at once


@dataclass(frozen=True, eq=False, repr=False)
class MeanContributions(Result):
    """Attribution over many tokens, accumulated without keeping them.

    Attributes:
        mean: [component], mean contribution to the logit of the true next token, in logits.
        mean_abs: [component], mean absolute contribution, in logits.
        std: [component], standard deviation over tokens, in logits.
        components: What each row is.
        total: The mean logit of the true next token.
        count: The number of tokens that were predicted, sequences x (pos - 1).
        level: How finely the model was taken apart.
        worst: The largest error of any batch.
        held: What is not affine and was held.
        gap: Where something was held, the largest gap of any batch.
    """

    mean: Float[Tensor, " component"]
    mean_abs: Float[Tensor, " component"]
    std: Float[Tensor, " component"]
    components: tuple[Component, ...]
    total: float
    count: int
    level: str
    worst: MeasuredError
    held: tuple[str, ...] = ()
    gap: MeasuredError | None = None

    def as_contributions(self) -> Contributions:
        """The means as a labelled sum."""
        total = torch.tensor(self.total, dtype=torch.float64)
        return Contributions(
            self.mean, self.components, total, self.level,
            of=(f"the next token, mean of {self.count:,}",), held=self.held, gap=self.gap,
            dtype=self.worst.dtype,
        )  # fmt: skip

    @property
    def certificate(self) -> Certificate:
        """The means add up to the mean logit; each batch was verified as it was computed."""
        return self.as_contributions().certificate

    def to_frame(self) -> pd.DataFrame:
        """The table of `Contributions.to_frame`, with `mean_abs` and `std`, in logits."""
        frame = self.as_contributions().to_frame()
        return frame.assign(mean_abs=self.mean_abs.tolist(), std=self.std.tolist())

    def __getitem__(self, component: str | Component) -> float:
        """One component's mean contribution, by label.

        Raises:
            DataError: if there is no such component; the message names the nearest.
        """
        return self.as_contributions()[component].item()

    def top(self, k: SupportsIndex = 10) -> pd.DataFrame:
        """The k components of largest absolute mean: `component`, `value`, `mean_abs`, `std`.

        Raises:
            DataError: if k is less than one.
        """
        found = self.as_contributions().top(k)
        rows = find_components(found["component"].tolist(), self.components)
        return found.assign(mean_abs=self.mean_abs[rows].tolist(), std=self.std[rows].tolist())

    def __repr__(self) -> str:
        return self._line(
            f"{self.level} level, {len(self.components)} components, mean of {self.count:,} "
            f"tokens, largest error of a batch {self.worst}"
        )


@torch.no_grad()
def mean_next_token_attribution(
    model: Model,
    sequences: Int[Tensor, "sequence pos"] | Iterable[Int[Tensor, "_ pos"]],
    *,
    by: str | Level = "head",
    biases: bool = False,
    hold: bool = False,
    batch: int = 8,
    progress: bool = False,
) -> MeanContributions:
    """Attribution of the true next token, averaged over any amount of text, batch by batch.

    Every batch is verified as it is computed; sums are kept in float64.

    Args:
        model: A `HookedTransformer` in any form, or a `TransformerBridge`.
        sequences: Token ids [sequence, pos] without padding; or any iterable of such batches.
        by: How finely the model is taken apart, as in `attribute_logits`; not `"source"`, whose
            parts differ from prompt to prompt.
        biases: Whether each head's value bias is a part of its own, by head and by neuron.
        hold: Whether a live final norm's scale and a soft cap's slope are held.
        batch: How many sequences run at once, where `sequences` is one tensor.
        progress: Whether to show a progress bar.

    Returns:
        Mean, mean absolute value and standard deviation over tokens, each [component], in logits.

    Raises:
        InexactError: if the final norm is live and `hold` is False, or the parts of a batch do not
            add up.
        DataError: if the model cannot read the sequences, or they have no next token; for
            `by="source"`, an empty batch or no text.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Ours: `attribute_next_tokens`, averaged, so that it runs over more text than fits into
        memory.

    Examples:
        >>> mean = lf.mean_next_token_attribution(free, tokens, by="sublayer").verify()
        >>> mean.count, mean.mean.shape
        (252, torch.Size([11]))
        >>> list(mean.top(3).columns)
        ['component', 'value', 'mean_abs', 'std']
    """
    chosen = level(by)
    if chosen.name == "source":
        raise DataError(
            "by='source' has a part for each position, and a mean over sequences says nothing "
            "about those: choose by='head'"
        )
    chunks = batches(sequences, batch) if isinstance(sequences, Tensor) else sequences
    sums: Tensor | None = None
    total, count, last = 0.0, 0, None
    errors: list[MeasuredError] = []
    gaps: list[MeasuredError] = []
    for tokens in tqdm(chunks, desc="attribution", unit="batch", disable=not progress):
        rows = trace(model, tokens, attention_mask=torch.ones_like(tokens), hold=hold, keep="asked")
        last = attribute_next_tokens(rows, by=chosen, biases=biases)
        errors.append(last.certificate.require().error)
        gaps += [] if last.gap is None else [last.gap]
        values = last.values.flatten(1)
        # In float64 before they are squared; some components at a time, which bounds the copies.
        pieces = (some.double() for some in values.split(_AT_ONCE))
        moments = torch.cat(
            [torch.stack([x.sum(1), x.abs().sum(1), x.square().sum(1)]) for x in pieces], dim=1
        )
        sums = moments if sums is None else sums + moments
        total += last.total.double().sum().item()
        count += values.shape[1]
    if sums is None or last is None:
        raise DataError("there is no text: give at least one sequence")
    mean, mean_abs, mean_square = sums / count
    std = (mean_square - mean.square()).clamp(min=0).sqrt()
    worst = max(errors, key=lambda error: error.relative)
    gap = max(gaps, key=lambda error: error.relative, default=None)
    return MeanContributions(
        mean, mean_abs, std, last.components, total / count, count, last.level, worst, last.held,
        gap,
    )  # fmt: skip
