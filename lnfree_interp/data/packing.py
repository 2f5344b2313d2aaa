"""Documents to fixed blocks of tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lnfree_interp.errors import DataError

Documents = Iterable[Mapping[str, Any]] | Dataset | IterableDataset
"""One document a row."""

DOCUMENTS_PER_CALL = 64
"""Documents that are tokenized together: a call tokenizes its documents in parallel."""


def column_values(rows: Iterable[Mapping[str, Any]], column: str) -> list[Any]:
    """One column of some rows.

    Raises:
        DataError: if a row lacks the column.
    """
    values = []
    for row in rows:
        if column not in row:
            raise DataError(f"no column {column!r} in the data; its columns are {list(row)}")
        values.append(row[column])
    return values


def encode_documents(
    values: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None
) -> Int[Tensor, " stream"]:
    """The tokens of some documents, back to back.

    Args:
        values: Strings, each closed by one end-of-text token; or, if the first is none, sequences
            of token ids, which are taken as they are.
        tokenizer: Must have an `eos_token_id` if the documents are strings. No token is added in
            front of a document: the end-of-text of the one before is what a document starts from,
            as in GPT-2's training. For token ids it gives the range that they are checked against
            (`None`: not checked).

    Raises:
        DataError: if a value is neither, an id is outside the vocabulary, or the tokenizer has no
            end-of-text token.
    """
    if not values:
        return torch.empty(0, dtype=torch.long)
    if not isinstance(values[0], str):
        size = None if tokenizer is None else len(tokenizer)
        return torch.cat([_token_ids(value, size) for value in values])
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token (eos_token): set one to pack text")
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"a document is a {type(value).__name__}, not text: drop that row")
    # Long documents are expected here (verbose=False): they are cut into blocks afterwards.
    encoded = tokenizer(list(values), add_special_tokens=False, verbose=False)
    stream: list[int] = []
    for ids in encoded["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    return torch.tensor(stream, dtype=torch.long)


def token_stream(
    documents: Documents, tokenizer: PreTrainedTokenizerBase | None, column: str = "text"
) -> Int[Tensor, " stream"]:
    """Every document's tokens, each document closed by one end-of-text token.

    Args:
        documents: Rows with a text column, such as a `datasets.Dataset`, streamed or not.
        tokenizer: As for `encode_documents`.
        column: The text column's name.

    Raises:
        DataError: as `encode_documents`, and if a row lacks the column or there is no text at all.
    """
    parts: list[Tensor] = []
    rows = cast(Iterator[Mapping[str, Any]], iter(documents))
    while batch := list(islice(rows, DOCUMENTS_PER_CALL)):
        parts.append(encode_documents(column_values(batch, column), tokenizer))
    if not parts:
        raise DataError("the data holds no documents")
    return torch.cat(parts)


def pack(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase | None,
    block: int,
    column: str = "text",
) -> Int[Tensor, "blocks block"]:
    """Documents packed back to back into blocks of equal length; the last partial block is dropped.

    Args:
        documents: Rows with a text column, such as a `datasets.Dataset`, streamed or not.
        tokenizer: Closes each document with its end-of-text token and adds none in front; for token
            ids it gives the range that they are checked against (`None`: not checked).
        block: Tokens per block, at most the model's `n_ctx`.
        column: The column of text, or of token ids, which are taken as they are.

    Returns:
        Token ids [blocks, block], on the CPU.

    Raises:
        DataError: if a row lacks the column or holds neither text nor token ids of the vocabulary,
            the tokenizer has no end-of-text token, or the text is shorter than one block.

    Examples:
        >>> documents = lf.stdlib_corpus("heldout").select(range(5))
        >>> lf.pack(documents, model.tokenizer, block=128).shape
        torch.Size([..., 128])
    """
    check_block(block)
    stream = token_stream(documents, tokenizer, column)
    n_blocks = len(stream) // block
    if n_blocks == 0:
        raise DataError(f"{len(stream)} tokens of text do not fill one block of {block}")
    return stream[: n_blocks * block].view(n_blocks, block)


def check_block(block: int) -> None:
    """Refuse a block without tokens.

    Raises:
        DataError: if the block is shorter than one token.
    """
    if block < 1:
        raise DataError(f"a block of {block} tokens cannot be packed")


def _token_ids(value: Any, size: int | None) -> Int[Tensor, " ids"]:
    """A row of token ids, checked; `size` is the vocabulary's, if known."""
    ids = np.asarray(value)
    if ids.size == 0 and ids.ndim == 1:
        return torch.empty(0, dtype=torch.long)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(
            f"a document is neither text nor a list of token ids, but a {type(value).__name__}: "
            "name another column"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (size is not None and high >= size):
        raise DataError(
            f"token id {low if low < 0 else high} is outside the tokenizer's vocabulary of {size}: "
            "this text was tokenized for another model"
        )
    return torch.from_numpy(ids.astype(np.int64))
