"""Sentences as lists of words, and the tokens of each word."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lnfree_interp.analysis.view import Model, View, view_of
from lnfree_interp.errors import DataError


@dataclass(frozen=True)
class Sentence:
    """A text and its words, each of which has one row in a regression.

    Words are taken as they are given, never split again: a word may hold a no-break space, signs or
    anything else, and the words of a script that writes none between them are those of the list.

    Attributes:
        words: The words, in their order.
        text: The text that the model reads, in which the words stand one after the other. Default:
            the words with spaces between them.

    Raises:
        DataError: if there is no word, one is empty or no Unicode text, or one does not follow in
            the text.

    Examples:
        >>> lf.Sentence(["The", "cat", "sat."]).text
        'The cat sat.'
        >>> lf.Sentence(["我", "喜欢", "猫"], "我喜欢猫").spans
        ((0, 1), (1, 3), (3, 4))
    """

    words: Sequence[Any]
    text: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.words, str):
            raise DataError(
                f"a sentence is a list of words, not the string {self.words!r:.60}: give "
                "text.split(), or words of your own and the text"
            )
        words = tuple(self.words)
        if not words:
            raise DataError("a sentence has no words: give at least one, or leave it out")
        for i, word in enumerate(words):
            if not isinstance(word, str) or not word:
                raise DataError(f"word {i} is {word!r:.60}, and a word is a string of some letters")
            try:
                word.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"word {i}, {word!r:.60}, is no Unicode text: {error}") from error
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "text", self.text or " ".join(words))
        _ = self.spans

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The characters of each word in the text: the first, and one past the last."""
        found, end = [], 0
        for i, word in enumerate(self.words):
            start = self.text.find(word, end)
            if start < 0:
                raise DataError(
                    f"word {i}, {word!r:.60}, does not follow in the text {self.text!r:.60}: give "
                    "the words in the order and the spelling of the text"
                )
            end = start + len(word)
            found.append((start, end))
        return tuple(found)

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class WordTokens:
    """The tokens of a sentence, and those of each of its words."""

    sentence: Sentence
    """The sentence."""
    tokens: tuple[int, ...]
    """Its token ids, as the model reads them, with what the model puts before a text."""
    positions: tuple[range, ...]
    """For each word the positions of its tokens, at least one."""
    missing: tuple[int, ...]
    """The words of which no token stands for any character: their position is that of the last
    token before them, or of the first token if there is none."""


def word_tokens(model: Model | View, sentence: Sentence | Sequence[str]) -> WordTokens:
    """Which tokens each word of a sentence is, by the characters that tokens stand for.

    A word's tokens are those that stand for at least one of its characters: a token that reaches
    over two words belongs to both. A word of which the tokenizer drops everything reads the last
    token before it, as that is where the model stands when it gets there.

    Args:
        model: A model with a fast tokenizer, which says what its tokens stand for.
        sentence: A `Sentence`, or its words.

    Returns:
        `WordTokens`; its tokens are those of `lf.trace(model, sentence.text)`.

    Raises:
        DataError: if the model has no such tokenizer, or its context is too short.

    Source:
        Ours.

    Examples:
        >>> found = lf.word_tokens(model, ["return", "self.items[index]"])
        >>> found.positions
        (range(1, 2), range(2, 8))
    """
    view = view_of(model)
    sentence = as_sentence(sentence)
    ids, characters = view.tokenize_with_spans(sentence.text)
    if not ids:
        raise DataError(f"the tokenizer makes no token of {sentence.text!r:.60}: leave it out")
    if len(ids) > view.cfg.n_ctx:
        raise DataError(
            f"{sentence.text!r:.60} is {len(ids)} tokens; the model's context is {view.cfg.n_ctx}: "
            "give shorter sentences"
        )
    positions, missing = [], []
    for i, (start, end) in enumerate(sentence.spans):
        own = [at for at, (a, b) in enumerate(characters) if a < b and a < end and b > start]
        if not own:
            missing.append(i)
            own = [max((at for at, (_, b) in enumerate(characters) if b <= start), default=0)]
        positions.append(range(own[0], own[-1] + 1))
    return WordTokens(sentence, tuple(ids), tuple(positions), tuple(missing))


def as_sentence(given: Sentence | Sequence[str]) -> Sentence:
    """A sentence, given as one or as its words.

    Raises:
        DataError: if it is none.
    """
    return given if isinstance(given, Sentence) else Sentence(given)


def as_sentences(given: Iterable[Sentence | Sequence[str]] | Any) -> tuple[Sentence, ...]:
    """Sentences, each given as one or as its words.

    Raises:
        DataError: if one is none, which is named by its number, or there are none.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise DataError(
            f"give a list of sentences, each a list of words, not one {type(given).__name__}"
        )
    found = []
    for i, one in enumerate(given):
        try:
            found.append(as_sentence(one))
        except DataError as error:
            raise DataError(f"sentence {i}: {error}") from error
    if not found:
        raise DataError("there are no sentences: give at least one")
    return tuple(found)


def word_table(sentences: Sequence[Sentence]) -> pd.DataFrame:
    """A row for each word: `sentence_id` and `word_id` from 0, and `word`."""
    rows = [(i, j, word) for i, one in enumerate(sentences) for j, word in enumerate(one.words)]
    return pd.DataFrame(rows, columns=["sentence_id", "word_id", "word"])
