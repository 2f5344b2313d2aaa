"""Targets behind the unembedding: a logit, a difference of two, every next token's."""

from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.positions import Positions
from lnfree_interp.analysis.prompts import Answers, read_answers, require_next_tokens
from lnfree_interp.analysis.stream import Place, Stream
from lnfree_interp.analysis.targets import Reading
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.analysis.view import View
from lnfree_interp.errors import DataError

POSITIONS = 128
"""How many positions have their logits in memory at once."""


@dataclass(frozen=True)
class Logit:
    """The logit of one token, or the logits of several tokens for each prompt.

    Attributes:
        answer: The token: a string that is one token (mind the leading space), or its id; one for
            all prompts, one each, or several each.
        pos: The position that predicts the token, from each prompt's own end if negative.

    Examples:
        >>> lf.attribute(lf.trace(free, "for i in"), lf.Logit(" range"), by="sublayer").unit
        'logit'
    """

    answer: Answers
    pos: SupportsIndex = -1

    def needs(self, trace: Trace) -> tuple[Place, list[str]]:
        """As `Target.needs`."""
        return _last_stream(trace)

    def read(self, trace: Trace) -> Reading:
        """As `Target.read`."""
        return _read_answers(trace, self.answer, None, self.pos)


@dataclass(frozen=True)
class LogitDifference:
    """The logit of one token minus that of another.

    Attributes:
        answer: The token, given as for `Logit`.
        foil: The token whose logit is subtracted, given as `answer` is.
        pos: The position that predicts the token, from each prompt's own end if negative.

    Examples:
        >>> target = lf.LogitDifference(" range", " self")
        >>> lf.attribute(lf.trace(free, "for i in"), target).of
        ("' range' - ' self'",)
    """

    answer: Answers
    foil: Answers
    pos: SupportsIndex = -1

    def needs(self, trace: Trace) -> tuple[Place, list[str]]:
        """As `Target.needs`."""
        return _last_stream(trace)

    def read(self, trace: Trace) -> Reading:
        """As `Target.read`."""
        return _read_answers(trace, self.answer, self.foil, self.pos)


@dataclass(frozen=True)
class NextTokens:
    """The logit of the true next token, at every position that has one.

    Examples:
        >>> lf.attribute(lf.trace(free, tokens), lf.NextTokens(), by="layer").dims
        ('prompt', 'target')
    """

    def needs(self, trace: Trace) -> tuple[Place, list[str]]:
        """As `Target.needs`."""
        return _last_stream(trace)

    def read(self, trace: Trace) -> Reading:
        """As `Target.read`."""
        if len(set(trace.lengths)) > 1:
            raise DataError(
                "the sequences differ in length: give rows of one length, [sequence, pos]"
            )
        require_next_tokens(trace.view, trace.tokens)
        of = ("each next token",) * trace.batch
        at, targets = Positions(slice(0, -1)), trace.tokens[:, 1:]
        return read_logits(trace, at, targets, None, of, ("prompt", "target"))


def _last_stream(trace: Trace) -> tuple[Place, list[str]]:
    place = trace.view.last
    given = trace.given_logits is not None and not trace.view.not_affine(["ln_final"], True)
    return place, [] if given else [place.hook]


def _read_answers(trace: Trace, answer: Answers, foil: Answers | None, pos: Any) -> Reading:
    trace.require_text()
    view = trace.view
    answers, several = read_answers(view, answer, trace.batch, trace.single)
    foils = None
    if foil is not None:
        foils, _ = read_answers(view, foil, trace.batch, trace.single, "foil")
        try:
            foils = foils.expand_as(answers)
        except RuntimeError as error:
            raise DataError(
                f"there are {answers.shape[1]} answers, but {foils.shape[1]} foils: give one foil, "
                "or one for each answer"
            ) from error
    names = _names(view, answers, foils)
    at = trace.positions(pos)
    at = Positions(at.index, answers.shape[1])
    dims = ("prompt", "answer") if several else ("prompt",)
    of = tuple(", ".join(each) for each in names)
    return read_logits(trace, at, answers, foils, of, dims, names if several else ())


def _names(
    view: View, answers: Int[Tensor, "prompt answer"], foils: Int[Tensor, "prompt answer"] | None
) -> tuple[tuple[str, ...], ...]:
    """What was asked of each prompt: `'answer'` or `'answer' - 'foil'`, one or several."""
    questions = []
    for row, ids in enumerate(answers.tolist()):
        names = [repr(name) for name in view.strings(ids)]
        if foils is not None:
            others = foils[row].tolist()
            for name, answer, other in zip(names, ids, others, strict=True):
                if answer == other:
                    raise DataError(
                        f"{name} is answer and foil, so their difference is zero: give another foil"
                    )
            minus = [repr(name) for name in view.strings(others)]
            names = [f"{name} - {other}" for name, other in zip(names, minus, strict=True)]
        questions.append(tuple(names))
    return tuple(questions)


