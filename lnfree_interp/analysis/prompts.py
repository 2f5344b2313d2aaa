"""Prompts and answers as a caller gives them, read as tokens."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lnfree_interp.analysis.view import View
from lnfree_interp.errors import DataError
from lnfree_interp.models.running import require_tokens

Answer = str | int
"""A token: a string that is one token (mind the leading space), or its id."""
Answers = Answer | Sequence[Any] | Tensor | np.ndarray | np.integer
"""One token or several, for one prompt or for each of several."""
Prompt = str | Sequence[Any] | Tensor | np.ndarray
"""Text; token ids, [pos] or [prompt, pos], in a tensor, array or list; or a list of these."""
LONG_RUN = 8
"""So many padding tokens in a row are never taken for text, whatever the question."""


def read_prompts(
    view: View, prompt: Prompt, prepend_bos: bool | None = None, attention_mask: Any = None
) -> tuple[list[Int[Tensor, " _"]], bool, list[int]]:
    """The tokens of each prompt; whether the caller gave one prompt and not a batch; and which
    prompts were token ids without a mask, where padding may have gone unnoticed.

    Args:
        view: The model, for its tokenizer, context and vocabulary.
        prompt: One prompt or several, as text or token ids; several need not be equally long.
        prepend_bos: Whether each text starts with the beginning-of-sequence token; nothing is added
            to token ids. Default: what the model does, `cfg.default_prepend_bos`.
        attention_mask: 0 where a row of token ids is padding, on either side. With a mask, nothing
            else is taken for padding.

    Raises:
        DataError: if a prompt is empty, longer than the context or outside the vocabulary, or the
            mask does not fit.
    """
    given = _as_ids(prompt, whole=attention_mask is not None)
    single = isinstance(given, str) or (isinstance(given, Tensor) and given.ndim == 1)
    unmasked: list[int] = []
    if isinstance(given, Tensor):
        if given.ndim not in (1, 2):
            raise DataError(f"token ids are [pos] or [prompt, pos], not {list(given.shape)}")
        rows = list(torch.atleast_2d(given))
        if attention_mask is not None:
            rows = _unpadded(rows, attention_mask)
        else:
            unmasked = list(range(len(rows)))
    elif attention_mask is not None:
        raise DataError(
            "an attention mask belongs to token ids of one length, [prompt, pos]: give such ids, "
            "or no mask"
        )
    else:
        each = [given] if isinstance(given, str) else [_as_ids(one) for one in given]
        rows = [_row(view, one, prepend_bos) for one in each]
        unmasked = [i for i, one in enumerate(each) if not isinstance(one, str)]
    if not rows or any(row.numel() == 0 for row in rows):
        raise DataError("a prompt is empty: give at least one token")
    rows = [row.to(view.device) for row in rows]
    for row in rows:
        require_tokens(view.model, row)
    return rows, single, unmasked


def _as_ids(given: Any, whole: bool = False) -> Any:
    """Whole numbers in any container as a tensor; text and lists of prompts unchanged, unless these
    are rows of one tensor, as a mask says."""
    if isinstance(given, str):
        return given
    if isinstance(given, Sequence) and any(
        isinstance(one, str | Sequence) or getattr(one, "ndim", 0) for one in given
    ):
        rows = [isinstance(one, Sequence) and not isinstance(one, str) for one in given]
        if not (whole and all(rows) and len({len(one) for one in given}) == 1):
            return given
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"a prompt is text or token ids, not {given!r:.60}: give a string, or whole numbers"
        ) from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise DataError(f"token ids are whole numbers, not {ids.dtype}: give ids, such as int64")
    return ids.long()


def _row(view: View, one: Any, prepend_bos: bool | None) -> Int[Tensor, " _"]:
    if isinstance(one, str):
        return torch.tensor(view.tokenize(one, prepend_bos), dtype=torch.long)
    if not isinstance(one, Tensor):
        raise DataError(f"a prompt is text or token ids, not {one!r:.60}")
    if one.ndim != 1:
        raise DataError(
            f"one of several prompts is [pos], not {list(one.shape)}: give a list of rows of token "
            "ids, or one tensor [prompt, pos]"
        )
    return one


def _unpadded(rows: list[Tensor], attention_mask: Any) -> list[Tensor]:
    try:
        mask = torch.atleast_2d(torch.as_tensor(attention_mask))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"an attention mask is numbers, not {attention_mask!r:.60}") from error
    if mask.shape != (len(rows), len(rows[0])):
        raise DataError(
            f"there are {len(rows)} rows of {len(rows[0])} tokens, but the attention mask has the "
            f"shape {list(mask.shape)}: give a mask of the shape of the token ids"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise DataError("an attention mask is 1 where there is text and 0 where there is padding")
    shortened = []
    for row, kept in zip(rows, mask.bool().to(rows[0].device), strict=True):
        where = kept.nonzero()[:, 0]
        if len(where) and not kept[where[0] : where[-1] + 1].all():
            raise DataError("the attention mask has a hole: padding can only be at the ends")
        shortened.append(row[kept])
    return shortened


def find_padding(model: Any, rows: Iterable[tuple[int, Tensor]], least: int = 1) -> str | None:
    """A message about a row that seems padded: padding read as text would change every number
    unnoticed.

    A padding token of its own is never text. Where end-of-text stands in for padding, as
    TransformerLens allows, a row that ends in `least` of these tokens, or begins with `least` and
    at least two, is taken for padded.

    Returns:
        The message; None if no row seems padded.
    """
    tokenizer = model.tokenizer
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return None
    doubles = pad in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    first = max(2, least)
    for number, row in rows:
        if doubles:
            ends = len(row) > least and bool((row[len(row) - least :] == pad).all())
            padded = ends or (len(row) >= first and bool((row[:first] == pad).all()))
        else:
            padded = bool(len(row) and pad in (row[0], row[-1]))
        if padded:
            return (
                f"prompt {number} begins or ends with the padding token {pad}. If that is padding, "
                "pass attention_mask, or pass the texts, which need not be equally long; if it is "
                "text, pass attention_mask=torch.ones_like(tokens)"
            )
    return None


def read_sequences(model: Any, tokens: Any, *, packed: bool = False) -> Int[Tensor, "sequence pos"]:
    """Sequences for measures of every next token, checked, on the model's device.

    Args:
        model: A `HookedTransformer` in any form, or a `TransformerBridge`.
        tokens: Token ids, [sequence, pos].
        packed: Whether sequences are cut from one stream of text, so that none can be padded.

    Raises:
        DataError: if these are not token ids, have no next token, or seem padded.
    """
    ids = _as_ids(tokens)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(tokens).__name__
        raise DataError(f"text is token ids, [sequence, pos], not {shape}")
    require_tokens(model, ids)
    require_next_tokens(model, ids)
    # A few end-of-text tokens at either end are text (empty documents); a long run is padding.
    if not packed and (padded := find_padding(model, enumerate(ids), LONG_RUN)):
        raise DataError(padded)
    return ids.to(next(model.parameters()).device)


def require_next_tokens(model: Any, tokens: Int[Tensor, "sequence pos"]) -> None:
    """Refuse sequences that have no next token, or one that the model has no logit for.

    Raises:
        DataError: if there is one.
    """
    if tokens.shape[1] < 2:
        raise DataError("a sequence of one token has no next token: give at least two")
    size = model.cfg.d_vocab_out
    if tokens[:, 1:].max() >= size:
        raise DataError(
            f"the model has logits for tokens 0 to {size - 1} only: leave out sequences with other "
            "tokens"
        )


def batches(tokens: Int[Tensor, "sequence pos"], batch: int) -> tuple[Tensor, ...]:
    """The sequences, split into batches.

    Raises:
        DataError: if `batch` is less than one.
    """
    if batch < 1:
        raise DataError(f"batch={batch}: a batch has at least one sequence, so give 1 or more")
    return tokens.split(batch)


def read_answers(
    view: View, answer: Answers, n_prompts: int, single: bool, what: str = "answer"
) -> tuple[Int[Tensor, "prompt answer"], bool]:
    """The ids of every prompt's answers, and whether the caller asked for several per prompt.

    Args:
        view: The model, for its tokenizer and vocabulary.
        answer: One for all prompts, one each, or several each. For one prompt, a sequence is
            several answers.
        n_prompts: How many prompts there are.
        single: Whether the caller gave one prompt and not a batch.
        what: What messages call an answer.

    Raises:
        DataError: if an answer is not one token of the vocabulary, or the numbers do not fit.
    """
    answer = _plain(answer)
    if isinstance(answer, str | int):
        token = read_token(view, answer, what)
        return torch.tensor([[token]] * n_prompts, device=view.device), False
    given: list[Any] = [_plain(one) for one in cast(Iterable[Any], answer)]
    if single:
        given = [given]
    if len(given) != n_prompts:
        raise DataError(
            f"there are {n_prompts} prompts, but {len(given)} {what}s: give one for all prompts, "
            "or one each"
        )
    nested = [not isinstance(one, str | int) for one in given]
    if any(nested) and not all(nested):
        raise DataError(f"give every prompt one {what}, or every prompt several")
    several = all(nested)
    rows = [
        [read_token(view, _plain(one), what) for one in (row if several else [row])]
        for row in given
    ]
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise DataError(f"every prompt needs the same number of {what}s, at least one")
    return torch.tensor(rows, device=view.device), several


def _plain(answer: Any) -> Any:
    """Numbers of torch and NumPy as Python's, sequences as lists; an error for anything else."""
    if isinstance(answer, Tensor | np.ndarray):
        answer = answer.tolist()
    if isinstance(answer, str | int):
        return answer
    try:
        return operator.index(answer)
    except TypeError:
        pass
    if not isinstance(answer, Iterable):
        raise DataError(f"a token is a string or a whole number, not {answer!r}")
    return list(answer)


def read_token(view: View, answer: object, what: str) -> int:
    """The id of one token.

    Raises:
        DataError: if it is not one token of the vocabulary.
    """
    if isinstance(answer, int) and not isinstance(answer, bool):
        size = view.cfg.d_vocab_out
        if not 0 <= answer < size:
            raise DataError(f"token id {answer} is outside the vocabulary, 0 to {size - 1}")
        return answer
    if not isinstance(answer, str):
        raise DataError(f"an {what} is a string or a token id, not {answer!r}")
    tokens = view.tokenize(answer, False)
    if len(tokens) != 1:
        pieces = view.strings(tokens)
        raise DataError(f"{answer!r} is {len(tokens)} tokens, {pieces}: an {what} is one token")
    return tokens[0]
