"""Prompts and answers as a caller writes them, as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.errors import DataError
from lnfree_interp.models.agreement import require_tokens

Answer = str | int
"""A token: a string that is one token (mind the leading space), or its id."""
Answers = Answer | Sequence[Answer] | Sequence[Sequence[Answer]]
Prompt = str | Sequence[str] | Int[Tensor, "*prompt pos"] | Sequence[Int[Tensor, " _"]]


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
    prepend_bos: bool = True,
    attention_mask: Int[Tensor, "prompt pos"] | None = None,
) -> Prompts:
    """Each prompt's tokens, whole; TransformerLens by itself cuts off the end of a long one.

    Args:
        model: Its tokenizer, context and vocabulary.
        prompt: One prompt or several, as text or token ids; several need not be equally long.
        prepend_bos: Start each text with the beginning-of-sequence token; not added to ids.
        attention_mask: 0 where a row of token ids is padding, on either side.

    Raises:
        DataError: if a prompt is empty, longer than the context, outside the vocabulary, or padded
            without a mask.
    """
    if isinstance(prompt, Tensor):
        if prompt.is_floating_point() or prompt.ndim not in (1, 2):
            raise DataError(
                f"token ids are whole numbers, [pos] or [prompt, pos], not {prompt.dtype} of shape "
                f"{list(prompt.shape)}"
            )
        rows = list(torch.atleast_2d(prompt.to(model.W_E.device)))
        if attention_mask is not None:
            rows = _unpadded(rows, torch.atleast_2d(attention_mask.to(model.W_E.device)))
        else:
            _refuse_padding(model, rows)
    elif attention_mask is not None:
        raise DataError("an attention mask belongs to a tensor of token ids")
    else:
        given = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [
            row.to(model.W_E.device)
            if isinstance(row, Tensor)
            else model.to_tokens(row, prepend_bos=prepend_bos, truncate=False)[0]
            for row in given
        ]
    if not rows or any(row.numel() == 0 for row in rows):
        raise DataError("a prompt is empty")
    for row in rows:
        require_tokens(model, row)
    return Prompts(
        tuple(rows), isinstance(prompt, str) or (isinstance(prompt, Tensor) and prompt.ndim == 1)
    )


def _unpadded(rows: list[Tensor], mask: Tensor) -> list[Tensor]:
    if len(mask) != len(rows) or any(len(m) != len(row) for m, row in zip(mask, rows, strict=True)):
        raise DataError(f"{len(rows)} rows of tokens, and a mask of shape {list(mask.shape)}")
    shortened = []
    for row, kept in zip(rows, mask.bool(), strict=True):
        where = kept.nonzero()[:, 0]
        if len(where) and not kept[where[0] : where[-1] + 1].all():
            raise DataError("the attention mask has a hole: padding can only be at the ends")
        shortened.append(row[kept])
    return shortened


def _refuse_padding(model: HookedTransformer, rows: list[Tensor]) -> None:
    """Padding read as text would change every number, and nothing would show it."""
    tokenizer = model.tokenizer
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or pad in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return
    for row in rows:
        if len(row) and (row[0] == pad or row[-1] == pad):
            raise DataError(
                f"a row of tokens begins or ends with the padding token {pad}: pass attention_mask"
            )


def read_one_prompt(
    model: HookedTransformer, prompt: Prompt, prepend_bos: bool = True
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
        DataError: if the prompt is shorter.
    """
    if not -n_pos <= pos < n_pos:
        raise DataError(f"there is no position {pos} among {n_pos} tokens")
    return pos % n_pos


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
    if isinstance(answer, str | int):
        return torch.tensor([[_token(model, answer, what)]] * n_prompts), False
    given = list(answer)
    if single:
        given = [given]
    if len(given) != n_prompts:
        raise DataError(f"{n_prompts} prompts, but {len(given)} {what}s")
    nested = [not isinstance(one, str | int) for one in given]
    if any(nested) and not all(nested):
        raise DataError(f"give every prompt one {what}, or every prompt several")
    several = all(nested)
    rows = [[_token(model, one, what) for one in (row if several else [row])] for row in given]
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise DataError(f"every prompt needs the same number of {what}s, at least one")
    return torch.tensor(rows), several


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
    return [model.tokenizer.decode([token]) for token in ids]


def question_names(
    model: HookedTransformer,
    answers: Int[Tensor, "prompt answer"],
    foils: Int[Tensor, "prompt answer"] | None,
) -> tuple[str, ...]:
    """For each prompt, what was asked: `'answer'`, or `'answer' - 'foil'`, several with commas.

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
        questions.append(", ".join(names))
    return tuple(questions)
