"""Runs an evaluation job: from the names of models and a text to an evaluation."""

import os
from collections.abc import Callable, Mapping

from transformer_lens import HookedTransformer

from lnfree_interp.checkpoints.source import read_tokenizer
from lnfree_interp.data.named import NAMED, evaluation_text
from lnfree_interp.data.names import text_for
from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.evaluate import evaluate
from lnfree_interp.evaluation.job import EvaluationJob
from lnfree_interp.evaluation.results import Evaluation
from lnfree_interp.models.precision import bf16_is_fast
from lnfree_interp.removal.named_models import find_model, load_named


def run_job(
    job: EvaluationJob, *, progress: bool = True, say: Callable[[str], None] = lambda line: None
) -> Evaluation:
    """Load models and a text, and evaluate.

    Args:
        job: The options of the evaluation.
        progress: Whether to show progress bars.
        say: A function that is called with a line before each stage.

    Returns:
        The evaluation.

    Raises:
        DataError: if no text is named for a model other than the bundled one.
        LnfreeError: as for `load`, `evaluation_text` and `evaluate`.
    """
    own = None if job.tokenizer is None else read_tokenizer(job.tokenizer)
    found = {source: find_model(source) for source in job.models}
    original, recorded = job.original, None
    if original is None and len(found) == 1:
        original = recorded = next(iter(found.values())).original
    wanted = [*([original] if original is not None else []), *job.models]
    if not wanted:
        raise DataError("no model was named: give at least one")
    foreign = next((source for source in wanted if not find_model(source).bundled), None)
    text = text_for(job.data, foreign, bundled=foreign is None, also=NAMED)
    models = {}
    for source in dict.fromkeys(wanted):
        say(f"loading {source}")
        run = job.models[0] if source == recorded else None
        models[source] = load_named(find_model(source).checkpoint, own, recorded_by=run)
    require_same_tokenizer(models)
    names = dict(zip(models, _short([*models]), strict=True))
    first = next(iter(models.values()))
    length = job.sequence_length
    if length is None:
        length = min(1024, *(model.cfg.n_ctx for model in models.values()))
    say(f"opening {text}")
    tokens = evaluation_text(
        text,
        first.tokenizer,
        length,
        job.sequences,
        split=job.split,
        name=job.data_name,
        column=job.column,
        revision=job.data_revision,
    )
    say(f"evaluating on {tokens.numel():,} tokens in sequences of {length}")
    precision = job.precision
    if precision == "auto":
        precision = "bfloat16" if bf16_is_fast(first.W_E.device) else "float32"
    return evaluate(
        {names[source]: model for source, model in models.items()},
        tokens,
        original=None if original is None else names[original],
        text=text,
        threshold=job.threshold,
        effects=job.effects,
        neurons=job.neurons,
        pairs=job.pairs,
        pairs_of=job.pairs_of,
        depth=job.depth,
        tasks=job.tasks,
        include=job.include,
        limit=job.limit,
        batch=job.batch,
        precision=precision,
        progress=progress,
    )


def require_same_tokenizer(models: Mapping[str, HookedTransformer]) -> None:
    """Check that models have the same tokenizer.

    Raises:
        DataError: if tokenizers differ; the message names two of the models.
    """
    seen: tuple[str, dict[str, int]] | None = None
    for name, model in models.items():
        if model.tokenizer is None:
            continue
        vocabulary = model.tokenizer.get_vocab()
        if seen is not None and vocabulary != seen[1]:
            raise DataError(
                f"{seen[0]} and {name} have different tokenizers, so their losses per token cannot "
                "be compared: evaluate them one by one"
            )
        seen = (name, vocabulary)


def _short(sources: list[str]) -> list[str]:
    """The last parts of paths and ids, as few as make them different from each other."""
    parts = [source.rstrip(os.sep + "/").split("/") for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return sources
