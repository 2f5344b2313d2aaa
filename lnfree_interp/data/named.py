"""Texts to evaluate on, by name or by source, and the filter behind one of them."""

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
    check_length,
    column_values,
    encode_documents,
    pack,
)
from lnfree_interp.data.sources import STDLIB, open_text, require_name, text_column
from lnfree_interp.errors import DataError

PILE_ROWS = 10_000
"""Rows of The Pile that 2507.02559 evaluates on, 1024 tokens each."""


def _is_gpt2s(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Decided by the size and two words, because other vocabularies are as large."""
    known = {" the": [262], "Hello world": [15496, 995]}
    return len(tokenizer) == 50257 and all(
        tokenizer.encode(text, add_special_tokens=False) == ids for text, ids in known.items()
    )


def _openwebtext(tokenizer: PreTrainedTokenizerBase | None, sequence_length: int) -> Tensor:
    if tokenizer is None:
        raise DataError("OpenWebText is text, and the model has no tokenizer to read it")
    documents = open_text("Skylion007/openwebtext", streaming=False)
    assert isinstance(documents, Dataset)
    split = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    return pack(split["test"], tokenizer, sequence_length)


def _rows_of(source: str) -> Callable[[PreTrainedTokenizerBase | None, int], Tensor]:
    def read(tokenizer: PreTrainedTokenizerBase | None, sequence_length: int) -> Tensor:
        if tokenizer is not None and not _is_gpt2s(tokenizer):
            raise DataError(f"{source} was tokenized for GPT-2; the model has another tokenizer")
        rows = list(islice(open_text(source), PILE_ROWS))
        column = next(name for name in ("input_ids", "tokens") if name in rows[0])
        tokens = torch.tensor([row[column] for row in rows])
        if sequence_length > tokens.shape[1]:
            raise DataError(
                f"rows of {source} have {tokens.shape[1]} tokens, fewer than sequence_length "
                f"{sequence_length}"
            )
        return tokens[:, :sequence_length]

    return read


NAMED: dict[str, Callable[[PreTrainedTokenizerBase | None, int], Tensor]] = {
    "openwebtext-val": _openwebtext,
    "pile-10k": _rows_of("apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2"),
    "pile-10k-filtered": _rows_of("lucabaroni/apollo-pile-filtered-10k"),
}
"""Texts that LN-free models have been measured on (2507.02559): OpenWebText's 4,007 held-out
documents (nanoGPT's split: 0.0005, seed 2357); the first 10,000 rows of The Pile, tokenized for
GPT-2; the same rows without tokens that never occur in OpenWebText."""


def evaluation_text(
    source: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    sequence_length: int,
    sequences: int | None = None,
    *,
    split: str | None = None,
    name: str | None = None,
    column: str | None = None,
    revision: str | None = None,
) -> Int[Tensor, "sequence pos"]:
    """Text to evaluate on.

    Args:
        source: `"openwebtext-val"`, `"pile-10k"` or `"pile-10k-filtered"`, texts that LN-free
            models were measured on (arXiv 2507.02559); or `"stdlib"`, local files, or a data set
            on the hub, see `open_text`.
        tokenizer: The model's.
        sequence_length: Tokens per sequence, at most the model's `n_ctx`.
        sequences: How many sequences. Those of a named text or of the standard library are spread
            over the whole text; of any other text they are the first ones. Default: all, or the
            first 256 of any other text.
        split: The split of the text. Default: `"heldout"` of the standard library, `"train"` of
            others.
        name: The configuration of a data set on the hub.
        column: The column of text or of token ids. Default: see `open_text`.
        revision: The branch, tag or commit of a data set on the hub.

    Returns:
        Token ids [sequence, pos], on the CPU.

    Raises:
        DataError: if the text does not exist, cannot be read or is shorter than asked for, if the
            tokenizer is missing, or if a named text was tokenized for another tokenizer.

    Examples:
        >>> lf.evaluation_text("stdlib", model.tokenizer, sequence_length=128, sequences=8).shape
        torch.Size([8, 128])
    """
    require_name(source)
    if sequences is not None and sequences < 1:
        raise DataError(f"sequences is {sequences}; it must be 1 or more")
    if source in NAMED:
        if any(one is not None for one in (split, name, column, revision)):
            raise DataError(
                f"{source} is a fixed text: split, name, column and revision cannot be chosen"
            )
        tokens = NAMED[str(source)](tokenizer, sequence_length)
    elif source == STDLIB:
        documents = open_text(STDLIB, split=split or "heldout", name=name, revision=revision)
        chosen, _ = text_column(documents, column)
        tokens = pack(documents, _need(tokenizer), sequence_length, column=chosen)
    else:
        documents = open_text(
            source, split=split or "train", name=name, column=column, revision=revision
        )
        chosen, _ = text_column(documents, column)
        tokens = _first(documents, tokenizer, sequence_length, sequences or 256, chosen)
    if sequences is None:
        return tokens
    if sequences > len(tokens):
        raise DataError(
            f"{source} has {len(tokens)} sequences of {sequence_length} tokens, fewer than "
            f"{sequences}"
        )
    return spread(tokens, sequences)


def spread(tokens: Int[Tensor, "sequence pos"], n: int) -> Int[Tensor, "n pos"]:
    """n sequences at even distances, beginning with the first; all if there are fewer."""
    n = min(n, len(tokens))
    return tokens[torch.arange(n) * len(tokens) // n]


def _first(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase | None,
    sequence_length: int,
    sequences: int,
    column: str,
) -> Int[Tensor, "some pos"]:
    """The first sequences of a text, fewer if it ends; each document is read once."""
    check_length(sequence_length)
    rows = cast(Iterator[Mapping[str, Any]], iter(documents))
    parts, missing = [], sequences * sequence_length
    while missing > 0 and (batch := list(islice(rows, DOCUMENTS_PER_CALL))):
        parts.append(encode_documents(column_values(batch, column), tokenizer))
        missing -= len(parts[-1])
    stream = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
    n_sequences = min(sequences, len(stream) // sequence_length)
    if n_sequences == 0:
        raise DataError(
            f"the text has {len(stream)} tokens, too few for one sequence of {sequence_length}"
        )
    return stream[: n_sequences * sequence_length].view(n_sequences, sequence_length)


def _need(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise DataError("the model has no tokenizer: give text that was tokenized before")
    return tokenizer


def tokens_seen(batches: Iterable[Int[Tensor, "_ pos"]], d_vocab: int) -> Bool[Tensor, " d_vocab"]:
    """Which tokens occur in a text, read batch by batch.

    Args:
        batches: Token ids, [batch, pos] each.
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
    for batch in batches:
        if batch.numel() and not 0 <= int(batch.min()) <= int(batch.max()) < d_vocab:
            raise DataError(f"token ids go up to {int(batch.max())}, the vocabulary to {d_vocab}")
        seen[batch.flatten()] = True
    return seen


def without_tokens(
    sequences: Int[Tensor, "sequence pos"], unwanted: Bool[Tensor, " d_vocab"]
) -> Int[Tensor, "kept pos"]:
    """The sequences in which no unwanted token occurs.

    The published filter (2507.02559) removes the sequences of The Pile with any token that occurs
    in a million rows of The Pile and in none of a million rows of OpenWebText:
    `without_tokens(pile, tokens_seen(pile_rows, n) & ~tokens_seen(openwebtext_rows, n))`. Three
    such sequences in 10,000 make the mean loss of an LN-free GPT-2 XL useless.

    Args:
        sequences: Token ids [sequence, pos].
        unwanted: True for the tokens to be avoided, [d_vocab].

    Returns:
        The sequences that are kept, [kept, pos], in their order.

    Examples:
        >>> unwanted = ~lf.tokens_seen([tokens[:2]], model.cfg.d_vocab)
        >>> len(lf.without_tokens(tokens[:2], unwanted))
        2
    """
    return sequences[~unwanted[sequences].any(1)]
