"""Comparison of an LN-free model with its original: all measures in one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.prompts import read_sequences
from lnfree_interp.data.named import spread
from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.evaluation.confidence_neurons import (
    ablate_neurons,
    find_confidence_neurons,
)
from lnfree_interp.evaluation.depth import loss_without_blocks
from lnfree_interp.evaluation.direct_effects import DirectEffects, direct_effects
from lnfree_interp.evaluation.loss import CrossEntropy
from lnfree_interp.evaluation.patching import (
    corrupted_pairs,
    ioi_pairs,
    patch_residual,
)
from lnfree_interp.evaluation.results import Evaluation, ModelEvaluation, Pairs
from lnfree_interp.evaluation.summaries import (
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
from lnfree_interp.models.construct import original_tokenizer

SAMPLE = 16
"""How many sequences the effects of single heads and neurons are measured on."""


def evaluate(
    models: Mapping[str, HookedTransformer] | HookedTransformer,
    tokens: Int[Tensor, "sequence pos"],
    *,
    original: str | None = None,
    threshold: float = 3.5,
    effects: bool = True,
    neurons: int = 3,
    pairs: int = 16,
    pairs_of: Pairs = "text",
    depth: bool = True,
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

    It measures cross-entropy with its tail, entropy, calibration, distance to the original,
    residual norms, attention sinks and what attribution misses, and runs tasks if asked to. A
    measure that a model does not allow is left out of its column.

    Args:
        models: The models by name, or one model.
        tokens: Token ids [sequence, pos], such as `pack(...)` or `open_sequences(...).take(n)`.
        original: The name of the model that the others are compared with. Default: no comparison.
        threshold: The increase of a token's loss, in nats, above which it is counted as worse.
        effects: Whether to measure every head's direct effect against its attribution, on 16
            sequences. This and the neurons are left out for a model with norms after its sublayers.
        neurons: How many confidence neurons to find and ablate, on the same sequences; models as
            deep and wide as the original use the original's. 0: none.
        pairs: How many prompts to compare attribution patching with activation patching on. 0:
            none.
        pairs_of: `"text"`: prompts of `corrupted_pairs`; `"ioi"`: prompts of `ioi_pairs`, as
            published, for models of English.
        depth: Whether to leave out each block in turn, on the same 16 sequences, to find the one
            that is needed least; `lf.depth_report` says more.
        tasks: Tasks of the lm-evaluation-harness, such as `"hellaswag"`.
        include: A folder with your own task files.
        limit: How many examples of each task to use. Default: all.
        text: The name of the text, for table and JSON.
        batch: How many sequences run at once. Default: as many as fit into memory.
        precision: The precision of matrix products in the pass over the text.
        seed: The seed of the corrupted prompts.
        progress: Whether to show progress bars.

    Returns:
        An `Evaluation`; `.to_frame()` and `.table()` have one column per model, losses in nats per
            token, `.models[name]` has the curves, and `.to_json()` has both.

    Raises:
        DataError: if a model cannot read the text, models cannot be compared, or there is no such
            original, neuron or task.
        UnsupportedModelError: if tasks are asked for, but the harness is not installed or a task
            generates text.

    Source:
        arXiv 2507.02559 for the comparison and its measures; calibration: arXiv 1706.04599; sink
        rate by head: arXiv 2410.10781. Ours: trimmed mean, quantiles and divergence beside the
        mean, which a few tokens can dominate.

    Examples:
        >>> models = {"live": model, "LN-free": free}
        >>> found = lf.evaluate(models, tokens, original="live", effects=False, neurons=0, pairs=0)
        >>> found.to_frame().shape
        (19, 2)
        >>> found.models["LN-free"].sinks.by_head.shape
        torch.Size([4, 6])
    """
    if isinstance(models, HookedTransformer):
        models = {"model": models}
    tokens = read_for_all(models, tokens, original, precision)
    if pairs_of not in get_args(Pairs):
        raise DataError(f"pairs_of is {' or '.join(get_args(Pairs))}, not {pairs_of!r}")
    if min(neurons, pairs) < 0 or not threshold >= 0:
        raise DataError(
            "neurons, pairs and the threshold in nats cannot be negative: give 0 or more"
        )
    sample = spread(tokens, SAMPLE)
    # Errors are raised here, before the long part.
    chosen = {name: _chosen(model, neurons) for name, model in models.items()}
    if original is not None and (theirs := chosen[original]) is not None:
        width = _width(models[original])
        for name, model in models.items():
            if chosen[name] is not None and _width(model) == width:
                chosen[name] = theirs
    if effects:
        read_sequences(next(iter(models.values())), sample)  # raises an error for padding
    corrupted = {
        name: _corrupted(sample, pairs, seed) if pairs_of == "text"
        else _indirect_objects(name, model, pairs, seed)
        for name, model in models.items()
    }  # fmt: skip
    opened = open_tasks(tasks, include, limit) if tasks else None
    # What is short comes before it too, so that it loses nothing if it fails.
    short: dict[str, dict[str, Any]] = {name: {} for name in models}
    for name, model in models.items():
        inner = min(batch or 4, 4, fitting_batch(model, tokens.shape[1]))
        picked, prompts, found = chosen[name], corrupted[name], short[name]
        if effects:
            found["direct_effects"] = _effects(model, sample, inner, progress)
        if picked is not None:
            found["confidence_neurons"] = ablate_neurons(model, sample, picked, inner)
        if prompts is not None:
            found["patching"] = patch_residual(
                model, *prompts, batch=batch or 16, progress=progress
            )
        if depth:
            found["loss_without"] = loss_without_blocks(model, sample, inner)
    if opened is not None:
        for name, model in models.items():
            short[name]["tasks"] = score_tasks(model, *opened, limit=limit)
    measured = measure_text(
        models, tokens, original, batch=batch, precision=precision, progress=progress
    )
    evaluated = {
        name: ModelEvaluation(
            CrossEntropy(measures.loss),
            distribution(measures),
            residual_norms(measures),
            sinks(measures),
            **short[name],
        )
        for name, measures in measured.items()
    }
    policy = None
    if tasks:
        policies = {name: bos_policy(model) for name, model in models.items()}
        policy = "; ".join(f"{name}: {one}" for name, one in policies.items())
    n_targets = tokens[:, 1:].numel()
    return Evaluation(evaluated, original, threshold, text, n_targets, policy, pairs_of)