def read_logits(
    trace: Trace,
    at: Positions,
    targets: Int[Tensor, "batch kept"],
    foils: Int[Tensor, "batch kept"] | None,
    of: tuple[str, ...],
    dims: tuple[str, ...],
    answers: tuple[tuple[str, ...], ...] = (),
) -> Reading:
    """Logits of tokens, minus those of others, at some positions.

    Args:
        trace: The forward pass.
        at: One position for each target; or one position, repeated for several targets.
        targets: The ids of the tokens whose logits are read.
        foils: The ids of the tokens whose logits are subtracted.
        of: What the numbers are, for each prompt.
        dims: What the dimensions of the numbers are.
        answers: The names of the answers, where there are several.
    """
    view = trace.view
    held = trace.require_affine(["ln_final"], logits=True)
    logits, uncapped, scale = _pick_logits(trace, at, targets, foils)
    # A soft cap is held at its slope, the logit over the logit before the cap.
    slopes = torch.ones_like(logits)
    if uncapped is not None:
        slopes = torch.where(uncapped == 0, 1.0, logits / uncapped)
    direction, bias = view.W_U.new_zeros(()), view.b_U.new_zeros(())
    for sign, tokens, slope in zip((1, -1), (targets, foils), slopes, strict=False):
        direction = direction + view.W_U.T[tokens] * (sign * slope)[..., None]
        bias = bias + view.b_U[tokens] * (sign * slope)
    final = view.read("ln_final", scale)
    constants = [(Component("b_U"), bias)]
    if final.bias is not None:
        constants.insert(0, (Component("ln_final.b"), direction @ final.bias))

    def again(stream: Stream, some: slice) -> Float[Tensor, "batch number"]:
        each = stream.flatten(0, 1)[:, None], trace.first(at)[:, some].flatten()[:, None]
        found = view.logits(each[0], first=each[1])[0][:, 0].unflatten(0, stream.shape[:2])
        wanted = [x[:, some, None] for x in (targets, foils) if x is not None]
        return _difference(torch.stack([found.gather(-1, x)[..., 0] for x in wanted]))

    return Reading(
        view.last, at, final.back(direction), tuple(constants), _difference(logits), again, of,
        "logit", "parts = the model's logits", held, dims, answers,
        with_prompts="target" not in dims,
    )  # fmt: skip


def logits_of_targets(
    view: View, stream: Float[Tensor, "batch kept d_model"], targets: Int[Tensor, "batch kept"]
) -> tuple[Float[Tensor, "batch kept"], Int[Tensor, "batch kept"]]:
    """What the model computes from a whole stream: the target's logit at each position, and the
    token of the largest logit."""
    found, top = [], []
    position = torch.arange(stream.shape[1], device=stream.device).expand(stream.shape[:2])
    size = max(1, POSITIONS // len(stream))
    pieces = (x.split(size, dim=1) for x in (stream, targets, position == 0))
    for some, wanted, first in zip(*pieces, strict=True):
        logits, _ = view.logits(some, first=first)
        found.append(logits.gather(-1, wanted[..., None])[..., 0])
        top.append(logits.argmax(-1))
    return torch.cat(found, dim=1), torch.cat(top, dim=1)


def _difference(logits: Float[Tensor, "which batch kept"]) -> Float[Tensor, "batch kept"]:
    return logits[0] if len(logits) == 1 else logits[0] - logits[1]


def _pick_logits(
    trace: Trace,
    at: Positions,
    targets: Int[Tensor, "batch kept"],
    foils: Int[Tensor, "batch kept"] | None,
) -> tuple[Float[Tensor, "which batch kept"], Tensor | None, Tensor | None]:
    """Logits of targets and foils, the same before a soft cap, and a live final norm's scale."""
    view, wanted = trace.view, [x for x in (targets, foils) if x is not None]
    positions = Positions(at.index)

    def pick(logits: Float[Tensor, "batch some d_vocab"], some: slice) -> Tensor:
        one = logits.shape[1] == 1 and at.repeat > 1
        at_each = [x if one else x[:, some] for x in wanted]
        where = [x[:, None] if one else x[..., None] for x in at_each]
        return torch.stack(
            [logits.gather(-1, x)[:, 0] if one else logits.gather(-1, x)[..., 0] for x in where]
        )

    capped, scale_hook = view.logit_cap > 0, view.scale_hook("ln_final")
    names = [*(["unembed.hook_out"] if capped else []), *([scale_hook] if scale_hook else [])]
    if trace.given_logits is not None:
        everything = slice(None)
        picked = pick(positions.of(trace.given_logits), everything)
        uncapped = pick(positions.of(trace["unembed.hook_out"]), everything) if capped else None
        return picked, uncapped, positions.of(trace[scale_hook]) if scale_hook else None
    stream, first = positions.of(trace.stream(view.last)), trace.first(positions)
    pieces: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    size = max(1, POSITIONS // len(stream))
    for start in range(0, stream.shape[1], size):
        some = slice(start, start + size)
        logits, found = view.logits(stream[:, some], names, first=first[:, some])
        uncapped = pick(found["unembed.hook_out"], some) if capped else None
        scale = found[scale_hook] if scale_hook else None
        pieces.append((pick(logits, some), uncapped, scale))
    picked, uncapped, scale = zip(*pieces, strict=True)
    return (
        torch.cat(picked, dim=-1),
        torch.cat(uncapped, dim=-1) if capped else None,
        torch.cat(scale, dim=1) if scale_hook else None,
    )


# Attention scores
