"""A regression on words that was fitted: what it predicts, how well, and what that is made of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lnfree_interp.analysis.components import nearest
from lnfree_interp.analysis.positions import read_number
from lnfree_interp.analysis.stream import Place
from lnfree_interp.analysis.targets import Probe, Reading, read_at
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.analysis.view import View, noting
from lnfree_interp.errors import DataError
from lnfree_interp.probing.features import word_features
from lnfree_interp.probing.heads import folded, predict
from lnfree_interp.probing.sentences import Sentence, as_sentences, word_table, word_tokens
from lnfree_interp.probing.streams import pooled, pooled_positions, read_words

MEMBERS = ("stream", "words", "ensemble")
"""The regression on the stream, that on hand-made features of words, and the mean of both."""
BASELINE = "mean"
"""The mean of a target over all words, which needs no model."""


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A regression of several numbers of each word, on the stream of a model.

    What is reported of it was predicted with all words of the sentence held out. What it predicts
    of other sentences, and what `target` explains, comes from a fit on all words.
    """

    site: str
    """Where the stream is read: the hook name of a place, or a norm behind one."""
    pool: str
    """Which of a word's tokens is read: `"first"`, `"last"`, or the `"mean"` over all."""
    head: str
    """`"ridge"` or `"mlp"`."""
    names: tuple[str, ...]
    """The targets."""
    sentences: tuple[Sentence, ...]
    """What it was fitted on."""
    observed: Float[Tensor, "word target"]
    """The targets of each word, in their own units."""
    held_out: Mapping[str, Float[Tensor, "word target"]]
    """What was predicted of words whose sentence was held out, by member: `"stream"`, `"words"` and
    `"ensemble"`; and `"mean"`, each target's mean over all words, which knows the held-out words
    too. In the targets' own units."""
    fold: Int[Tensor, " word"]
    """In which fold each word was held out."""
    view: View
    """The model."""
    counts: Mapping[str, int]
    """How often each word occurs in these sentences."""
    regressions: Mapping[str, Any]
    """The pipelines of scikit-learn that were fitted on all words: `"stream"` and `"words"`."""

    @property
    def mae(self) -> pd.DataFrame:
        """The mean absolute error, by target (rows, in its own unit) and member (columns)."""
        errors = {name: (x - self.observed).abs().mean(0) for name, x in self._columns()}
        return pd.DataFrame({k: v.tolist() for k, v in errors.items()}, index=list(self.names))

    @property
    def r2(self) -> pd.DataFrame:
        """The share of a target's variance over all words that is explained, by target (rows) and
        member (columns); nan for a target that does not vary."""
        spread = (self.observed - self.observed.mean(0)).square().sum(0)
        left = {name: (x - self.observed).square().sum(0) for name, x in self._columns()}
        shares = {k: torch.where(spread > 0, 1 - v / spread, torch.nan) for k, v in left.items()}
        return pd.DataFrame({k: v.tolist() for k, v in shares.items()}, index=list(self.names))

    def _columns(self) -> list[tuple[str, Tensor]]:
        return [(name, self.held_out[name]) for name in (BASELINE, *MEMBERS)]

    def to_frame(self) -> pd.DataFrame:
        """A row for each target and member: `site`, `target`, `member`, `mae` and `r2`."""
        mae, r2 = self.mae, self.r2
        rows = [
            (self.site, target, member, mae.loc[target, member], r2.loc[target, member])
            for target in self.names
            for member in mae.columns
        ]
        return pd.DataFrame(rows, columns=["site", "target", "member", "mae", "r2"])

    def predict(
        self, words: Iterable[Sentence | Sequence[str]], member: str = "ensemble"
    ) -> pd.DataFrame:
        """What it says of the words of other sentences.

        Args:
            words: Sentences, each a `Sentence` or its words.
            member: `"stream"`, `"words"` or `"ensemble"`.

        Returns:
            A row for each word: `sentence_id` and `word_id` from 0, `word`, and each target.

        Raises:
            DataError: if there is no such member, or the model cannot read a sentence.
        """
        if member not in MEMBERS:
            raise DataError(f"member={member!r}: give one of {list(MEMBERS)}")
        sentences, found = as_sentences(words), []
        if member != "words":
            aligned = [word_tokens(self.view, one) for one in sentences]
            with tqdm(disable=True) as bar:
                rows = read_words(self.view, aligned, [self.site], self.pool, 16, bar)[self.site]
            found.append(predict(self.regressions["stream"], rows.numpy()))
        if member != "stream":
            features = word_features(sentences, self.counts).to_numpy()
            found.append(predict(self.regressions["words"], features))
        return word_table(sentences).assign(
            **dict(zip(self.names, np.mean(found, axis=0).T, strict=True))
        )

    def direction(self, name: str) -> tuple[Float[Tensor, " d_model"], float]:
        """The direction of the stream that a target is read along, and the constant behind it, with
        standardisation and intercept in them: direction @ stream + constant is the prediction.

        Raises:
            DataError: if there is no such target, or the head is no linear one.
        """
        if self.head != "ridge":
            raise DataError(
                f"an {self.head} is not linear in the stream, so its prediction is no sum over "
                "parts: fit with head='ridge'"
            )
        row = self._number(name)
        directions, constants = folded(self.regressions["stream"])
        return torch.from_numpy(directions[row].copy()), float(constants[row])

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise DataError(f"there is no target {name!r}{nearest(name, self.names)}")
        return self.names.index(name)

    def target(
        self, name: str, sentence: Sentence | Sequence[str], word: SupportsIndex
    ) -> "WordPrediction":
        """What the regression on the stream predicts of one word, as a target of `attribute`.

        Args:
            name: Which number.
            sentence: A `Sentence`, or its words; it need not be one that was fitted on.
            word: Which word, from the end if negative.

        Returns:
            A target for `lf.trace(model, sentence.text)`, on the model that it was fitted on.

        Raises:
            DataError: if there is no such target or word, the model cannot read the sentence, or
                the head is no linear one.
        """
        direction, constant = self.direction(name)
        aligned = word_tokens(self.view, sentence)
        number = read_number(word, len(aligned.positions), "word")
        positions = aligned.positions[number]
        at = pooled_positions(positions, self.pool)
        probe = Probe(direction, self.site, at, constant, mean=True)
        said = aligned.sentence.words[number]
        return WordPrediction(probe, name, said, aligned.tokens, positions, self)

    def __repr__(self) -> str:
        mae, r2 = self.mae, self.r2
        best = r2["stream"].fillna(-torch.inf).idxmax()
        one = mae.loc[best]
        return (
            f"FittedProbe({self.head} at {self.site}, {self.pool} token of {len(self.observed):,} "
            f"words in {len(self.sentences):,} sentences; best told of {len(self.names)}: {best}, "
            f"R2 {r2.loc[best, 'stream']:.3f}, mean absolute error {one['stream']:.3g}, with "
            f"features of words {one['ensemble']:.3g}, of the mean {one[BASELINE]:.3g})"
        )


