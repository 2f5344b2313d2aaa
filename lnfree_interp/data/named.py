"""The texts that LN-free models have been measured on, and the filter behind one of them."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

import torch
from datasets import Dataset
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lnfree_interp.data.packing import (
    DOCUMENTS_PER_CALL,
    Documents,
    check_block,
    column_values,
    encode_documents,
    pack,
)
from lnfree_interp.data.sources import STDLIB, open_text, text_column
from lnfree_interp.errors import DataError

PILE_ROWS = 10_000
"""Rows of The Pile that 2507.02559 evaluates on, 1024 tokens each."""


def _is_gpt2s(tokenizer: PreTrainedTokenizerBase) -> bool:
    """By its size and two words; others are as large."""
    known = {" the": [262], "Hello world": [15496, 995]}
    return len(tokenizer) == 50257 and all(
        tokenizer.encode(text, add_special_tokens=False) == ids for text, ids in known.items()
    )


def _openwebtext(tokenizer: PreTrainedTokenizerBase | None, block: int) -> Tensor:
    if tokenizer is None:
        raise DataError("the model has no tokenizer to read OpenWebText with")
    documents = open_text("Skylion007/openwebtext", streaming=False)
    assert isinstance(documents, Dataset)
    split = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    return pack(split["test"], tokenizer, block)


def _rows_of(source: str) -> Callable[[PreTrainedTokenizerBase | None, int], Tensor]:
    def read(tokenizer: PreTrainedTokenizerBase | None, block: int) -> Tensor:
        if tokenizer is not None and not _is_gpt2s(tokenizer):
            raise DataError(f"{source} is tokenized for GPT-2, and this is another tokenizer")
        rows = list(islice(open_text(source), PILE_ROWS))
        column = next(name for name in ("input_ids", "tokens") if name in rows[0])
        tokens = torch.tensor([row[column] for row in rows])
        if block > tokens.shape[1]:
            raise DataError(f"rows of {source} have {tokens.shape[1]} tokens, not {block}")
        return tokens[:, :block]

    return read


NAMED: dict[str, Callable[[PreTrainedTokenizerBase | None, int], Tensor]] = {
    "openwebtext-val": _openwebtext,
    "pile-10k": _rows_of("apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2"),
    "pile-10k-filtered": _rows_of("lucabaroni/apollo-pile-filtered-10k"),
}
"""By name: OpenWebText's 4,007 held-out documents (the split of nanoGPT: 0.0005, seed 2357); the
first 10,000 rows of The Pile as tokenized for GPT-2; the same without tokens that OpenWebText never
has (2507.02559)."""


def evaluation_text(
    source: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    block: int,
    blocks: int | None = None,
    *,
    split: str | None = None,
    name: str | None = None,
    column: str | None = None,
    revision: str | None = None,
) -> Int[Tensor, "blocks block"]:
    """Text to evaluate on.

    Args:
        source: `"openwebtext-val"`, `"pile-10k"` or `"pile-10k-filtered"`, texts that LN-free
            models were measured on (arXiv 2507.02559); or as for `open_text`.
        tokenizer: The model's.
        block: Tokens per block.
        blocks: How many; spread over a named text or the standard library, the first of any
            other. Default: all, or the first 256 of any other.
        split: See `open_text`. Default: `"heldout"` of the standard library, `"train"` of others.
        name: See `open_text`.
        column: See `open_text`.
        revision: See `open_text`.

    Returns:
        Token ids [blocks, block], on the CPU.

    Raises:
        DataError: if the text cannot be had or there is less of it, the tokenizer is missing, or a
            named text is tokenized for another one.

    Examples:
        >>> lf.evaluation_text("stdlib", model.tokenizer, block=128, blocks=8).shape
        torch.Size([8, 128])
    """
    if blocks is not None and blocks < 1:
        raise DataError(f"{blocks} blocks are no text")
    if source in NAMED:
        if any(one is not None for one in (split, name, column, revision)):
            raise DataError(
                f"{source} is one fixed text: it has no split, name, column or revision"
            )
        tokens = NAMED[str(source)](tokenizer, block)
    elif source == STDLIB:
        documents = open_text(STDLIB, split=split or "heldout", name=name, revision=revision)
        chosen, _ = text_column(documents, column)
        tokens = pack(documents, _need(tokenizer), block, column=chosen)
    else:
        documents = open_text(
            source, split=split or "train", name=name, column=column, revision=revision
        )
        chosen, _ = text_column(documents, column)
        tokens = _first(documents, tokenizer, block, blocks or 256, chosen)
        if blocks is not None and len(tokens) < blocks:
            raise DataError(f"{source} has {len(tokens)} blocks of {block} tokens, not {blocks}")
        return tokens
    if blocks is None:
        return tokens
    if blocks > len(tokens):
        raise DataError(f"{source} has {len(tokens)} blocks of {block} tokens, not {blocks}")
    return spread(tokens, blocks)


def spread(tokens: Int[Tensor, "blocks block"], n: int) -> Int[Tensor, "n block"]:
    """So many blocks, at even distances from the first; all where there are not more."""
    n = min(n, len(tokens))
    return tokens[torch.arange(n) * len(tokens) // n]


def _first(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase | None,
    block: int,
    blocks: int,
    column: str,
) -> Int[Tensor, "some block"]:
    """The first blocks of a text, fewer if it ends; nothing is read twice."""
    check_block(block)
    rows = cast(Iterator[Mapping[str, Any]], iter(documents))
    parts, missing = [], blocks * block
    while missing > 0 and (batch := list(islice(rows, DOCUMENTS_PER_CALL))):
        parts.append(encode_documents(column_values(batch, column), tokenizer))
        missing -= len(parts[-1])
    stream = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
    n_blocks = min(blocks, len(stream) // block)
    if n_blocks == 0:
        raise DataError(f"{len(stream)} tokens of text do not fill one block of {block}")
    return stream[: n_blocks * block].view(n_blocks, block)


def _need(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise DataError("the model has no tokenizer: give text that is tokenized already")
    return tokenizer


def tokens_seen(blocks: Iterable[Int[Tensor, "_ block"]], d_vocab: int) -> Bool[Tensor, " d_vocab"]:
    """Which tokens occur in a text, read batch by batch.

    Args:
        blocks: Batches of token ids, [batch, block] each.
        d_vocab: Size of the vocabulary.

    Returns:
        True for the tokens that occur, [d_vocab].

    Raises:
        DataError: if an id is outside the vocabulary.

    Examples:
        >>> seen = lf.tokens_seen([tokens[:2], tokens[2:]], model.cfg.d_vocab)
        >>> seen.shape, bool(seen[tokens].all())
        (torch.Size([4096]), True)
    """
    seen = torch.zeros(d_vocab, dtype=torch.bool)
    for batch in blocks:
        if batch.numel() and not 0 <= int(batch.min()) <= int(batch.max()) < d_vocab:
            raise DataError(f"token ids go up to {int(batch.max())}, the vocabulary to {d_vocab}")
        seen[batch.flatten()] = True
    return seen


def without_tokens(
    blocks: Int[Tensor, "blocks block"], unwanted: Bool[Tensor, " d_vocab"]
) -> Int[Tensor, "kept block"]:
    """The blocks in which no unwanted token occurs.

    The published filter (2507.02559) drops blocks of The Pile with any token that occurs in a
    million rows of The Pile and in none of a million of OpenWebText:
    `without_tokens(pile, tokens_seen(pile_rows, n) & ~tokens_seen(openwebtext_rows, n))`. Three
    such blocks in 10,000 wreck the mean of an LN-free GPT-2 XL.

    Args:
        blocks: Token ids [blocks, block].
        unwanted: True for the tokens to be avoided, [d_vocab].

    Returns:
        The blocks that are kept, [kept, block], in their order.

    Examples:
        >>> unwanted = ~lf.tokens_seen([tokens[:2]], model.cfg.d_vocab)
        >>> len(lf.without_tokens(tokens[:2], unwanted))
        2
    """
    return blocks[~unwanted[blocks].any(1)]
