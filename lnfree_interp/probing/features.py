"""What can be said of a word without a model: its length, how often it occurs, where it stands."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from lnfree_interp.probing.sentences import Sentence, as_sentences


def word_features(
    words: Iterable[Sentence | Sequence[str]], counts: Mapping[str, int] | None = None
) -> pd.DataFrame:
    """Features of words, made by hand: a row for each word, in the order of the sentences.

    Args:
        words: Sentences, each a `Sentence` or its words.
        counts: How often each word occurs, by `plain(word)`, from `word_counts`. Default: in these
            sentences.

    Returns:
        A table with the columns `length` (letters, without combining marks), `frequency` (natural
            logarithm of one plus the count), `position` (from 0) and `relative_position` (0 to 1)
            in the sentence, `sentence_length` in words, `capitalised`, `all_capitals`, `digit`,
            `punctuation`, `ends_with_punctuation`, `first`, `last` (0 or 1), and the length and the
            frequency of the word before, `length_before` and `frequency_before` (0 for none).

    Raises:
        DataError: if a sentence is none.

    Source:
        Ours; length, frequency and the word before are what models of reading have in common.

    Examples:
        >>> table = lf.word_features([["The", "cat", "sat."]])
        >>> table["length"].tolist(), table["capitalised"].tolist()
        ([3.0, 3.0, 4.0], [1.0, 0.0, 0.0])
    """
    sentences = as_sentences(words)
    counts = word_counts(sentences) if counts is None else counts
    rows = []
    for one in sentences:
        n, length_before, frequency_before = len(one), 0.0, 0.0
        for i, word in enumerate(one.words):
            kinds = [unicodedata.category(letter) for letter in word]
            length = float(sum(kind[0] != "M" and kind != "Cf" for kind in kinds))
            frequency = float(np.log1p(counts.get(plain(word), 0)))
            rows.append(
                {
                    "length": length,
                    "frequency": frequency,
                    "position": i,
                    "relative_position": i / max(1, n - 1),
                    "sentence_length": n,
                    "capitalised": word[0].isupper(),
                    "all_capitals": len(word) > 1 and word.isupper(),
                    "digit": "Nd" in kinds,
                    "punctuation": any(kind[0] == "P" for kind in kinds),
                    "ends_with_punctuation": kinds[-1][0] == "P",
                    "first": i == 0,
                    "last": i == n - 1,
                    "length_before": length_before,
                    "frequency_before": frequency_before,
                }
            )
            length_before, frequency_before = length, frequency
    return pd.DataFrame(rows).astype(float)


def word_counts(sentences: Iterable[Sentence]) -> Counter[str]:
    """How often each word occurs, whatever its capitals and the punctuation around it."""
    return Counter(plain(word) for one in sentences for word in one.words)


def plain(word: str) -> str:
    """A word without capitals and the punctuation around it, if anything is left then."""
    letters = [unicodedata.category(letter)[0] in "LNM" for letter in word]
    if not any(letters):
        return word
    return word[letters.index(True) : len(word) - letters[::-1].index(True)].casefold()
