"""What a pass over a text says about a model: calibration, residual norms, attention sinks."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lnfree_interp.evaluation.text_pass import SINK, TokenMeasures

BINS = 15
"""Bins of the calibration error."""


@dataclass(frozen=True)
class Distribution:
    """The predicted distribution, over all tokens of a text."""

    entropy: float
    """Mean, in nats per token."""
    calibration_error: float
    """Expected calibration error of the most likely token."""
    divergence: float | None
    """Mean Jensen-Shannon divergence to the original, in nats per token."""


def distribution(measures: TokenMeasures) -> Distribution:
    """Entropy, calibration and distance to the original."""
    divergence = measures.divergence
    return Distribution(
        measures.entropy.double().mean().item(),
        calibration_error(measures.confidence, measures.correct),
        None if divergence is None else divergence.double().mean().item(),
    )


def calibration_error(
    confidence: Float[Tensor, "*token"], correct: Bool[Tensor, "*token"], bins: int = BINS
) -> float:
    """Expected calibration error (Guo et al., 1706.04599), with bins of equal width.

    Args:
        confidence: Probability of the most likely token.
        correct: Whether it was the true one.
        bins: How many.

    Returns:
        sum over bins of (share of tokens) |accuracy - mean confidence|.
    """
    flat = confidence.flatten().double()
    index = (flat * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.index_add_(0, index, correct.flatten().double() - flat)
    return gap.abs().sum().item() / flat.numel()


@dataclass(frozen=True, eq=False)
class ResidualNorms:
    """Norms of the residual stream, the first position apart: it is where outliers live.

    One number per place: before each block, and after the last. A norm is a fact about the basis of
    the stream (see `gauge_check`): compare a model with its fine-tuned self, not with another.
    """

    first_median: Float[Tensor, " place"]
    first_max: Float[Tensor, " place"]
    others_median: Float[Tensor, " place"]
    others_max: Float[Tensor, " place"]


def residual_norms(measures: TokenMeasures) -> ResidualNorms:
    """Largest and median norm per place."""
    norms = measures.norms.double().numpy()
    first, others = norms[:, :, :1], norms[:, :, 1:]
    found = []
    for part in (first, others):
        flat = part.reshape(len(norms), -1)
        found += [np.median(flat, axis=1), flat.max(axis=1)]
    return ResidualNorms(*(torch.from_numpy(x) for x in found))


@dataclass(frozen=True, eq=False)
class Sinks:
    """How much heads look at the first token."""

    query_rate: float
    """Share of (layer, head, query) whose attention to it is above 0.3, the first query, which has
    no choice, among them (2507.02559's code)."""
    head_rate: float
    """Share of (sequence, layer, head) whose attention to it, averaged over queries, is above 0.3
    (2410.10781)."""
    by_head: Float[Tensor, "layer head"]
    """Mean attention to the first token."""


def sinks(measures: TokenMeasures) -> Sinks:
    """Both published rates."""
    weights = measures.sink_weights.double()
    return Sinks(
        measures.sink_queries.double().mean().item(),
        (weights > SINK).double().mean().item(),
        weights.mean(0),
    )
