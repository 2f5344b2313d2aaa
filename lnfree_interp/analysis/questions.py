"""Prompts and answers as a caller writes them, as tokens."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.errors import DataError
from lnfree_interp.models.agreement import require_tokens

Answer = str | int
"""A token: a string that is one token (mind the leading space), or its id."""
Answers = Answer | Sequence[Any] | Tensor | np.ndarray | np.integer
"""One token or several, for one prompt or each of several."""
Prompt = str | Sequence[Any] | Tensor | np.ndarray
"""Text; token ids, [pos] or [prompt, pos], in a tensor, array or list; or a list of such."""


@dataclass(frozen=True)
class Prompts:
    """Rows of tokens, none of them padded."""

    rows: tuple[Int[Tensor, " _"], ...]
    single: bool
    """Whether the caller gave one prompt, not a batch of one."""

    def by_length(self) -> list[tuple[list[int], Int[Tensor, "prompt pos"]]]:
        """Prompts of equal length together, with their places in the batch: no padding needed."""
        lengths = sorted({len(row) for row in self.rows})
        groups = []
        for length in lengths:
            places = [i for i, row in enumerate(self.rows) if len(row) == length]
            groups.append((places, torch.stack([self.rows[i] for i in places])))
        return groups


def read_prompts(
    model: HookedTransformer,
    prompt: Prompt,
    prepend_bos: bool | None = None,
    attention_mask: Int[Tensor, "*prompt pos"] | Float[Tensor, "*prompt pos"] | None = None,
) -> Prompts:
    """Each prompt's tokens, whole; TransformerLens by itself cuts off the end of a long one.

    Args:
        model: Its tokenizer, context and vocabulary.
        prompt: One prompt or several, as text or token ids; several need not be equally long.
        prepend_bos: Start each text with the beginning-of-sequence token; not added to ids.
            Default: as the model does, `cfg.default_prepend_bos`.
        attention_mask: 0 where a row of token ids is padding, on either side.

    Raises:
        DataError: if a prompt is empty, longer than the context, outside the vocabulary, or padded
            without a mask.
    """
    bos = model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    given = _as_ids(prompt)
    single = isinstance(given, str) or (isinstance(given, Tensor) and given.ndim == 1)
    if isinstance(given, Tensor):
        if given.ndim not in (1, 2):
            raise DataError(f"token ids are [pos] or [prompt, pos], not {list(given.shape)}")
        rows = list(torch.atleast_2d(given.to(model.W_E.device)))
        if attention_mask is not None:
            rows = _unpadded(rows, torch.atleast_2d(attention_mask.to(model.W_E.device)))
        else:
            _refuse_padding(model, rows)
    elif attention_mask is not None:
        raise DataError("an attention mask belongs to a tensor of token ids")
    else:
        each = [given] if isinstance(given, str) else [_as_ids(one) for one in given]
        rows = [_row(model, one, bos) for one in each]
    if not rows or any(row.numel() == 0 for row in rows):
        raise DataError("a prompt is empty")
    for row in rows:
        require_tokens(model, row)
    return Prompts(tuple(rows), single)


def _as_ids(given: Any) -> Any:
    """Whole numbers in any container as a tensor; text, and lists of prompts, as they are."""
    if isinstance(given, str):
        return given
    if isinstance(given, Sequence) and any(
        isinstance(one, str | Sequence | Tensor | np.ndarray) for one in given
    ):
        lengths = {len(one) for one in given if not isinstance(one, str)}
        nested = all(isinstance(one, Sequence) and not isinstance(one, str) for one in given)
        if not nested or len(lengths) != 1:
            return given
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"a prompt is text or token ids, not {given!r:.60}") from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise DataError(f"token ids are whole numbers, not {ids.dtype}")
    return ids.long()


def _row(model: HookedTransformer, one: str | Tensor, prepend_bos: bool) -> Int[Tensor, " _"]:
    if isinstance(one, Tensor):
        if one.ndim != 1:
            raise DataError(f"one of several prompts is [pos], not {list(one.shape)}")
        return one.to(model.W_E.device)
    if not isinstance(one, str):
        raise DataError(f"a prompt is text or token ids, not {one!r:.60}")
    if model.tokenizer is None:
        raise DataError(f"the model has no tokenizer to read {one!r:.60} with: give token ids")
    return model.to_tokens(one, prepend_bos=prepend_bos, truncate=False)[0]


def _unpadded(rows: list[Tensor], mask: Tensor) -> list[Tensor]:
    if len(mask) != len(rows) or any(len(m) != len(row) for m, row in zip(mask, rows, strict=True)):
        raise DataError(f"{len(rows)} rows of tokens, and a mask of shape {list(mask.shape)}")
    if mask.is_floating_point() or not ((mask == 0) | (mask == 1)).all():
        raise DataError("an attention mask is 1 where there is text and 0 where there is padding")
    shortened = []
    for row, kept in zip(rows, mask.bool(), strict=True):
        where = kept.nonzero()[:, 0]
        if len(where) and not kept[where[0] : where[-1] + 1].all():
            raise DataError("the attention mask has a hole: padding can only be at the ends")
        shortened.append(row[kept])
    return shortened


def _refuse_padding(model: HookedTransformer, rows: Sequence[Tensor], least: int = 1) -> None:
    """Padding read as text would change every number, and nothing would show it.

    A padding token of its own is never text. Where end-of-text stands in for it, as TransformerLens
    lets it, rows of a batch that end in `least` of them or more, while others do not, are padded.
    """
    tokenizer = model.tokenizer
    pad = getattr(tokenizer, "pad_token_id", None)
    if tokenizer is None or pad is None:
        return
    doubles = pad in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    at_end = [bool(len(row) >= least and (row[len(row) - least :] == pad).all()) for row in rows]
    first = max(2, least)
    starts = [bool(len(row) >= first and (row[:first] == pad).all()) for row in rows]
    if doubles:
        padded = (any(at_end) and not all(at_end)) or (any(starts) and not all(starts))
    else:
        padded = any(len(row) and pad in (row[0], row[-1]) for row in rows)
    if padded:
        raise DataError(
            f"rows of tokens that begin or end with the padding token {pad}: pass attention_mask, "
            "or the texts themselves, which need not be equally long"
        )


def read_blocks(
    model: HookedTransformer, tokens: Int[Tensor, "blocks pos"], packed: bool = False
) -> Int[Tensor, "blocks pos"]:
    """Rows of text for analyses of every next token, on the model's device.

    Args:
        model: Its vocabulary and context.
        tokens: Token ids.
        packed: The rows are cut from one stream, so that none can be padded.

    Raises:
        DataError: if these are no token ids, have no next token, or are padded.
    """
    ids = _as_ids(tokens)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(tokens).__name__
        raise DataError(f"token ids, [batch, pos], not {shape}")
    require_tokens(model, ids)
    if ids.shape[1] < 2:
        raise DataError("a row of one token has no next token")
    if ids[:, 1:].max() >= model.cfg.d_vocab_out:
        raise DataError(f"the model has logits for {model.cfg.d_vocab_out} tokens only")
    # A few end-of-texts at either end are text (empty documents); a long run is padding.
    if not packed:
        _refuse_padding(model, list(ids), least=8)
    return ids.to(model.W_E.device)


def read_one_prompt(
    model: HookedTransformer, prompt: Prompt, prepend_bos: bool | None = None
) -> Int[Tensor, "1 pos"]:
    """The tokens of a prompt, for analyses that take one.

    Raises:
        DataError: if there are several, or as `read_prompts`.
    """
    prompts = read_prompts(model, prompt, prepend_bos)
    if len(prompts.rows) != 1:
        raise DataError(f"this analysis takes one prompt at a time, not {len(prompts.rows)}")
    return prompts.rows[0][None]


def read_position(pos: int, n_pos: int) -> int:
    """A position, counted from the start.

    Raises:
        DataError: if it is no number, or the prompt is shorter.
    """
    if not isinstance(pos, int) or isinstance(pos, bool):
        raise DataError(f"a position is a number, not {pos!r}")
    if not -n_pos <= pos < n_pos:
        raise DataError(f"there is no position {pos} among {n_pos} tokens")
    return pos % n_pos


def split(tokens: Int[Tensor, "blocks pos"], batch: int) -> tuple[Tensor, ...]:
    """Rows of text in batches.

    Raises:
        DataError: if a batch would be empty.
    """
    if batch < 1:
        raise DataError(f"a batch has at least one row, not {batch}")
    return tokens.split(batch)


def read_answers(
    model: HookedTransformer, answer: Answers, n_prompts: int, single: bool, what: str = "answer"
) -> tuple[Int[Tensor, "prompt answer"], bool]:
    """Token ids for every prompt, and whether the caller asked for several each.

    Args:
        model: Its tokenizer and vocabulary.
        answer: One for all prompts; one each; or several each. For one prompt, a sequence is
            several answers.
        n_prompts: How many prompts there are.
        single: Whether the caller gave one prompt, not a batch.
        what: For messages.

    Raises:
        DataError: if an answer is not one token of the vocabulary, or the numbers do not fit.
    """
    answer = _plain(answer)
    if isinstance(answer, str | int):
        return torch.tensor([[_token(model, answer, what)]] * n_prompts), False
    given: list[Any] = [_plain(one) for one in cast(Iterable[Any], answer)]
    if single:
        given = [given]
    if len(given) != n_prompts:
        raise DataError(f"{n_prompts} prompts, but {len(given)} {what}s")
    nested = [not isinstance(one, str | int) for one in given]
    if any(nested) and not all(nested):
        raise DataError(f"give every prompt one {what}, or every prompt several")
    several = all(nested)
    rows = [
        [_token(model, _plain(one), what) for one in (row if several else [row])] for row in given
    ]
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise DataError(f"every prompt needs the same number of {what}s, at least one")
    return torch.tensor(rows), several


def _plain(answer: Any) -> Any:
    """Numbers of torch and NumPy as Python's; anything that is no sequence is refused."""
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


