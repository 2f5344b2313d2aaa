"""`lnfree evaluate`: from the names of models and a text to an evaluation."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from transformer_lens import HookedTransformer

from lnfree_interp.checkpoints.source import read_tokenizer
from lnfree_interp.data.named import evaluation_text
from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.evaluate import evaluate
from lnfree_interp.evaluation.results import Evaluation
from lnfree_interp.evaluation.text_pass import Precision
from lnfree_interp.models.precision import bf16_is_fast
from lnfree_interp.removal.named_models import find_model, load_named


def evaluate_checkpoints(
    sources: Sequence[str],
    against: str | None,
    text: str,
    *,
    sequences: int | None = None,
    sequence_length: int | None = None,
    split: str | None = None,
    name: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    precision: Precision | Literal["auto"] = "float32",
    tokenizer: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Evaluation:
    """Load models and a text, and evaluate.

    Args:
        sources: Hub ids, `id@revision`, local folders, or runs.
        against: The original; evaluated too. Default: what a single run started from.
        text: As for `evaluation_text`, like the following six.
        sequences: See there.
        sequence_length: Tokens per sequence. Default: the smallest context, up to 1024.
        split: See there.
        name: See there.
        column: See there.
        revision: See there.
        precision: As for `evaluate`; `"auto"` takes bfloat16 where the hardware has it.
        tokenizer: Hub id or folder of one, for checkpoints without.
        progress: Whether to show progress bars.
        say: Gets a line before each stage.
        settings: As for `evaluate`.

    Raises:
        LnfreeError: whatever `load`, `evaluation_text` and `evaluate` raise.
    """
    own = None if tokenizer is None else read_tokenizer(tokenizer)
    subjects = {source: find_model(source) for source in sources}
    recorded = None
    if against is None and len(subjects) == 1:
        against = recorded = next(iter(subjects.values())).original
    wanted = [*([against] if against is not None else []), *sources]
    if not wanted:
        raise DataError("name at least one model")
    models = {}
    for source in dict.fromkeys(wanted):
        say(f"loading {source}")
        run = sources[0] if source == recorded else None
        models[source] = load_named(find_model(source).checkpoint, own, recorded_by=run)
    require_same_tokenizer(models)
    names = dict(zip(models, _short([*models]), strict=True))
    contexts = [model.cfg.n_ctx for model in models.values()]
    sequence_length = min(1024, *contexts) if sequence_length is None else sequence_length
    first = next(iter(models.values()))
    say(f"opening {text}")
    tokens = evaluation_text(
        text, first.tokenizer, sequence_length, sequences,
        split=split, name=name, column=column, revision=revision,
    )  # fmt: skip
    say(f"evaluating on {tokens.numel():,} tokens in sequences of {sequence_length}")
    if precision == "auto":
        precision = "bfloat16" if bf16_is_fast(first.W_E.device) else "float32"
    return evaluate(
        {names[source]: model for source, model in models.items()},
        tokens,
        original=None if against is None else names[against],
        text=text,
        precision=precision,
        progress=progress,
        **settings,
    )


def require_same_tokenizer(models: Mapping[str, HookedTransformer]) -> None:
    """Refuse models that read the same ids as different text.

    Raises:
        DataError: naming two of them.
    """
    seen: tuple[str, dict[str, int]] | None = None
    for name, model in models.items():
        if model.tokenizer is None:
            continue
        vocabulary = model.tokenizer.get_vocab()
        if seen is not None and vocabulary != seen[1]:
            raise DataError(
                f"{seen[0]} and {name} have different tokenizers: their losses per token cannot be "
                "compared; evaluate them one by one"
            )
        seen = (name, vocabulary)


def _short(sources: list[str]) -> list[str]:
    """The last parts of paths and ids, as few as tell them apart."""
    parts = [source.rstrip(os.sep + "/").split("/") for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return sources
