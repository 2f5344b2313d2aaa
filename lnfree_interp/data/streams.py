"""Documents of any number, packed into blocks as they are needed.

A position is where the oldest document in use was read and how many tokens from there are used:
small, whatever the documents' length. Going back to it reads those documents again.
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

from lnfree_interp.data.blocks import check_take, epoch_order
from lnfree_interp.data.packing import (
    DOCUMENTS_PER_CALL,
    check_block,
    column_values,
    encode_documents,
)
from lnfree_interp.errors import DataError

_SAMPLED_DOCUMENTS = 64  # that a fingerprint reads


class PackedStream:
    """Documents packed like `pack`, without end and without holding the text; a `TokenBlocks`.

    What does not fill the last block of an epoch is the start of the next epoch's first, so that
    no token is lost and a text shorter than a block is repeated until it fills one.

    Args:
        documents: A `Dataset`, whose documents come in a fresh order every epoch; or an
            `IterableDataset`, which is read from its beginning in its own order, the same every
            epoch. Give it no `shuffle()` buffer: the rows in that buffer are lost when a run is
            resumed. The object given is left as it is.
        tokenizer: As for `encode_documents`; `None` will do for token ids.
        block: Tokens per block, at most the model's `n_ctx`.
        column: Holds strings, or lists of token ids, which are packed with no token added.
        seed: Of the order of a `Dataset`'s documents.

    Raises:
        DataError: if there is no document, the column is missing, or the first document cannot be
            read. `take` raises it for a document that is neither text nor token ids, and if a
            whole epoch holds no token.
    """

    def __init__(
        self,
        documents: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase | None,
        block: int,
        column: str = "text",
        *,
        seed: int = 0,
    ) -> None:
        check_block(block)
        self.block = block
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
        settings: list[Any] = [*self._documents.settings(), column, block]
        if isinstance(sample[0], str) and tokenizer is not None:
            settings += [tokenizer.eos_token_id, sorted(tokenizer.get_vocab().items())]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for value in sample:
            digest.update(json.dumps(value, default=str).encode())
        self._fingerprint = digest.hexdigest()
        self._chunks: deque[tuple[dict[str, Any], Tensor]] = deque()  # position before, tokens
        self._used = 0  # of the tokens read

    @property
    def epoch(self) -> int:
        """As `TokenBlocks.epoch`."""
        return self._position()["epoch"]

    def take(self, n: int) -> Int[Tensor, "n block"]:
        """As `TokenBlocks.take`."""
        check_take(n)
        # One token more than is taken: the next block's epoch is then known.
        self._read_ahead(n * self.block + 1)
        missing, parts = n * self.block, []
        while missing:
            tokens = self._chunks[0][1][self._used : self._used + missing]
            parts.append(tokens)
            missing -= len(tokens)
            self._used += len(tokens)
            self._drop_used()
        return torch.cat(parts).view(n, self.block)

    def state_dict(self) -> dict[str, Any]:
        """As `TokenBlocks.state_dict`."""
        return {"position": self._position(), "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `TokenBlocks.load_state_dict`."""
        self._documents.seek(state["position"])
        self._chunks.clear()
        self._used = state["used"]

    def fingerprint(self) -> str:
        """As `TokenBlocks.fingerprint`.

        Of a `Dataset`: the number of documents, at most 64 of them in full, and the seed; of an
        `IterableDataset`: its name, number of files and first document. Both: the vocabulary, the
        column and the block.
        """
        return self._fingerprint

    def _position(self) -> dict[str, Any]:
        return self._chunks[0][0] if self._chunks else self._documents.position

    def _read_ahead(self, wanted: int) -> None:
        """Read until so many tokens are unused."""
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
                if ends == 2:  # a whole epoch lies between two ends
                    raise DataError("the data holds documents, but not one token: use other text")
            elif len(tokens):
                self._chunks.append((position, tokens))
                unused += len(tokens)
                self._drop_used()
                ends = 0

    def _drop_used(self) -> None:
        while self._chunks and self._used >= len(self._chunks[0][1]):
            self._used -= len(self._chunks.popleft()[1])


class _ShuffledDocuments:
    """A `Dataset`'s documents, in a fresh order every epoch.

    `read` gives the next few, and none at the end of an epoch, after which it goes on with the
    next; `position` is what `seek` takes to read the same again.
    """

    def __init__(self, documents: Dataset, column: str, seed: int) -> None:
        if len(documents) == 0:
            raise DataError("the data holds no documents")
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
    """An `IterableDataset`'s documents in its own order; used as `_ShuffledDocuments` is."""

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
            raise DataError("the data holds no documents")
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
                # A state once loaded would be every later start too; an empty one is the beginning.
                self._documents.load_state_dict(self.position["stream"] or {})
                self._rows = iter(self._documents)
            rows = list(islice(self._rows, n))
        except Exception as error:  # whatever the network, a broken file or a decoder raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the text cannot be read on: {reason}") from error
        return column_values(rows, self._column)
