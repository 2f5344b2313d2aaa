"""Attribution over more text than fits into memory."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import (
    Component,
    Contributions,
    Level,
    find_components,
)
from lnfree_interp.analysis.logits import attribute_next_tokens
from lnfree_interp.analysis.questions import split
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import MeasuredError


@dataclass(frozen=True, eq=False, repr=False)
class MeanContributions:
    """Attribution over many tokens, accumulated without keeping them.

    Attributes:
        mean: [component], mean contribution to the logit of the true next token, in logits.
        mean_abs: [component], mean absolute contribution, in logits.
        std: [component], standard deviation over tokens, in logits.
        components: What each row is.
        total: Mean logit of the true next token.
        count: Tokens that were predicted, rows x (pos - 1).
        level: How finely the model was taken apart.
        error: The largest error of any batch.
        frozen_scale: As in `Contributions`.
    """

    mean: Float[Tensor, " component"]
    mean_abs: Float[Tensor, " component"]
    std: Float[Tensor, " component"]
    components: tuple[Component, ...]
    total: float
    count: int
    level: Level
    error: MeasuredError
    frozen_scale: bool = False

    def as_contributions(self) -> Contributions:
        """The means as a labelled sum."""
        total = torch.tensor(self.total, dtype=torch.float64)
        return Contributions(
            self.mean, self.components, total, self.level,
            of=(f"the next token, mean of {self.count:,}",), frozen_scale=self.frozen_scale,
            dtype=self.error.dtype,
        )  # fmt: skip

    def verify(self, tolerance: float | None = None) -> "MeanContributions":
        """Return self if the means add up to the mean logit; each batch has been verified too.

        Args:
            tolerance: As in `Contributions.verify`.

        Raises:
            InexactError: if they do not.
        """
        self.as_contributions().verify(tolerance)
        return self

    def __getitem__(self, component: str | Component) -> float:
        """One component's mean contribution, by label.

        Raises:
            DataError: if there is none; it names the nearest.
        """
        return self.as_contributions()[component].item()

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k components of largest absolute mean: `component`, `value`, `mean_abs`, `std`.

        Raises:
            DataError: if k is less than one.
        """
        found = self.as_contributions().top(k)
        rows = find_components(found["component"].tolist(), self.components)
        return found.assign(mean_abs=self.mean_abs[rows].tolist(), std=self.std[rows].tolist())

    def __repr__(self) -> str:
        return (
            f"MeanContributions({self.level} level, {len(self.components)} components, mean of "
            f"{self.count:,} tokens, error {self.error})"
        )


def mean_next_token_attribution(
    model: HookedTransformer,
    blocks: Int[Tensor, "blocks pos"] | Iterable[Int[Tensor, "_ pos"]],
    *,
    by: Level = "head",
    biases: bool = False,
    frozen_scale: bool = False,
    batch: int = 8,
    progress: bool = False,
) -> MeanContributions:
    """Attribution of the true next token over as much text as there is, in the memory of a batch.

    Every batch is verified on its way; sums are kept in float64.

    Args:
        model: As for `attribute_logits`.
        blocks: Token ids [blocks, pos]; or batches of them, from anywhere.
        by: As for `attribute_logits`; not `"source"`, whose parts differ from prompt to prompt.
        biases: As for `attribute_logits`.
        frozen_scale: As for `attribute_logits`.
        batch: Rows at once, where `blocks` is one tensor.
        progress: Whether to show a progress bar.

    Returns:
        Mean, mean absolute value and standard deviation over tokens, each [component], in logits.

    Raises:
        InexactError: as `attribute_logits`, and if the parts of a batch do not add up.
        DataError: as `attribute_next_tokens`; for `by="source"`, an empty batch or no text.
        UnsupportedModelError: as `attribute_logits`.

    Source:
        Ours: `attribute_next_tokens`, averaged, so that it runs over more text than fits into
        memory.

    Examples:
        >>> mean = lf.mean_next_token_attribution(free, tokens, by="block").verify()
        >>> mean.count, mean.mean.shape
        (252, torch.Size([11]))
        >>> list(mean.top(3).columns)
        ['component', 'value', 'mean_abs', 'std']
    """
    if by == "source":
        raise DataError("the mean over positions of a source token says nothing: choose by='head'")
    chunks = split(blocks, batch) if isinstance(blocks, Tensor) else blocks
    sums: Tensor | None = None
    total, count, worst, last = 0.0, 0, None, None
    for tokens in tqdm(chunks, desc="attribution", unit="batch", disable=not progress):
        part = attribute_next_tokens(
            model, tokens, by=by, biases=biases, frozen_scale=frozen_scale
        ).verify()
        values = part.values.flatten(1)
        moments = torch.stack(
            [
                values.sum(1, dtype=torch.float64),
                values.abs().sum(1, dtype=torch.float64),
                values.square().sum(1, dtype=torch.float64),
            ]
        )
        sums = moments if sums is None else sums + moments
        total += part.total.double().sum().item()
        count += values.shape[1]
        if worst is None or not part.error.relative <= worst.relative:
            worst = part.error
        last = part
    if sums is None or last is None or worst is None:
        raise DataError("there is no text")
    mean, mean_abs, mean_square = sums / count
    std = (mean_square - mean.square()).clamp(min=0).sqrt()
    return MeanContributions(
        mean, mean_abs, std, last.components, total / count, count, by, worst, last.frozen_scale
    )