def _width(model: HookedTransformer) -> tuple[int, int | None]:
    return model.cfg.n_layers, model.cfg.d_mlp


def _effects(
    model: HookedTransformer, sample: Tensor, batch: int, progress: bool
) -> DirectEffects | None:
    try:
        return direct_effects(model, sample, batch, progress)
    except UnsupportedModelError:  # its stream cannot be taken apart, so there is no such measure
        return None


def _chosen(model: HookedTransformer, n: int) -> list[int] | None:
    """The model's own confidence neurons; None if none are asked for or the model allows none."""
    if n == 0 or model.cfg.attn_only:
        return None
    try:
        return find_confidence_neurons(model, n)
    except UnsupportedModelError:
        return None


def _indirect_objects(
    name: str, model: HookedTransformer, n: int, seed: int
) -> tuple[Tensor, ...] | None:
    if n == 0:
        return None
    if model.tokenizer is None:
        raise DataError(
            f"{name} has no tokenizer to read prompts about an indirect object with: give "
            "pairs_of='text', or pairs=0"
        )
    # As published, there is a beginning-of-sequence token if the checkpoint's tokenizer adds one.
    adds = len(original_tokenizer(model.tokenizer).encode("a")) > len(
        original_tokenizer(model.tokenizer).encode("a", add_special_tokens=False)
    )
    return ioi_pairs(model, n, seed, prepend_bos=adds)


def _corrupted(sample: Tensor, n: int, seed: int) -> tuple[Tensor, ...] | None:
    length = min(32, sample.shape[1] - 1)
    if n == 0 or length < 2 or len(sample.unique()) == 1:
        return None
    return corrupted_pairs(sample, n, length, seed)
