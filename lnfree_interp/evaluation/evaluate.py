"""Is an LN-free model still its original? Everything that was ever asked about it, in one table."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.questions import read_blocks
from lnfree_interp.data.named import spread
from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.evaluation.confidence_neurons import (
    NeuronAblation,
    ablate_neurons,
    find_confidence_neurons,
)
from lnfree_interp.evaluation.direct_effects import DirectEffects, direct_effects
from lnfree_interp.evaluation.loss import CrossEntropy
from lnfree_interp.evaluation.patching import (
    Patching,
    corrupted_pairs,
    ioi_pairs,
    patch_residual,
)
from lnfree_interp.evaluation.summaries import (
    Distribution,
    ResidualNorms,
    Sinks,
    distribution,
    residual_norms,
    sinks,
)
from lnfree_interp.evaluation.tasks import bos_policy, open_tasks, score_tasks
from lnfree_interp.evaluation.text_pass import (
    Precision,
    fitting_batch,
    measure_text,
    read_for_all,
)
from lnfree_interp.tables import Table

SAMPLE = 16
"""Blocks on which effects of single heads and neurons are measured."""


@dataclass(frozen=True, eq=False)
class ModelEvaluation:
    """What was found about one model."""

    cross_entropy: CrossEntropy
    """[block, target], in nats per token."""
    distribution: Distribution
    """Entropy, calibration error and divergence from the original, means over tokens."""
    residual_norms: ResidualNorms
    """[place]: before each block and after the last."""
    sinks: Sinks
    """Attention to the first token, [layer, head] and as two rates."""
    direct_effects: DirectEffects | None = None
    """[layer, head, target], in logits; None if not asked for, or the stream has other parts."""
    confidence_neurons: NeuronAblation | None = None
    """Of the last MLP, in nats; None as above, or without MLPs."""
    patching: Patching | None = None
    """[layer, pos, prompt], in logits; None if not asked for, or the text is too short."""
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores by task and metric."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Several models side by side, on one text.

    Attributes:
        models: By name, in the order given.
        original: The name of the one that the others are compared with.
        threshold: In nats, for the share of tokens that got worse by more.
        text: What it was, in words.
        tokens: How many were predicted.
        bos_policy: Of the tasks, in words; None without tasks.
    """

    models: Mapping[str, ModelEvaluation]
    original: str | None
    threshold: float
    text: str
    tokens: int
    bos_policy: str | None = None

    def to_frame(self) -> pd.DataFrame:
        """One row per figure, one column per model; figures that were not asked for are left out.

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
        """The same as text, for terminal and report."""
        columns = [self._figures(name) for name in self.models]
        rows = [
            [label, *(_shown(label, column.get(label)) for column in columns)]
            for label in map(str, self.to_frame().index)
        ]
        return Table([f"{self.text}, {self.tokens:,} tokens", *self.models], rows)

    def _figures(self, name: str) -> dict[str, float | None]:
        """None: was not asked for, or cannot be had on this model."""
        model, first = self.models[name], None
        loss, norms = model.cross_entropy, model.residual_norms
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
            "entropy": model.distribution.entropy,
            "calibration error": model.distribution.calibration_error,
            "Jensen-Shannon divergence": (None if first is None else model.distribution.divergence),
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
            figures["attribution patching error"] = model.patching.error
            figures["attribution patching error, standard error"] = model.patching.standard_error
        if model.confidence_neurons is not None:
            ablation = model.confidence_neurons
            figures["entropy without confidence neurons, change"] = ablation.total_entropy_change
        for task, scores in model.tasks.items():
            for metric, value in scores.items():
                figures[f"{task}, {metric}"] = value
        return figures

    def to_json(self) -> str:
        """Every figure, and what is a curve: by position, by layer, by head."""
        plain: dict[str, Any] = {
            "text": self.text,
            "tokens": self.tokens,
            "original": self.original,
            "threshold_nats": self.threshold,
            "bos_policy_of_tasks": self.bos_policy,
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


_SHARES = ("tokens worse", "tokens without", "sink rate", "attribution error", "entropy without")


def _shown(label: str, value: float | None) -> str:
    if value is None:
        return "-"
    if label.startswith(_SHARES):
        return f"{100 * value:.3g} %"
    if label == "minus original":
        return f"{value:+.4f}"
    return f"{value:.1f}" if "residual norm" in label else f"{value:.4f}"


def _finite(plain: Any) -> Any:
    """For JSON, which has no nan and no infinity."""
    if isinstance(plain, dict):
        return {key: _finite(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def evaluate(
    models: Mapping[str, HookedTransformer] | HookedTransformer,
    tokens: Int[Tensor, "blocks pos"],
    *,
    original: str | None = None,
    threshold: float = 3.5,
    effects: bool = True,
    neurons: int = 3,
    pairs: int = 16,
    pairs_of: Literal["text", "ioi"] = "text",
    tasks: str | Sequence[str] = (),
    include: Path | None = None,
    limit: int | None = None,
    text: str = "text",
    batch: int | None = None,
    precision: Precision = "float32",
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Evaluate several models on one text.

    Cross-entropy with its tail, entropy, calibration, distance to the original, residual norms,
    attention sinks, and what attribution misses; tasks on top. A figure that cannot be had on a
    model is left out of its column.

    Args:
        models: By name; or one.
        tokens: [blocks, pos], such as `pack(...)` or `open_blocks(...).take(n)`.
        original: The name of the one that the others are compared with. Default: no comparison.
        threshold: In nats: how much worse a token must get to be counted.
        effects: Measure every head's direct effect against its attribution, on 16 blocks. This and
            the next are left out for a model with norms after its sublayers.
        neurons: How many confidence neurons to find and ablate, on the same blocks; those of the
            original, where it is as deep and wide. 0: none.
        pairs: Prompts for attribution patching against activation patching. 0: none.
        pairs_of: `"text"`: see `corrupted_pairs`; `"ioi"`: see `ioi_pairs`, as published, for
            models of English.
        tasks: Of the lm-evaluation-harness, such as `"hellaswag"`.
        include: Folder with task files of one's own.
        limit: Examples per task.
        text: What the text is, for table and JSON.
        batch: Blocks per forward pass. Default: what fits.
        precision: Of matrix products in the pass over the text.
        seed: Of the corrupted prompts.
        progress: Whether to show progress bars.

    Returns:
        An `Evaluation`; `.to_frame()` and `.table()` have one column per model, losses in nats per
            token, `.models[name]` has what is a curve, and `.to_json()` both.

    Raises:
        DataError: if a model cannot read the text, models cannot be compared, or there is no such
            original, neuron or task.
        UnsupportedModelError: if tasks are asked for and the harness is not installed or a task
            generates text.

    Source:
        arXiv 2507.02559 for the comparison and its figures; calibration: arXiv 1706.04599; sink
        rate by head: arXiv 2410.10781. Trimmed mean, quantiles and divergence beside the mean are
        ours: a few tokens can wreck it.

    Examples:
        >>> models = {"live": model, "LN-free": free}
        >>> found = lf.evaluate(models, tokens, original="live", effects=False, neurons=0, pairs=0)
        >>> found.to_frame().shape
        (15, 2)
        >>> found.models["LN-free"].sinks.by_head.shape
        torch.Size([4, 6])
    """
    if isinstance(models, HookedTransformer):
        models = {"model": models}
    tokens = read_for_all(models, tokens, original, precision)
    if min(neurons, pairs) < 0 or not threshold >= 0:
        raise DataError("neurons, pairs and the threshold in nats cannot be negative")
    sample = spread(tokens, SAMPLE)
    # Whatever can be refused is, before the long part.
    chosen = {name: _chosen(model, neurons) for name, model in models.items()}
    if original is not None:
        theirs = models[original]
        same = [name for name, model in models.items() if _width(model) == _width(theirs)]
        chosen |= dict.fromkeys(same, chosen[original])
    if effects:
        read_blocks(next(iter(models.values())), sample)  # a row of padding would be no text
    corrupted = None
    if pairs and pairs_of == "ioi":
        corrupted = _indirect_objects(models, pairs, seed)
    elif pairs:
        corrupted = _corrupted(sample, pairs, seed)
    scores: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    if tasks:
        names, manager = open_tasks(tasks, include, limit)
        scores = {
            name: score_tasks(model, names, manager, limit=limit) for name, model in models.items()
        }
    measured = measure_text(
        models, tokens, original, batch=batch, precision=precision, progress=progress
    )
    found = {}
    for name, model in models.items():
        inner = min(batch or 4, 4, fitting_batch(model, tokens.shape[1]))
        measures, picked = measured[name], chosen[name]
        found[name] = ModelEvaluation(
            CrossEntropy(measures.loss),
            distribution(measures),
            residual_norms(measures),
            sinks(measures),
            _effects(model, sample, inner, progress) if effects else None,
            None if picked is None else ablate_neurons(model, sample, picked, inner),
            None if corrupted is None else patch_residual(model, *corrupted, progress=progress),
            scores[name],
        )
    policy = bos_policy(next(iter(models.values()))) if tasks else None
    return Evaluation(found, original, threshold, text, tokens[:, 1:].numel(), policy)


