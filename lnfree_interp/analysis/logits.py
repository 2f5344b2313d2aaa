"""Direct logit attribution: a logit as a sum over the parts of the model.

On an LN-free model the logit is linear in the residual stream, so the parts add up to it and
taking one away changes it by exactly that part. With a live final norm both need the scale frozen
at the value it had, and only the adding up survives.
"""

from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.contributions import Component, Contributions, Level
from lnfree_interp.analysis.residual import cached_names, project_residual, require_decomposable
from lnfree_interp.errors import DataError, InexactError
from lnfree_interp.models.agreement import require_tokens
from lnfree_interp.models.norms import FrozenNorm, Norm

Answer = str | int


def attribute_logits(
    model: HookedTransformer,
    prompt: str | Sequence[str] | Int[Tensor, "*prompt pos"],
    answer: Answer | Sequence[Answer],
    against: Answer | Sequence[Answer] | None = None,
    *,
    by: Level = "head",
    prepend_bos: bool = True,
    frozen_scale: bool = False,
) -> Contributions:
    """What each part of the model adds to the next token's logit, or logit difference.

    Args:
        model: LN-free, folded or with frozen norm sites.
        prompt: One prompt, or several that need not be equally long; or token ids.
        answer: The next token: a string that is one token (mind the leading space) or a token id.
            One for all prompts, or one each.
        against: Subtract this token's logit. As `answer`.
        by: `"block"`, `"head"` or `"neuron"`; see `project_residual`.
        prepend_bos: Start each prompt with the beginning-of-sequence token; not added to ids.
        frozen_scale: Answer for a model with a live final norm too, holding its scale.

    Returns:
        Values [component] for one prompt, [component, prompt] for several, in logits.

    Raises:
        InexactError: if the final norm is live and `frozen_scale` is False.
        DataError: if a prompt is empty or longer than the context, an answer is not one token, or
            the numbers of prompts and answers differ.
        UnsupportedModelError: for a model whose stream has other parts.

    Example:
        >>> dla = lf.attribute_logits(free, "for i in", " range", by="head")  # doctest: +SKIP
        >>> dla.verify()  # doctest: +SKIP
    """
    rows = _token_rows(model, prompt, prepend_bos)
    answers = _one_each(model, answer, len(rows), "answers")
    foils = None if against is None else _one_each(model, against, len(rows), "foils")
    questions = _questions(model, answers, foils)
    parts: list[Contributions] = []
    # Row by row: padding would have to be masked out of everything that follows.
    for i, tokens in enumerate(rows):
        targets = torch.tensor([[answers[i]]], device=tokens.device)
        minus = None if foils is None else torch.tensor([[foils[i]]], device=tokens.device)
        parts.append(_attribute(model, tokens, slice(-1, None), targets, minus, by, frozen_scale))
    whole = Contributions(
        values=torch.cat([part.values[..., 0] for part in parts], dim=1),
        components=parts[0].components,
        total=torch.cat([part.total[..., 0] for part in parts]),
        level=by,
        of=questions,
        prompts=tuple(tuple(_strings(model, tokens[0].tolist())) for tokens in rows),
        frozen_scale=parts[0].frozen_scale,
    )
    one = isinstance(prompt, str) or (isinstance(prompt, Tensor) and prompt.ndim == 1)
    return whole.select(0) if one else whole


def attribute_next_tokens(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"],
    *,
    by: Level = "head",
    frozen_scale: bool = False,
) -> Contributions:
    """What each part adds to the logit of the true next token, at every position.

    Args:
        model: As for `attribute_logits`.
        tokens: [batch, pos].
        by: As for `attribute_logits`.
        frozen_scale: As for `attribute_logits`.

    Returns:
        Values [component, batch, pos - 1], in logits.

    Raises:
        InexactError, UnsupportedModelError: as `attribute_logits`.
        DataError: if the rows have no next token, or the model cannot read them.
    """
    if tokens.shape[1] < 2:
        raise DataError("a row of one token has no next token")
    tokens = tokens.to(model.W_E.device)
    return _attribute(model, tokens, slice(0, -1), tokens[:, 1:], None, by, frozen_scale)


