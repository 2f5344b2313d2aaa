"""Summaries of a pass over a text: calibration, residual norms, attention sinks."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lnfree_interp.evaluation.text_pass import SINK, TokenMeasures

BINS = 15
"""The number of bins of the calibration error."""


@dataclass(frozen=True)
class Distribution:
    """Means of the predicted distribution over all tokens of a text."""

    entropy: float
    """The mean entropy, in nats per token."""
    calibration_error: float
    """The expected calibration error of the most likely token."""
    divergence: float | None
    """The mean Jensen-Shannon divergence from the original, in nats per token; None without an
    original."""
    kl: float | None
    """The mean KL divergence from the original, in nats per token."""
    kl_median: float | None
    """Its median over tokens."""
    agreement: float | None
    """The share of tokens whose likeliest next token is the original's."""


def distribution(measures: TokenMeasures) -> Distribution:
    """Entropy, calibration error and divergence from the original, as means over tokens."""
    divergence, kl, agrees = measures.divergence, measures.kl, measures.agrees
    return Distribution(
        measures.entropy.double().mean().item(),
        calibration_error(measures.confidence, measures.correct),
        None if divergence is None else divergence.double().mean().item(),
        None if kl is None else kl.double().mean().item(),
        None if kl is None else float(np.median(kl.double().nan_to_num(torch.inf).numpy())),
        None if agrees is None else agrees.double().mean().item(),
    )


def calibration_error(
    confidence: Float[Tensor, "*token"], correct: Bool[Tensor, "*token"], bins: int = BINS
) -> float:
    """Expected calibration error (Guo et al., 1706.04599), with bins of equal width.

    Args:
        confidence: The probability of the most likely token.
        correct: Whether the most likely token was the true one.
        bins: How many bins there are.

    Returns:
        The sum over bins of (share of tokens) |accuracy - mean confidence|.
    """
    flat = confidence.flatten().double()
    index = (flat * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64)
    gap.index_add_(0, index, correct.flatten().double() - flat)
    return gap.abs().sum().item() / flat.numel()


@dataclass(frozen=True, eq=False)
class ResidualNorms:
    """Norms of the residual stream, with the first position, where outliers are, apart.

    There is one number per place, before each block and after the last. A norm depends on the basis
    of the stream (see `gauge_check`), so compare a model only with its own fine-tuning.
    """

    first_median: Float[Tensor, " place"]
    first_max: Float[Tensor, " place"]
    others_median: Float[Tensor, " place"]
    others_max: Float[Tensor, " place"]


def residual_norms(measures: TokenMeasures) -> ResidualNorms:
    """The largest and the median norm per place."""
    norms = measures.norms.double().nan_to_num(torch.inf).numpy()  # what overflows is large
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
    """The share of (layer, head, query) whose attention to the first token is above 0.3, including
    the first query, which sees no other token (as in 2507.02559's code)."""
    head_rate: float
    """The share of (sequence, layer, head) whose attention to the first token, averaged over
    queries, is above 0.3 (2410.10781)."""
    by_head: Float[Tensor, "layer head"]
    """The mean attention to the first token."""


def sinks(measures: TokenMeasures) -> Sinks:
    """The two published sink rates, and the attention to the first token by head."""
    weights = measures.sink_weights.double()
    return Sinks(
        measures.sink_queries.double().mean().item(),
        (weights > SINK).double().mean().item(),
        weights.mean(0),
    )