def _width(model: HookedTransformer) -> tuple[int, int | None]:
    return model.cfg.n_layers, model.cfg.d_mlp


def _effects(
    model: HookedTransformer, sample: Tensor, batch: int, progress: bool
) -> DirectEffects | None:
    try:
        return direct_effects(model, sample, batch, progress)
    except UnsupportedModelError:  # its stream cannot be taken apart: no such figure
        return None


def _chosen(model: HookedTransformer, n: int) -> list[int] | None:
    """The model's own confidence neurons."""
    if n == 0 or model.cfg.attn_only:
        return None
    try:
        return find_confidence_neurons(model, n)
    except UnsupportedModelError:
        return None


def _indirect_objects(
    models: Mapping[str, HookedTransformer], n: int, seed: int
) -> tuple[Tensor, ...]:
    tokenizer = next((m.tokenizer for m in models.values() if m.tokenizer is not None), None)
    if tokenizer is None:
        raise DataError("prompts about an indirect object need a tokenizer")
    return ioi_pairs(tokenizer, n, seed)


def _corrupted(sample: Tensor, n: int, seed: int) -> tuple[Tensor, ...] | None:
    length = min(32, sample.shape[1] - 1)
    if length < 2 or len(sample.unique()) == 1:
        return None
    return corrupted_pairs(sample, n, length, seed)
