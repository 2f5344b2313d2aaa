"""From documents to sequences of tokens of one length."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lnfree_interp.errors import DataError

Document = str | Sequence[int] | Mapping[str, Any]
"""A text, its token ids, or a row with a column of either."""

Documents = Iterable[Document] | Dataset | IterableDataset
"""One item per document."""

DOCUMENTS_PER_CALL = 64
"""How many documents go to the tokenizer at once; it works on them in parallel."""


def column_values(documents: Iterable[Any], column: str) -> list[Any]:
    """The text or token ids of some documents.

    Args:
        documents: Rows; or texts or token ids themselves, which are returned as they are.
        column: The column to take from rows.

    Raises:
        DataError: if a row lacks the column.
    """
    values = []
    for document in documents:
        if not isinstance(document, Mapping):
            values.append(document)
        elif column in document:
            values.append(document[column])
        else:
            raise DataError(f"no column {column!r} in the data; its columns are {list(document)}")
    return values


def _require_several(documents: Any) -> None:
    """Refuse one document, or several data sets, in place of a list of documents."""
    if isinstance(documents, str | bytes):
        raise DataError(
            f"documents is one {type(documents).__name__}: give a list of documents, such as "
            "[text]; open_text reads files"
        )
    if isinstance(documents, DatasetDict | IterableDatasetDict):
        raise DataError(f"documents has the splits {list(documents)}: choose one of them")
    if isinstance(documents, Mapping):
        raise DataError("documents is one row: give a list of rows")
    if not isinstance(documents, Iterable):
        raise DataError(
            f"documents is a {type(documents).__name__}: give a list of texts, or rows with a "
            "column of text"
        )


def encode_documents(
    values: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None
) -> Int[Tensor, " stream"]:
    """The tokens of some documents, one document after the other.

    Args:
        values: Either strings or lists of token ids; the first one decides which. One end-of-text
            token is added after each string, and none in front of it: a document follows the
            end-of-text token of the document before, as in GPT-2's training. Token ids are taken
            as they are.
        tokenizer: For strings it must have an `eos_token_id`. Token ids must lie in its vocabulary;
            with `None` they are not checked.

    Returns:
        Token ids [stream].

    Raises:
        DataError: if a document is neither text nor token ids, if a token id is outside the
            vocabulary, or if the tokenizer has no end-of-text token.
    """
    if not values:
        return torch.empty(0, dtype=torch.long)
    if not isinstance(values[0], str):
        size = None if tokenizer is None else len(tokenizer)
        return torch.cat([_token_ids(value, size) for value in values])
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token: set its eos_token to pack text")
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"a document is a {type(value).__name__}, not text: remove that row")
    # verbose=False: no warning about documents that are longer than the context.
    encoded = tokenizer(list(values), add_special_tokens=False, verbose=False)
    stream: list[int] = []
    for ids in encoded["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    return torch.tensor(stream, dtype=torch.long)


def token_stream(
    documents: Documents, tokenizer: PreTrainedTokenizerBase | None, column: str = "text"
) -> Int[Tensor, " stream"]:
    """The tokens of all documents, with one end-of-text token after each text.

    Args:
        documents: Texts, lists of token ids, or rows with a column of either.
        tokenizer: Must have an end-of-text token to read text; see `encode_documents`.
        column: The column of rows.

    Returns:
        Token ids [stream].

    Raises:
        DataError: if there are no documents, a row lacks the column, or a document cannot be read
            (see `encode_documents`).
    """
    _require_several(documents)
    parts: list[Tensor] = []
    rows = iter(documents)
    while batch := list(islice(rows, DOCUMENTS_PER_CALL)):
        parts.append(encode_documents(column_values(batch, column), tokenizer))
    if not parts:
        raise DataError("there are no documents in the data")
    return torch.cat(parts)


def pack(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase | None,
    sequence_length: int,
    column: str = "text",
    *,
    prepend_bos: bool = False,
) -> Int[Tensor, "sequence pos"]:
    """Put documents one after the other and cut them into sequences of one length.

    One end-of-text token follows each text. Tokens at the end that do not fill a sequence are
    dropped.

    Args:
        documents: A list or an iterator of texts, of lists of token ids, or of rows with a column
            of either, such as a `datasets.Dataset`, streamed or not.
        tokenizer: The model's. For token ids it may be `None`: they are then not checked against
            its vocabulary.
        sequence_length: Tokens per sequence, at most the model's `n_ctx`.
        column: The column of rows that holds the text or the token ids.
        prepend_bos: Whether each sequence begins with the tokenizer's beginning-of-text token, as
            TransformerLens' prompts do; the text fills the other positions.

    Returns:
        Token ids [sequence, pos], on the CPU.

    Raises:
        DataError: if there are no documents, a row lacks the column, a document is neither text nor
            token ids of the vocabulary, the tokenizer has no end-of-text token or not the
            beginning-of-text token that is asked for, or the text does not fill one sequence.

    Examples:
        >>> lf.pack(["import os", "import sys"], model.tokenizer, sequence_length=4).shape
        torch.Size([1, 4])
        >>> documents = lf.stdlib_corpus("heldout").select(range(5))
        >>> lf.pack(documents, model.tokenizer, sequence_length=128).shape
        torch.Size([..., 128])
    """
    check_length(sequence_length)
    bos = bos_token(tokenizer, sequence_length) if prepend_bos else None
    stream = token_stream(documents, tokenizer, column)
    of_text = text_length(sequence_length, bos)
    n_sequences = len(stream) // of_text
    if n_sequences == 0:
        raise DataError(
            f"the text has {len(stream)} tokens, too few for one sequence of {sequence_length}: "
            "give more text or a smaller sequence_length"
        )
    return behind_bos(stream[: n_sequences * of_text].view(n_sequences, of_text), bos)


def bos_token(tokenizer: PreTrainedTokenizerBase | None, sequence_length: int) -> int:
    """The token that sequences begin with.

    Raises:
        DataError: if the tokenizer has none, or it leaves no place for text.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise DataError(
            "the tokenizer has no beginning-of-text token to prepend: set its bos_token, or leave "
            "prepend_bos"
        )
    if sequence_length < 2:
        raise DataError(
            f"a beginning-of-text token fills sequences of length {sequence_length}: make them "
            "longer"
        )
    return bos


def text_length(sequence_length: int, bos: int | None) -> int:
    """How many tokens of a sequence are text."""
    return sequence_length - (bos is not None)


def behind_bos(text: Int[Tensor, "sequence text"], bos: int | None) -> Int[Tensor, "sequence pos"]:
    """Sequences of text with the token in front, if there is one."""
    return text if bos is None else torch.nn.functional.pad(text, (1, 0), value=bos)


def check_length(sequence_length: int) -> None:
    """Refuse a length below 1.

    Raises:
        DataError: if it is.
    """
    if sequence_length < 1:
        raise DataError(f"sequence_length is {sequence_length}; it must be 1 or more")


def _token_ids(value: Any, size: int | None) -> Int[Tensor, " ids"]:
    """A document's token ids, checked against the size of the vocabulary if it is known."""
    ids = np.asarray(value)
    if ids.size == 0 and ids.ndim == 1:
        return torch.empty(0, dtype=torch.long)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(
            f"a document is a {type(value).__name__}, neither text nor a list of token ids: choose "
            "another column or remove that row"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        raise DataError(
            f"token id {low if low < 0 else high} is outside the tokenizer's vocabulary of {size}: "
            "this text was tokenized for another model"
        )
    return torch.from_numpy(ids.astype(np.int64))