def _token(model: HookedTransformer, answer: object, what: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < model.cfg.d_vocab_out:
            raise DataError(
                f"token id {answer} is outside the vocabulary of {model.cfg.d_vocab_out}"
            )
        return answer
    if not isinstance(answer, str):
        raise DataError(f"an {what} is a string or a token id, not {answer!r}")
    if model.tokenizer is None:
        raise DataError(f"the model has no tokenizer to read {answer!r} with: give a token id")
    tokens = model.to_tokens(answer, prepend_bos=False)[0].tolist()
    if len(tokens) != 1:
        pieces = model.to_str_tokens(answer, prepend_bos=False)
        raise DataError(f"{answer!r} is {len(tokens)} tokens, {pieces}: an {what} is one token")
    return tokens[0]


def strings(model: HookedTransformer, ids: Sequence[int]) -> list[str]:
    """Token ids as text; as numbers for a model without a tokenizer."""
    if model.tokenizer is None:
        return [f"<{token}>" for token in ids]
    return [str(model.tokenizer.decode([token])) for token in ids]


def question_names(
    model: HookedTransformer,
    answers: Int[Tensor, "prompt answer"],
    foils: Int[Tensor, "prompt answer"] | None,
) -> tuple[tuple[str, ...], ...]:
    """For each prompt, what was asked: `'answer'`, or `'answer' - 'foil'`, several or one.

    Raises:
        DataError: for an answer against itself.
    """
    questions = []
    for row, ids in enumerate(answers.tolist()):
        names = [repr(name) for name in strings(model, ids)]
        if foils is not None:
            against = foils[row].tolist()
            for name, answer, foil in zip(names, ids, against, strict=True):
                if answer == foil:
                    raise DataError(
                        f"{name} against itself: the logit difference is zero by definition"
                    )
            minus = [repr(name) for name in strings(model, against)]
            names = [f"{name} - {foil}" for name, foil in zip(names, minus, strict=True)]
        questions.append(tuple(names))
    return tuple(questions)
