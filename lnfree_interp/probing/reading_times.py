"""Numbers of words: a file in the columns of CMCL 2021, or planted in a model's own stream."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lnfree_interp.analysis.targets import read_at
from lnfree_interp.analysis.view import Model, view_of
from lnfree_interp.errors import DataError
from lnfree_interp.probing.sentences import Sentence, as_sentences, word_table, word_tokens
from lnfree_interp.probing.streams import read_words, require_pool

CMCL_2021 = ("nFix", "FFD", "GPT", "TRT", "fixProp")
"""The targets of the CMCL 2021 shared task: number of fixations, first fixation duration, go-past
time, total reading time and the share of readers who fixated the word; means over readers, scaled
to 0..100."""
_END = "<EOS>"
"""What the files of CMCL 2021 put behind the last word of a sentence."""
_PLANTED_WORDS = (
    "The a old river Children children carried quiet through market under because of which never "
    "bright window, letters letters. in town's and every winter; morning morning, stones found "
    "waited without 1984 seven light-house far (almost) where Mary John said: nothing. read slowly "
    "until evening? an unlikely story they remembered, café naïve whose extraordinarily it was is"
)


@dataclass(frozen=True, eq=False)
class ReadingTimes:
    """Sentences, and numbers of each of their words."""

    words: tuple[Sentence, ...]
    """The sentences."""
    targets: Mapping[str, Float[Tensor, " word"]]
    """By name a number for each word, in the order of the sentences; in the units of the source."""
    source: str
    """Where the numbers come from: a file, or that they were planted."""

    def to_frame(self) -> pd.DataFrame:
        """A row for each word: `sentence_id` and `word_id` from 0, `word`, and each target. As a
        CSV file without the index, `read_reading_times` reads it back."""
        columns = {name: column.numpy() for name, column in self.targets.items()}
        return word_table(self.words).assign(**columns)

    def __repr__(self) -> str:
        n = sum(map(len, self.words))
        return (
            f"ReadingTimes({len(self.words):,} sentences, {n:,} words, {', '.join(self.targets)}; "
            f"{self.source})"
        )


def read_reading_times(
    path: str | os.PathLike[str], targets: Sequence[str] = CMCL_2021
) -> ReadingTimes:
    """Read a CSV file with a row for each word, in the columns of the CMCL 2021 shared task.

    Args:
        path: A file with the columns `sentence_id`, `word_id`, `word` and the targets; others are
            left alone. All ids are whole numbers: those of sentences rise, those of a sentence's
            words go up by one. Words are taken as they stand, `NA` and `null` included; an
            `<EOS>` behind a sentence's last word, as in the files of CMCL, is taken off.
        targets: The columns with numbers. Default: `nFix`, `FFD`, `GPT`, `TRT`, `fixProp`.

    Returns:
        `ReadingTimes`, for `lf.fit_probe(model, site, data.targets, words=data.words)`.

    Raises:
        DataError: if the file cannot be read, lacks a column, or has a cell that is not a number,
            an empty word or ids out of order; with the line.

    Source:
        The CMCL 2021 shared task, https://cmclorg.github.io/shared_task; the numbers are of ZuCo.

    Examples:
        >>> data = lf.planted_reading_times(model, "blocks.1.hook_resid_post", sentences=3)
        >>> data.to_frame().to_csv("words.csv", index=False)
        >>> again = lf.read_reading_times("words.csv", targets=list(data.targets))
        >>> again.words == data.words
        True
    """
    if isinstance(targets, str) or not targets:
        raise DataError(f"targets={targets!r}: give a list of columns, at least one")
    needed = ["sentence_id", "word_id", "word", *targets]
    sentences: list[list[str]] = []
    columns: dict[str, list[float]] = {name: [] for name in targets}
    last: tuple[int, int] | None = None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
                raise DataError(
                    f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: it "
                    f"has {', '.join(reader.fieldnames or ['none'])}, and needs {', '.join(needed)}"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{where}: the row has more or fewer cells than the header: quote words "
                        "that have a comma or a quotation mark in them"
                    )
                ids = _whole(row, "sentence_id", where), _whole(row, "word_id", where)
                _require_next(last, ids, where)
                if last is None or ids[0] != last[0]:
                    sentences.append([])
                if not row["word"]:
                    raise DataError(f"{where}: the word is empty: every row is of one word")
                sentences[-1].append(row["word"])
                for name in targets:
                    columns[name].append(_number(row, name, where))
                last = ids
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV file in UTF-8: {error}") from error
    for words in sentences:
        if words[-1] != _END:
            words[-1] = words[-1].removesuffix(_END)
    return ReadingTimes(
        as_sentences(sentences),
        {name: torch.tensor(x, dtype=torch.float64) for name, x in columns.items()},
        f"from {os.path.basename(path)}",
    )


def _whole(row: Mapping[str, str], name: str, where: str) -> int:
    try:
        return int(row[name])
    except ValueError as error:
        raise DataError(f"{where}: {name} is {row[name]!r}, and is a whole number") from error


def _number(row: Mapping[str, str], name: str, where: str) -> float:
    try:
        number = float(row[name])
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise DataError(
            f"{where}: {name} is {row[name]!r}, and is a finite number: leave out sentences that "
            "lack one"
        )
    return number


def _require_next(last: tuple[int, int] | None, ids: tuple[int, int], where: str) -> None:
    if last is None or ids == (last[0], last[1] + 1) or ids[0] > last[0]:
        return
    raise DataError(
        f"{where}: word {ids[1]} of sentence {ids[0]} follows word {last[1]} of sentence {last[0]}"
        ": the ids of sentences rise, and those of a sentence's words go up by one, so sort the "
        "rows, and leave out whole sentences only"
    )


def planted_reading_times(
    model: Model,
    site: str,
    *,
    words: Iterable[Sentence | Sequence[str]] | None = None,
    sentences: int = 80,
    pool: str = "last",
    noise: float = 0.0,
    seed: int = 0,
) -> ReadingTimes:
    """Made-up numbers of words, for examples and tests: nobody read anything.

    Each of five targets is a random linear function of the model's stream at a site, standardised
    over the words, with mean 20 and standard deviation 5, and noise. A ridge regression at that
    site can find it; what is found of it elsewhere says what the stream there has of it.

    Args:
        model: A model with a fast tokenizer.
        site: Where the targets are planted, as for `fit_probe`.
        words: Sentences. Default: words of a short list, drawn by chance, which make no sense.
        sentences: How many sentences are drawn, of 6 to 14 words, if none are given.
        pool: Which of a word's tokens is read, as for `fit_probe`.
        noise: The standard deviation of the noise, in those of the target.
        seed: The seed of all that is drawn.

    Returns:
        `ReadingTimes` with the targets `planted_nFix`, `planted_FFD`, `planted_GPT`, `planted_TRT`
            and `planted_fixProp`, which share no more than the names with those of CMCL 2021.

    Raises:
        DataError: if the model cannot read a sentence, or a setting is not allowed.

    Source:
        Ours.

    Examples:
        >>> lf.planted_reading_times(model, "blocks.1.hook_resid_post", sentences=3).source
        'planted in blocks.1.hook_resid_post: no measurements'
    """
    if sentences < 1 or not 0 <= noise < float("inf"):
        raise DataError(
            f"sentences={sentences} and noise={noise} were given: give at least 1 sentence, and "
            "noise of 0 or more"
        )
    view, draw = view_of(model), np.random.default_rng(seed)
    read_at(view, site)
    if words is None:
        some = _PLANTED_WORDS.split()
        words = [
            [str(word) for word in draw.choice(some, draw.integers(6, 15))]
            for _ in range(sentences)
        ]
    given = as_sentences(words)
    aligned = [word_tokens(view, one) for one in given]
    with tqdm(disable=True) as bar:
        rows = read_words(view, aligned, [site], require_pool(pool), 16, bar)[site].numpy()
    spread = rows.std(0)
    rows = (rows - rows.mean(0)) / np.where(spread > 0, spread, 1.0)
    targets = {}
    for name in CMCL_2021:
        planted = rows @ draw.normal(size=rows.shape[1])
        planted = planted / (planted.std() or 1.0) + noise * draw.normal(size=len(planted))
        targets[f"planted_{name}"] = torch.from_numpy(20 + 5 * planted)
    return ReadingTimes(given, targets, f"planted in {site}: no measurements")
