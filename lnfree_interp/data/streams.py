"""Documents of any number, packed into sequences as they are needed.

A position consists of the place of the oldest document in use and the number of tokens used from
there on. It is small however long the documents are; going back to it reads them again.
"""

import hashlib
import json
from collections import deque
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lnfree_interp.data.packing import (
    DOCUMENTS_PER_CALL,
    behind_bos,
    bos_token,
    check_length,
    column_values,
    encode_documents,
    text_length,
)
from lnfree_interp.data.sequences import check_take, epoch_order
from lnfree_interp.errors import DataError

_SAMPLED_DOCUMENTS = 64  # how many a fingerprint reads


class PackedStream:
    """A `TokenSequences` of documents that are packed as `pack` does it, without holding the text.

    The first sequence of an epoch begins with the tokens that were left over from the epoch before.
    So no token is lost, and a text shorter than a sequence is repeated until it fills one.

    Args:
        documents: A `Dataset`, whose documents come in another order every epoch; or an
            `IterableDataset`, whose documents come in their own order every epoch. Do not give it
            a `shuffle()` buffer: the rows in that buffer are lost when a run is resumed. The data
            set given does not change.
        tokenizer: The model's, with an end-of-text token; it may be `None` for token ids.
        sequence_length: Tokens per sequence, at most the model's `n_ctx`.
        column: The column of strings, or of lists of token ids, to which no token is added.
        seed: The random seed of the order of a `Dataset`'s documents.
        prepend_bos: Whether each sequence begins with the tokenizer's beginning-of-text token.

    Raises:
        DataError: if there are no documents, the column is missing, or the first document cannot be
            read. `take` raises it for a document that is neither text nor token ids, and for an
            epoch without a token.
    """

    def __init__(
        self,
        documents: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase | None,
        sequence_length: int,
        column: str = "text",
        *,
        seed: int = 0,
        prepend_bos: bool = False,
    ) -> None:
        check_length(sequence_length)
        self._bos = bos_token(tokenizer, sequence_length) if prepend_bos else None
        self.sequence_length = sequence_length
        self._of_text = text_length(sequence_length, self._bos)
        self._tokenizer = tokenizer
        if isinstance(documents, IterableDataset):
            # Data sets made from one another share what counts the rows that were read.
            documents = deepcopy(documents)
        names = documents.column_names
        if names is not None:
            column_values([dict.fromkeys(names)], column)
            documents = documents.select_columns([column])
        documents = documents.with_format(None)
        self._documents: _ShuffledDocuments | _StreamedDocuments
        if isinstance(documents, Dataset):
            self._documents = _ShuffledDocuments(documents, column, seed)
        else:
            self._documents = _StreamedDocuments(documents, column)
        sample = self._documents.sample()
        settings: list[Any] = [*self._documents.settings(), column, sequence_length]
        if isinstance(sample[0], str) and tokenizer is not None:
            settings += [tokenizer.eos_token_id, sorted(tokenizer.get_vocab().items())]
        if self._bos is not None:
            settings.append(["bos", self._bos])
        digest = hashlib.sha256(json.dumps(settings).encode())
        for value in sample:
            digest.update(json.dumps(value, default=str).encode())
        self._fingerprint = digest.hexdigest()
        self._chunks: deque[tuple[dict[str, Any], Tensor]] = deque()  # position before, tokens
        self._used = 0  # of the tokens read

    @property
    def epoch(self) -> int:
        """The epoch in which the next sequence begins."""
        return self._position()["epoch"]

    def take(self, n: int) -> Int[Tensor, "n pos"]:
        """The next n sequences, int64, on the CPU."""
        check_take(n)
        # One token more than is taken, so that the epoch of the next sequence is known.
        missing, parts = n * self._of_text, []
        self._read_ahead(missing + 1)
        while missing:
            tokens = self._chunks[0][1][self._used : self._used + missing]
            parts.append(tokens)
            missing -= len(tokens)
            self._used += len(tokens)
            self._drop_used()
        return behind_bos(torch.cat(parts).view(n, self._of_text), self._bos)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last take."""
        return {"position": self._position(), "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self._documents.seek(state["position"])
        self._chunks.clear()
        self._used = state["used"]

    def fingerprint(self) -> str:
        """A hash of the vocabulary, the column, the sequence length, and what identifies the text.

        For a `Dataset` that is the number of documents, at most 64 of them in full, and the seed;
        for an `IterableDataset` its name, the number of its files and its first document.
        """
        return self._fingerprint

    def _position(self) -> dict[str, Any]:
        return self._chunks[0][0] if self._chunks else self._documents.position

    def _read_ahead(self, wanted: int) -> None:
        """Read until at least that many tokens are unused."""
        unused = sum(len(tokens) for _, tokens in self._chunks) - self._used
        ends = 0
        while unused < wanted:
            position = self._documents.position
            try:
                documents = self._documents.read()
                tokens = encode_documents(documents, self._tokenizer)
            except BaseException:
                self._documents.seek(position)
                raise
            if not documents:
                ends += 1
                if ends == 2:  # the second end: a whole epoch was read
                    raise DataError("there is not one token in the documents: give other text")
            elif len(tokens):
                self._chunks.append((position, tokens))
                unused += len(tokens)
                self._drop_used()
                ends = 0

    def _drop_used(self) -> None:
        while self._chunks and self._used >= len(self._chunks[0][1]):
            self._used -= len(self._chunks.popleft()[1])


class _ShuffledDocuments:
    """A `Dataset`'s documents, in another order every epoch.

    `read` returns the next few documents. At the end of an epoch it returns none, and then
    continues with the next epoch. `seek` goes to a `position`.
    """

    def __init__(self, documents: Dataset, column: str, seed: int) -> None:
        if len(documents) == 0:
            raise DataError("there are no documents in the data")
        self._documents, self._column, self._seed = documents, column, seed
        self.seek({"epoch": 0, "document": 0})

    def settings(self) -> list[Any]:
        return [len(self._documents), self._seed]

    def sample(self) -> list[Any]:
        n = min(len(self._documents), _SAMPLED_DOCUMENTS)
        return self._documents[[i * len(self._documents) // n for i in range(n)]][self._column]

    def seek(self, position: dict[str, Any]) -> None:
        self.position = position
        self._order: tuple[int, Tensor] | None = None

    def read(self) -> list[Any]:
        epoch, start = self.position["epoch"], self.position["document"]
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._documents), self._seed, epoch))
        rows = self._order[1][start : start + DOCUMENTS_PER_CALL].tolist()
        if not rows:
            self.position = {"epoch": epoch + 1, "document": 0}
            return []
        self.position = {"epoch": epoch, "document": start + len(rows)}
        return self._documents[rows][self._column]


class _StreamedDocuments:
    """An `IterableDataset`'s documents in its own order; same methods as `_ShuffledDocuments`."""

    def __init__(self, documents: IterableDataset, column: str) -> None:
        self._documents, self._column = documents, column
        self.seek({"epoch": 0, "stream": None})

    def settings(self) -> list[Any]:
        info = self._documents.info
        name = [info.dataset_name, info.config_name, str(self._documents.split)]
        return [*name, self._documents.num_shards]

    def sample(self) -> list[Any]:
        first = self._next(1)
        self.seek({"epoch": 0, "stream": None})
        if not first:
            raise DataError("there are no documents in the data")
        return first

    def seek(self, position: dict[str, Any]) -> None:
        self.position = position
        self._rows = None

    def read(self) -> list[Any]:
        epoch = self.position["epoch"]
        values = self._next(DOCUMENTS_PER_CALL)
        if values:
            self.position = {"epoch": epoch, "stream": self._documents.state_dict()}
        else:
            self.seek({"epoch": epoch + 1, "stream": None})
        return values

    def _next(self, n: int) -> list[Any]:
        try:
            if self._rows is None:
                # datasets keeps a loaded state for every later iteration; {} is the beginning.
                self._documents.load_state_dict(self.position["stream"] or {})
                self._rows = iter(self._documents)
            rows = list(islice(self._rows, n))
        except Exception as error:  # whatever the network, a broken file or a decoder raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the text cannot be read any further: {reason}") from error
        return column_values(rows, self._column)
