"""Results of an evaluation: several models side by side, as a table, a frame or JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.evaluation.confidence_neurons import NeuronAblation
from lnfree_interp.evaluation.direct_effects import DirectEffects
from lnfree_interp.evaluation.loss import CrossEntropy
from lnfree_interp.evaluation.patching import Patching
from lnfree_interp.evaluation.summaries import Distribution, ResidualNorms, Sinks
from lnfree_interp.tables import Table

Pairs = Literal["text", "ioi"]


@dataclass(frozen=True, eq=False)
class ModelEvaluation:
    """The results for one model."""

    cross_entropy: CrossEntropy
    """Losses [sequence, target], in nats per token."""
    distribution: Distribution
    """Entropy, calibration error and divergence from the original, as means over tokens."""
    residual_norms: ResidualNorms
    """Norms [place], before each block and after the last."""
    sinks: Sinks
    """Attention to the first token, [layer, head] and as two rates."""
    direct_effects: DirectEffects | None = None
    """Direct effects [layer, head, target], in logits; None if not asked for, or if the stream is
    not the plain sum of its parts."""
    confidence_neurons: NeuronAblation | None = None
    """The ablation of neurons of the last MLP, in nats; None as for `direct_effects`, or without
    MLPs."""
    patching: Patching | None = None
    """Patching [layer, pos, prompt], in logits; None if not asked for, or the text is too short."""
    loss_without: Float[Tensor, " layer"] | None = None
    """What cross-entropy gains when a block is left out, in nats per token; None if not asked
    for."""
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores by task and metric."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Several models side by side, on one text.

    Attributes:
        models: The results by the models' names, in the order given.
        original: The name of the model that the others are compared with.
        threshold: The increase of loss, in nats, above which a token counts as worse.
        text: The name of the text.
        tokens: How many tokens were predicted.
        bos_policy: How each model's tasks use the beginning-of-sequence token, in words; None
            without tasks.
        pairs_of: What attribution patching was measured on (see `evaluate`).
    """

    models: Mapping[str, ModelEvaluation]
    original: str | None
    threshold: float
    text: str
    tokens: int
    bos_policy: str | None = None
    pairs_of: Pairs = "text"

    def to_frame(self) -> pd.DataFrame:
        """One row per measure, one column per model; measures that were not asked for are left out.

        Cross-entropies, entropies and divergences are in nats per token.
        """
        columns = {name: self._figures(name) for name in self.models}
        asked = [
            label for label in dict.fromkeys(key for column in columns.values() for key in column)
            if any(column.get(label) is not None for column in columns.values())
        ]  # fmt: skip
        return pd.DataFrame(
            {name: [column.get(label) for label in asked] for name, column in columns.items()},
            index=asked, dtype=float,
        )  # fmt: skip

    def table(self) -> Table:
        """The same as a table of text, for terminal and report."""
        columns = [self._figures(name) for name in self.models]
        rows = [
            [label, *(_shown(label, column.get(label)) for column in columns)]
            for label in map(str, self.to_frame().index)
        ]
        return Table([f"{self.text}, {self.tokens:,} tokens", *self.models], rows)

    def _figures(self, name: str) -> dict[str, float | None]:
        """The measures of one model; None if one was not asked for, or the model does not allow
        it."""
        model, first = self.models[name], None
        loss, norms, about = model.cross_entropy, model.residual_norms, model.distribution
        if self.original is not None and name != self.original:
            first = self.models[self.original].cross_entropy
        not_finite = max(x.cross_entropy.share_not_finite for x in self.models.values())
        figures: dict[str, float | None] = {
            "cross-entropy, mean": loss.mean,
            "median": loss.median,
            "mean without 1 % at either end": loss.trimmed_mean,
            "99.9th percentile": loss.p99_9,
            "largest": loss.maximum,
            "tokens without a finite loss": loss.share_not_finite if not_finite else None,
            "minus original": None if first is None else loss.mean - first.mean,
            f"tokens worse by more than {self.threshold:g}": (
                None if first is None else loss.share_above(first, self.threshold)
            ),
            "entropy": about.entropy,
            "calibration error": about.calibration_error,
            "Jensen-Shannon divergence": None if first is None else about.divergence,
            "KL divergence from the original, mean": None if first is None else about.kl,
            "KL divergence from the original, median": None if first is None else about.kl_median,
            "the original's likeliest token": None if first is None else about.agreement,
            "largest residual norm, position 0": norms.first_max.max().item(),
            "largest residual norm, others": norms.others_max.max().item(),
            "median residual norm, others, last": norms.others_median[-1].item(),
            "sink rate, by query": model.sinks.query_rate,
            "sink rate, by head": model.sinks.head_rate,
        }
        if model.direct_effects is not None:
            figures["attribution error per head (NMAE)"] = model.direct_effects.nmae
            figures["attribution error pooled (NMAE)"] = model.direct_effects.pooled_nmae
        if model.patching is not None:
            label = f"attribution patching error, {self.pairs_of}"
            figures[label] = model.patching.error
            figures[f"{label}, standard error"] = model.patching.standard_error
        if model.confidence_neurons is not None:
            ablation = model.confidence_neurons
            figures["entropy without confidence neurons, change"] = ablation.total_entropy_change
        if model.loss_without is not None:
            changes = model.loss_without.nan_to_num(math.inf)
            figures["loss without the least needed block, change"] = changes.min().item()
        for task, scores in model.tasks.items():
            for metric, value in scores.items():
                figures[f"{task}, {metric}"] = value
        return figures

    def to_json(self) -> str:
        """Every measure, and the curves by position, by layer and by head."""
        plain: dict[str, Any] = {
            "text": self.text,
            "tokens": self.tokens,
            "original": self.original,
            "threshold_nats": self.threshold,
            "bos_policy_of_tasks": self.bos_policy,
            "patching_pairs_of": self.pairs_of,
            "models": {},
        }
        for name, model in self.models.items():
            norms = model.residual_norms
            found: dict[str, Any] = {
                "figures": {k: v for k, v in self._figures(name).items() if v is not None},
                "cross_entropy_by_position": model.cross_entropy.by_position.tolist(),
                "residual_norms": {
                    key: getattr(norms, key).tolist()
                    for key in ("first_median", "first_max", "others_median", "others_max")
                },
                "attention_to_first": model.sinks.by_head.tolist(),
            }
            if model.direct_effects is not None:
                found["nmae_per_head"] = model.direct_effects.nmae_per_head.tolist()
            if model.patching is not None:
                found["patching_error_by_layer"] = model.patching.error_by_layer.tolist()
                found["patching_correlation"] = model.patching.correlation
            if model.loss_without is not None:
                found["loss_without_block"] = model.loss_without.tolist()
            if (ablation := model.confidence_neurons) is not None:
                found["confidence_neurons"] = {
                    "neurons": list(ablation.neurons),
                    "median_loss_change": ablation.median_loss_change.tolist(),
                    "median_entropy_change": ablation.median_entropy_change.tolist(),
                }
            plain["models"][name] = found
        return json.dumps(_finite(plain), indent=1, allow_nan=False)

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {x.cross_entropy.mean:.4f}" for name, x in self.models.items())
        return f"Evaluation({self.text}, {self.tokens:,} tokens; cross-entropy {means})"


_SHARES = (
    "tokens worse", "tokens without", "the original's likeliest", "sink rate", "attribution error",
    "entropy without",
)  # fmt: skip


def _shown(label: str, value: float | None) -> str:
    if value is None:
        return "-"
    if label.startswith(_SHARES):
        return f"{100 * value:.3g} %"
    if label == "minus original" or label.endswith("block, change"):
        return f"{value:+.4f}"
    return f"{value:.1f}" if "residual norm" in label else f"{value:.4f}"


def _finite(plain: Any) -> Any:
    """The same with None for nan and infinity, which JSON does not have."""
    if isinstance(plain, dict):
        return {key: _finite(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
