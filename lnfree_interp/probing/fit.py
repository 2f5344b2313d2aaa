"""Fit regressions on the words of sentences, and measure them on sentences held out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from sklearn.base import clone
from sklearn.model_selection import GroupKFold
from tqdm.auto import tqdm

from lnfree_interp.analysis.stream import Place
from lnfree_interp.analysis.targets import read_at
from lnfree_interp.analysis.view import Model, view_of
from lnfree_interp.errors import DataError
from lnfree_interp.probing.features import word_counts, word_features
from lnfree_interp.probing.fitted import BASELINE, FittedProbe
from lnfree_interp.probing.heads import RIDGES, make_head, predict
from lnfree_interp.probing.sentences import Sentence, as_sentences, word_tokens
from lnfree_interp.probing.streams import read_words, require_pool

LEAST_WORDS = 20
"""The fewest words that an MLP is fitted on, since it holds a tenth of them out."""


def fit_probe(
    model: Model,
    site: str,
    targets: Any,
    *,
    words: Iterable[Sentence | Sequence[str]],
    pool: str = "last",
    head: str = "ridge",
    ridge: float | Sequence[float] = RIDGES,
    hidden: int = 32,
    folds: int = 5,
    batch: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> FittedProbe:
    """Predict numbers of each word, such as reading times, from the stream of a model.

    Three members are measured: a regression on the stream at the word's tokens; one of the same
    kind on features of words made by hand (`lf.word_features`); and the mean of both. Every word is
    predicted with its whole sentence held out, and every sentence of the same words.

    Args:
        model: A `HookedTransformer` in any form, or a `TransformerBridge`, with a fast tokenizer.
            It does not change.
        site: Where the stream is read: a hook name such as `blocks.2.hook_resid_post`, or a norm
            that reads the stream, such as `ln_final`, for what that norm makes of it.
        targets: By name a number for each word, [word], in the order of the words: a mapping or a
            table. All are fitted at once.
        words: Sentences, each a `Sentence` or its words.
        pool: Which of a word's tokens is read: `"first"`, `"last"`, or the `"mean"` over all.
        head: `"ridge"`, linear; or `"mlp"`, with one hidden layer. Inputs are standardised.
        ridge: The ridge penalty on squared coefficients; of several, each target gets that with the
            smallest leave-one-word-out error among the words that it is fitted on.
        hidden: The width of the MLP's hidden layer.
        folds: How many parts the sentences are held out in.
        batch: How many sentences run at once.
        seed: The seed of the MLP.
        progress: Whether to show a progress bar.

    Returns:
        A `FittedProbe`: `.mae` and `.r2` by target, `.target(...)` for `attribute`.
            `lf.plots.probes` draws it.

    Raises:
        DataError: if numbers and words do not match, a number is not finite, the model cannot read
            a sentence, or a setting is not allowed.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        arXiv 2110.04475: RoBERTa's tokens averaged with a model on features, for the five numbers
        of the CMCL 2021 shared task. Ours: that a linear prediction is a target of `attribute`.

    Examples:
        >>> site = "blocks.1.hook_resid_post"
        >>> data = lf.planted_reading_times(model, site, sentences=30)
        >>> fitted = lf.fit_probe(model, site, data.targets, words=data.words, progress=False)
        >>> fitted.mae.columns.tolist()
        ['mean', 'stream', 'words', 'ensemble']
        >>> trace = lf.trace(model, data.words[0].text)
        >>> target = fitted.target("planted_GPT", data.words[0], word=3)
        >>> trace.attribute(target, by="head").verify().unit
        'planted_GPT'
    """
    return fit_probes(
        model, targets, words=words, sites=[site], pool=pool, head=head, ridge=ridge,
        hidden=hidden, folds=folds, batch=batch, seed=seed, progress=progress,
    )[site]  # fmt: skip


def fit_probes(
    model: Model,
    targets: Any,
    *,
    words: Iterable[Sentence | Sequence[str]],
    sites: Sequence[str] | None = None,
    pool: str = "last",
    head: str = "ridge",
    ridge: float | Sequence[float] = RIDGES,
    hidden: int = 32,
    folds: int = 5,
    batch: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, FittedProbe]:
    """`fit_probe` at several sites, from one forward pass.

    The stream at all words and sites is in memory at once, in float64.

    Args:
        model: As for `fit_probe`.
        targets: As for `fit_probe`.
        words: As for `fit_probe`.
        sites: Where the stream is read. Default: before the first block, and after each.
        pool: As for `fit_probe`.
        head: As for `fit_probe`.
        ridge: As for `fit_probe`.
        hidden: As for `fit_probe`.
        folds: As for `fit_probe`.
        batch: As for `fit_probe`.
        seed: As for `fit_probe`.
        progress: Whether to show a progress bar.

    Returns:
        A `FittedProbe` by site; `lf.plots.probes` draws their errors over the layers.

    Raises:
        DataError: as for `fit_probe`.
        UnsupportedModelError: as for `fit_probe`.

    Source:
        As for `fit_probe`: arXiv 2110.04475.

    Examples:
        >>> data = lf.planted_reading_times(model, "blocks.1.hook_resid_post", sentences=30)
        >>> fits = lf.fit_probes(model, data.targets, words=data.words, progress=False)
        >>> list(fits)[:2]
        ['blocks.0.hook_resid_pre', 'blocks.0.hook_resid_post']
    """
    view, sentences = view_of(model), as_sentences(words)
    names, y = read_targets(targets, sentences)
    if sites is None:
        sites = [Place(layer).hook for layer in range(view.n_layers + 1)]
    if not sites:
        raise DataError("there are no sites: give at least one, or None for all layers")
    for site in sites:
        read_at(view, site)
    regression = make_head(head, ridge, hidden, seed)
    require_pool(pool)
    if batch < 1:
        raise DataError(f"batch={batch}: give 1 or more sentences")
    fold = held_out_in(sentences, folds)
    if head == "mlp" and min(np.sum(fold != i) for i in range(folds)) < LEAST_WORDS:
        raise DataError(
            f"an MLP is fitted on {LEAST_WORDS} words at least: give more sentences, or take "
            "head='ridge'"
        )
    aligned = [word_tokens(view, one) for one in sentences]
    counts = word_counts(sentences)
    features = word_features(sentences, counts).to_numpy()
    total = len(aligned) + 1 + len(sites)
    with tqdm(total=total, desc="probe", unit="sentence or site", disable=not progress) as bar:
        rows = read_words(view, aligned, sites, pool, batch, bar)
        of_words, by_words = _cross_validated(regression, features, y, fold)
        bar.update()
        fits = {}
        for site in sites:
            of_stream, by_stream = _cross_validated(regression, rows[site].numpy(), y, fold)
            said = {
                BASELINE: np.broadcast_to(y.mean(0), y.shape).copy(),
                "stream": of_stream,
                "words": of_words,
                "ensemble": (of_stream + of_words) / 2,
            }
            fits[site] = FittedProbe(
                site, pool, head, names, sentences, torch.from_numpy(y),
                {member: torch.from_numpy(x) for member, x in said.items()},
                torch.from_numpy(fold), view, counts, {"stream": by_stream, "words": by_words},
            )  # fmt: skip
            bar.update()
    return fits


def _cross_validated(
    regression: Any, X: np.ndarray, y: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, Any]:
    """What is predicted of each word with its fold held out, and a fit on all words."""
    said, new = np.empty_like(y), lambda: cast(Any, clone(regression))
    for i in np.unique(fold):
        rest = fold != i
        said[~rest] = predict(new().fit(X[rest], y[rest]), X[~rest])
    return said, new().fit(X, y)


def held_out_in(sentences: Sequence[Sentence], folds: int) -> np.ndarray:
    """The fold of each word, [word]: all words of a sentence in one, and all sentences of the same
    words.

    Raises:
        DataError: if there are fewer different sentences than folds, or fewer than two folds.
    """
    different = {words: i for i, words in enumerate(dict.fromkeys(one.words for one in sentences))}
    if not 2 <= folds <= len(different):
        raise DataError(
            f"folds={folds}: give 2 to {len(different)}, the number of different sentences"
            if len(different) > 1
            else "there is one sentence, and a sentence is held out whole: give at least two"
        )
    group = np.array([different[one.words] for one in sentences for _ in one.words])
    fold = np.empty(len(group), dtype=np.int64)
    for i, (_, held) in enumerate(GroupKFold(folds).split(group, groups=group)):
        fold[held] = i
    return fold


def read_targets(targets: Any, sentences: Sequence[Sentence]) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the targets, and their numbers, [word, target], in float64.

    Raises:
        DataError: if there are none, they do not match the words, or one is no finite number.
    """
    if not isinstance(targets, Mapping) and not hasattr(targets, "items"):
        raise DataError(
            f"targets are numbers by name, not a {type(targets).__name__}: give {{'TRT': [...]}}"
        )
    named, n = {str(name): column for name, column in targets.items()}, sum(map(len, sentences))
    if not named:
        raise DataError("there are no targets: give at least one")
    columns = []
    for name, column in named.items():
        try:
            given = column.detach().cpu().double() if isinstance(column, torch.Tensor) else column
            numbers = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"target {name!r} is not all numbers: {error}") from error
        if numbers.shape != (n,):
            raise DataError(
                f"target {name!r} has the shape {list(numbers.shape)}, and there are {n} words in "
                f"{len(sentences)} sentences: give a number for each word, [{n}]"
            )
        if not np.isfinite(numbers).all():
            row = int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise DataError(
                f"target {name!r} is {numbers[row]} at word {row}: give finite numbers, and leave "
                "out sentences without them"
            )
        columns.append(numbers)
    return tuple(named), np.stack(columns, axis=1)
