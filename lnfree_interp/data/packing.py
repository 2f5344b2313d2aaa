"""Documents to fixed blocks of tokens."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lnfree_interp.errors import DataError

_DOCUMENTS_PER_CALL = 64  # a call tokenizes its documents in parallel


def token_stream(
    documents: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, column: str = "text"
) -> Int[Tensor, " stream"]:
    """Every document's tokens, each document closed by one end-of-text token.

    Args:
        documents: Rows with a text column, such as a `datasets.Dataset`, streamed or not.
        tokenizer: Must have an `eos_token_id`. No token is added in front of a document: the
            end-of-text of the one before is what a document starts from, as in GPT-2's training.
        column: The text column's name.

    Raises:
        DataError: if the tokenizer has no end-of-text token, a row lacks the column, or there is
            no text at all.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token (eos_token): set one to pack text")
    stream: list[int] = []
    rows = iter(documents)
    while batch := list(islice(rows, _DOCUMENTS_PER_CALL)):
        for row in batch:
            if column not in row:
                raise DataError(f"no column {column!r} in the data; its columns are {list(row)}")
        # Long documents are expected here (verbose=False): they are cut into blocks afterwards.
        encoded = tokenizer([row[column] for row in batch], add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
    if not stream:
        raise DataError("the data holds no documents")
    return torch.tensor(stream, dtype=torch.long)


def pack(
    documents: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    block: int,
    column: str = "text",
) -> Int[Tensor, "blocks block"]:
    """Documents packed back to back into blocks of equal length; the last partial block is dropped.

    Args:
        documents: As for `token_stream`.
        tokenizer: As for `token_stream`.
        block: Tokens per block, at most the model's `n_ctx`.
        column: The text column's name.

    Raises:
        DataError: as `token_stream`, and if the text is shorter than one block.
    """
    if block < 1:
        raise DataError(f"a block of {block} tokens cannot be packed")
    stream = token_stream(documents, tokenizer, column)
    n_blocks = len(stream) // block
    if n_blocks == 0:
        raise DataError(f"{len(stream)} tokens of text do not fill one block of {block}")
    return stream[: n_blocks * block].view(n_blocks, block)