@dataclass(frozen=True, eq=False)
class WordPrediction:
    """What a regression on the stream predicts of one word: a target of `attribute`."""

    probe: Probe
    """The direction and the constant, with all standardisation in them, and where they are read."""
    name: str
    """Which number; the unit of the answer."""
    word: str
    """The word."""
    tokens: tuple[int, ...]
    """The sentence's tokens: the target is about no other prompt."""
    positions: range
    """The positions of the word's tokens."""
    fitted: FittedProbe
    """The regression, which computes the whole by itself: pooled, standardised, multiplied, added;
    so that the certificate is about the direction and the constant as well."""

    def needs(self, trace: Trace) -> tuple[Place, list[str]]:
        """As `Target.needs`."""
        return self.probe.needs(trace)

    def read(self, trace: Trace) -> Reading:
        """As `Target.read`.

        Raises:
            DataError: if the trace is of another prompt than the sentence.
        """
        if noting():  # of which norms are read; any prompt of enough tokens will do
            return self.probe.read(trace)
        if trace.batch != 1 or tuple(trace.tokens[0].tolist()) != self.tokens:
            raise DataError(
                f"this is the prediction of {self.word!r} in its own sentence, and the trace is of "
                "another prompt: give lf.trace(model, sentence.text)"
            )
        reading = self.probe.read(trace)
        what = f"{self.name} of {self.word!r}"
        return replace(
            reading, total=self._whole(trace, reading), of=(what,), unit=self.name,
            identity=f"parts = the prediction of {what}",
        )  # fmt: skip

    def _whole(self, trace: Trace, reading: Reading) -> Float[Tensor, "one one"]:
        """The prediction, by the regression itself and not by the direction."""
        stream, (_, norm) = trace.stream(reading.place), read_at(trace.view, self.fitted.site)
        stream = stream if norm is None else trace.view.through_norm(norm, stream)
        row = pooled(stream[0], [self.positions], self.fitted.pool).numpy()
        said = predict(self.fitted.regressions["stream"], row)
        return reading.total.new_tensor(said[:, [self.fitted.names.index(self.name)]])