@torch.no_grad()
def _attribute(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"],
    positions: slice,
    targets: Int[Tensor, "batch kept"],
    against: Int[Tensor, "batch kept"] | None,
    by: Level,
    frozen_scale: bool,
) -> Contributions:
    if by not in get_args(Level):
        raise DataError(f"by={by!r} is not one of {', '.join(get_args(Level))}")
    require_decomposable(model)
    require_tokens(model, tokens)
    live = final_norm_is_live(model)
    if live and not frozen_scale:
        raise InexactError(
            "the final norm is live, so no part of the stream has a logit of its own: pass "
            "frozen_scale=True to hold its scale, or remove the norms first"
        )
    names = [*cached_names(model, by), "ln_final.hook_scale"]
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
    kept = {name: activation[:, positions] for name, activation in cache.items()}
    direction, bias = logit_direction(model, targets)
    total = logits[:, positions].gather(-1, targets[..., None])[..., 0]
    if against is not None:
        minus, minus_bias = logit_direction(model, against)
        direction, bias = direction - minus, bias - minus_bias
        total = total - logits[:, positions].gather(-1, against[..., None])[..., 0]
    values, components = [], []
    if hasattr(model, "ln_final"):
        direction, norm_bias = through_final_norm(model, direction, kept["ln_final.hook_scale"])
        if norm_bias is not None:
            values.append(norm_bias[None])
            components.append(Component("ln_final.b"))
    parts, part_components = project_residual(model, kept, direction, by)
    return Contributions(
        values=torch.cat([parts, *values, bias[None]]),
        components=(*part_components, *components, Component("b_U")),
        total=total,
        level=by,
        frozen_scale=live,
    )


def final_norm_is_live(model: HookedTransformer) -> bool:
    """Whether the logits depend on the stream's own scale."""
    norm = getattr(model, "ln_final", None)
    frozen = isinstance(norm, FrozenNorm) or (isinstance(norm, Norm) and norm.frozen)
    return norm is not None and not frozen


def logit_direction(
    model: HookedTransformer, targets: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos"]]:
    """The column of W_U and the entry of b_U for each target token."""
    return model.W_U.T[targets], model.b_U[targets]


def through_final_norm(
    model: HookedTransformer,
    direction: Float[Tensor, "batch pos d_model"],
    scale: Float[Tensor, "batch pos one"],
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos"] | None]:
    """A direction behind `ln_final` carried to its input, at a given scale; and what its bias adds.

    Args:
        model: With an `ln_final`, live or frozen, with or without gain and bias.
        direction: [batch, pos, d_model], read from the norm's output.
        scale: `ln_final.hook_scale`, [batch, pos, 1]; a constant if the norm is frozen.
    """
    norm = model.ln_final
    bias = direction @ norm.b if hasattr(norm, "b") else None
    direction = direction * norm.w if hasattr(norm, "w") else direction
    if (model.cfg.normalization_type or "").startswith("LN") and not model.cfg.final_rms:
        direction = direction - direction.mean(-1, keepdim=True)
    return direction / scale, bias


def _token_rows(
    model: HookedTransformer,
    prompt: str | Sequence[str] | Int[Tensor, "*prompt pos"],
    prepend_bos: bool,
) -> list[Int[Tensor, "one pos"]]:
    """Each prompt's tokens, whole; TransformerLens by itself cuts off the end of a long one."""
    if isinstance(prompt, Tensor):
        rows = list(torch.atleast_2d(prompt.to(model.W_E.device)).split(1))
    else:
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [model.to_tokens(text, prepend_bos=prepend_bos, truncate=False) for text in texts]
    if not rows or any(row.numel() == 0 for row in rows):
        raise DataError("a prompt is empty")
    return rows


def _strings(model: HookedTransformer, ids: list[int]) -> list[str]:
    """Token ids as text; as numbers for a model without a tokenizer."""
    if model.tokenizer is None:
        return [f"<{token}>" for token in ids]
    return [model.tokenizer.decode([token]) for token in ids]


def _questions(
    model: HookedTransformer, answers: list[int], foils: list[int] | None
) -> tuple[str, ...]:
    """For each prompt, what was asked: `'answer'`, or `'answer' - 'foil'`."""
    names = [repr(name) for name in _strings(model, answers)]
    if foils is None:
        return tuple(names)
    for name, answer, foil in zip(names, answers, foils, strict=True):
        if answer == foil:
            raise DataError(f"{name} against itself: the logit difference is zero by definition")
    against = [repr(name) for name in _strings(model, foils)]
    return tuple(f"{name} - {foil}" for name, foil in zip(names, against, strict=True))


def _one_each(
    model: HookedTransformer, given: Answer | Sequence[Answer], n_prompts: int, what: str
) -> list[int]:
    """Token ids, one per prompt."""
    answers = [given] * n_prompts if isinstance(given, str | int) else list(given)
    if len(answers) != n_prompts:
        raise DataError(f"{n_prompts} prompts, but {len(answers)} {what}")
    return [_token(model, answer) for answer in answers]


def _token(model: HookedTransformer, answer: Answer) -> int:
    if isinstance(answer, int):
        if not 0 <= answer < model.cfg.d_vocab:
            raise DataError(f"token id {answer} is outside the vocabulary of {model.cfg.d_vocab}")
        return answer
    tokens = model.to_tokens(answer, prepend_bos=False)[0].tolist()
    if len(tokens) != 1:
        pieces = model.to_str_tokens(answer, prepend_bos=False)
        raise DataError(f"{answer!r} is {len(tokens)} tokens, {pieces}: an answer is one token")
    return tokens[0]
