"""Targets of attribution: an object that says which direction of the stream it reads, and where.

A logit, a score with its keys given, a neuron's input and a probe are each a sum over the parts of
the stream at some place, plus what biases behind that place add. A target of your own needs the
members of `Target`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, SupportsIndex, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import get_act_name

from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.prompts import (
    Answers,
    read_answers,
    require_next_tokens,
    whole_number,
)
from lnfree_interp.analysis.trace import Positions, Trace
from lnfree_interp.analysis.view import Place, Stream, View
from lnfree_interp.errors import DataError, UnsupportedModelError

Constants = tuple[tuple[Component, Float[Tensor, "batch kept"]], ...]
Side = Literal["query", "key"]
POSITIONS = 128
"""How many positions have their logits in memory at once."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What a target reads from the stream of one trace."""

    place: Place
    """The place of the stream."""
    at: Positions
    """The positions."""
    direction: Float[Tensor, "batch kept d_model"]
    """The direction that is read at each position."""
    constants: Constants
    """What biases behind the stream add."""
    total: Float[Tensor, "batch number"]
    """The number that is explained, as the model itself computed it."""
    again: Callable[[Stream, slice], Float[Tensor, "batch number"]]
    """Computes the number from another stream at a slice of these positions, with the model's own
    modules."""
    of: tuple[str, ...]
    """What the number is, for each prompt."""
    unit: str
    identity: str
    held: tuple[str, ...] = ()
    """What is not affine between the stream and the number, and was held."""
    dims: tuple[str, ...] = ("prompt",)
    """What the dimensions of `total` are; with `"prompt"` alone there is one number per prompt."""
    answers: tuple[tuple[str, ...], ...] = ()
    summed: bool = False
    """Whether the number is the sum over the positions."""
    scale: float = 0.0
    """The largest number that the total was computed from."""
    with_prompts: bool = True
    """Whether a result shows the prompts. For much text, making its strings would take longer than
    the result itself."""

    def minus(self, other: "Reading", trace: Trace) -> "Reading":
        """The difference of two numbers that are read at the same place of a trace."""
        n = self.direction.shape[1]
        numbers = [x.at.numbers(trace.n_pos, trace.batch) for x in (self, other)]
        constants = zip(self.constants, other.constants, strict=True)

        def again(stream: Stream, some: slice) -> Float[Tensor, "batch number"]:
            return self.again(stream[:, :n], some) - other.again(stream[:, n:], some)

        return replace(
            self, at=Positions(torch.cat(numbers, dim=1)), again=again, summed=True,
            direction=torch.cat([self.direction, -other.direction], dim=1),
            constants=tuple((c, torch.cat([x, -y], dim=1)) for (c, x), (_, y) in constants),
            total=self.total - other.total,
        )  # fmt: skip


@runtime_checkable
class Target(Protocol):
    """What `attribute` explains."""

    def needs(self, trace: Trace) -> tuple[Place, list[str]]:
        """The place where the target reads the stream, and hook names of the activations that it
        needs."""
        ...

    def read(self, trace: Trace) -> Reading:
        """What the target reads from the stream of a trace."""
        ...


# Logits


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
    pieces = (x.split(POSITIONS, dim=1) for x in (stream, targets, position == 0))
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
    for start in range(0, stream.shape[1], POSITIONS):
        some = slice(start, start + POSITIONS)
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


def require_head(view: View, layer: Any, head: Any) -> tuple[int, int]:
    """The layer and index of a head, checked: the model has it, and its queries pass no norm.

    Raises:
        DataError: if there is no such head.
        UnsupportedModelError: if queries and keys pass norms of their own.
    """
    layer, head = whole_number(layer, "a layer"), whole_number(head, "a head")
    cfg = view.cfg
    if not (0 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
        raise DataError(
            f"there is no L{layer}H{head}: the model has layers 0 to {cfg.n_layers - 1} of heads 0 "
            f"to {cfg.n_heads - 1}"
        )
    if getattr(cfg, "use_qk_norm", False):
        raise UnsupportedModelError(
            "queries and keys pass norms of their own, which this question cannot read through: "
            "freeze them, then merge them with fold(model)"
        )
    return layer, head


@dataclass(frozen=True, eq=False)
class ScoreParts:
    """One head's scores in a trace, and the queries and keys whose products they are."""

    trace: Trace
    layer: int
    head: int

    @property
    def site(self) -> str:
        """The norm that queries and keys read through."""
        return f"blocks.{self.layer}.ln1.qk"

    @property
    def name(self) -> str:
        """The head's label, such as `L2H5`."""
        return Component("head", self.layer, self.head).label

    def hook(self, which: Literal["q", "k"]) -> str:
        """The hook name of the queries or keys, after the rotation if positions are rotary."""
        return get_act_name(f"rot_{which}" if self.trace.view.rotary else which, self.layer)

    def needs(self) -> list[str]:
        """Hook names of the activations that are read here."""
        names = [get_act_name(x, self.layer) for x in ("attn_scores", "pattern")]
        scales = self.trace.scale_names([self.site])
        return [*names, self.hook("q"), self.hook("k"), Place(self.layer).hook, *scales]

    def met(self, which: Literal["q", "k"]) -> Float[Tensor, "batch pos d_head"]:
        """The head's queries or keys, as the model computed them, with rotary positions if any."""
        x = self.trace[self.hook(which)]
        return x[:, :, self.head * x.shape[2] // self.trace.view.cfg.n_heads]

    @property
    def scores(self) -> Float[Tensor, "batch query key"]:
        """The scores before the softmax, as the model computed them."""
        return self.trace.act("attn_scores", self.layer)[:, self.head]

    @property
    def sees(self) -> Tensor:
        """[batch, query, key], whether a query sees a key; where it does not, the score is the
        mask's."""
        return self.scores > torch.finfo(self.scores.dtype).min

    @property
    def log_pattern(self) -> Float[Tensor, "batch query key"]:
        """The logarithm of the attention weights, from the scores where the weights underflow."""
        pattern = self.trace.act("pattern", self.layer)[:, self.head]
        small = pattern < torch.finfo(pattern.dtype).tiny
        return torch.where(small, self.scores.log_softmax(-1), pattern.log())

    def slope(self, query: Tensor, key: Tensor) -> Float[Tensor, "batch kept"]:
        """What a soft cap multiplies scores by, held; without a cap it is one."""
        rows = torch.arange(len(query), device=query.device)[:, None]
        score = self.scores[rows, query, key]
        if self.trace.view.score_cap == 0:
            return torch.ones_like(score)
        uncapped = torch.linalg.vecdot(self.met("q")[rows, query], self.met("k")[rows, key])
        uncapped = uncapped / self.trace.view.attention(self.layer).scale
        return torch.where(uncapped == 0, 1.0, score / uncapped)

    def direction(
        self, side: Side, at: Positions, other: Float[Tensor, "batch kept d_head"]
    ) -> tuple[Float[Tensor, "batch kept d_model"], Constants]:
        """The direction along which one side's stream is read, given the other side's vectors."""
        view, attention = self.trace.view, self.trace.view.attention(self.layer)
        W = (attention.W_Q if side == "query" else attention.W_K)[self.head]
        b = (attention.b_Q if side == "query" else attention.b_K)[self.head]
        ahead = other / attention.scale
        if view.rotary:
            turn = view.rotations(self.layer, self.trace.n_pos)
            places = at.numbers(self.trace.n_pos, self.trace.batch).to(turn.device)
            ahead = (turn[places] @ ahead[..., None])[..., 0]
        read = self.trace.read(self.site, at)
        constants = [(Component("b_Q" if side == "query" else "b_K"), ahead @ b)]
        if read.bias is not None:
            constants.insert(0, (Component("ln1.b", self.layer), ahead @ (read.bias @ W)))
        return read.back(ahead @ W.T), tuple(constants)

    def again(self, side: Side, at: Positions, stream: Stream) -> Float[Tensor, "batch query key"]:
        """The scores if one side reads another stream at some positions, and the other side does
        not."""
        return self.attention_again(side, at, stream)[0]

    def attention_again(
        self, side: Side, at: Positions, stream: Stream
    ) -> tuple[Float[Tensor, "batch query key"], Float[Tensor, "batch query key"]]:
        """As `again`, and the pattern, by the model's own block."""
        trace = self.trace
        hooks = [get_act_name(name, self.layer) for name in ("attn_scores", "pattern")]
        kept = self.hook("k" if side == "query" else "q")
        place = Place(self.layer)
        where = at.numbers(trace.n_pos, trace.batch).to(stream.device)
        changed = trace.stream(place).scatter(1, where[..., None].expand(stream.shape), stream)
        _, found = trace.view.run(
            changed, hooks, start=self.layer, stop=self.layer + 1,
            edits={kept: lambda x: trace[kept]},
        )  # fmt: skip
        scores, pattern = (found[hook][:, self.head] for hook in hooks)
        return scores, pattern


@dataclass(frozen=True)
class Score:
    """One attention score, before the softmax.

    It is a sum over pairs of components (see `attribute_scores`); or, with a `side`, over the
    components on that side alone.

    Attributes:
        layer: The head's layer, counted from 0.
        head: The head's index in its layer, counted from 0.
        query: Position of the token that looks, from each prompt's own end if negative.
        key: Position of the token that is looked at.
        side: `"query"` or `"key"`; None for pairs of components.

    Examples:
        >>> trace = lf.trace(free, "for i in")
        >>> trace.attribute(lf.Score(2, 5, query=-1, key=1, side="query")).unit
        'score'
    """

    layer: SupportsIndex
    head: SupportsIndex
    query: SupportsIndex = -1
    key: SupportsIndex = 0
    side: Side | None = None

    def needs(self, trace: Trace) -> tuple[Place, list[str]]:
        """As `Target.needs`."""
        layer, head = require_head(trace.view, self.layer, self.head)
        return Place(layer), ScoreParts(trace, layer, head).needs()

    def read(self, trace: Trace) -> Reading:
        """As `Target.read`."""
        side = self.side
        if side is None or side not in get_args(Side):
            raise DataError(f"side={side!r} is not a side: give one of {', '.join(get_args(Side))}")
        layer, head = require_head(trace.require_text().view, self.layer, self.head)
        parts = ScoreParts(trace, layer, head)
        query, key = trace.positions(self.query), trace.positions(self.key)
        q, k = (x.numbers(trace.n_pos, trace.batch).to(trace.view.device) for x in (query, key))
        rows = torch.arange(trace.batch, device=q.device)[:, None]
        if not parts.sees[rows, q, k].all():
            raise DataError(
                f"position {self.query} does not see key {self.key}, which is masked: give a key "
                "that it sees"
            )
        here, there = (query, key) if side == "query" else (key, query)
        met = there.of(parts.met("k" if side == "query" else "q")) * parts.slope(q, k)[..., None]
        direction, constants = parts.direction(side, here, met)

        def again(stream: Stream, some: slice) -> Float[Tensor, "batch number"]:
            return parts.again(side, here, stream)[rows, q, k]

        of = f"score of {parts.name} from {self.query} to {self.key}, by what is at the {side}"
        return Reading(
            Place(layer), here, direction, constants, parts.scores[rows, q, k], again,
            (of,) * trace.batch, "score",
            f"parts at the {side} = attention score of {parts.name}",
            trace.require_affine([parts.site], scores=True),
        )  # fmt: skip


@dataclass(frozen=True)
class LogOdds:
    """How much more a head looks at one key than at another: log pattern[key] - log pattern[other].

    The softmax is not additive, but its log-odds are: the normaliser cancels.

    Attributes:
        layer: The head's layer, counted from 0.
        head: The head's index in its layer, counted from 0.
        key: Position of the one key.
        other: Position of the other key.
        query: Position of the token that looks, from each prompt's own end if negative.
        side: `"query"`: a sum over components at the query, times the difference of the keys.
            `"key"`: a sum over components at the one key, minus those at the other.

    Examples:
        >>> trace = lf.trace(free, "for i in")
        >>> trace.attribute(lf.LogOdds(2, 5, key=1, other=0, side="key")).verify().unit
        'log-odds'
    """

    layer: SupportsIndex
    head: SupportsIndex
    key: SupportsIndex
    other: SupportsIndex
    query: SupportsIndex = -1
    side: Side = "query"

    def _scores(self) -> tuple[Score, Score]:
        where = (self.layer, self.head, self.query)
        return Score(*where, self.key, self.side), Score(*where, self.other, self.side)

    def needs(self, trace: Trace) -> tuple[Place, list[str]]:
        """As `Target.needs`."""
        return self._scores()[0].needs(trace)

    def read(self, trace: Trace) -> Reading:
        """As `Target.read`."""
        score, other = (one.read(trace) for one in self._scores())
        parts = ScoreParts(trace, *require_head(trace.view, self.layer, self.head))
        rows = torch.arange(trace.batch)
        query = trace.positions(self.query).numbers(trace.n_pos, trace.batch)[:, 0]
        keys = [trace.positions(key).numbers(trace.n_pos, trace.batch)[:, 0]
                for key in (self.key, self.other)]  # fmt: skip
        logs = [parts.log_pattern[rows, query, key][:, None] for key in keys]
        size = max(x.abs().max().item() for x in (*logs, score.total, other.total))
        of = f"log-odds of {self.key} over {self.other}, {parts.name} from {self.query}"
        return replace(
            score.minus(other, trace), total=logs[0] - logs[1], of=(of,) * trace.batch,
            unit="log-odds", identity=f"parts at the {self.side} = log-odds", scale=size,
        )  # fmt: skip


# Neurons and the stream


@dataclass(frozen=True)
class Neuron:
    """A neuron's input, or its activation.

    Attributes:
        layer: The neuron's layer, counted from 0.
        neuron: The neuron's index in its layer, counted from 0.
        pos: Position at which the neuron is read, from each prompt's own end if negative.
        of: `"pre"`: the input of the activation function. `"post"`: the activation, split
            completely by the secant post / pre; in a gated MLP, the activation with its gate given.

    Examples:
        >>> lf.attribute(lf.trace(free, "for i in"), lf.Neuron(1, 7)).verify().unit
        'pre'
    """

    layer: SupportsIndex
    neuron: SupportsIndex
    pos: SupportsIndex = -1
    of: Literal["pre", "post"] = "pre"

    def needs(self, trace: Trace) -> tuple[Place, list[str]]:
        """As `Target.needs`."""
        layer = require_mlp(trace.view, self.layer)
        place, gated = trace.view.mlp_place(layer), trace.view.gated
        names = [get_act_name(x, layer) for x in ("pre", "post", *(["pre_linear"] * gated))]
        return place, [*names, place.hook, *trace.scale_names([f"blocks.{layer}.ln2"])]

    def read(self, trace: Trace) -> Reading:
        """As `Target.read`."""
        trace.require_text()
        view = trace.view
        if self.of not in ("pre", "post"):
            raise DataError(f"of={self.of!r} is not allowed: give 'pre' or 'post'")
        layer = require_mlp(view, self.layer)
        weights, site = view.mlp(layer), f"blocks.{layer}.ln2"
        n = weights.W_in.shape[1]
        neuron = whole_number(self.neuron, "a neuron")
        if not 0 <= neuron < n:
            raise DataError(f"layer {layer} has neurons 0 to {n - 1}, not {neuron}")
        held, at = trace.require_affine([site]), trace.positions(self.pos)
        activation = self.of == "post"
        W = weights.W_in if activation else weights.before_activation[0]
        w, b = W[:, neuron], weights.b_in[neuron]
        pre, post = (at.of(trace.act(x, layer))[..., neuron] for x in ("pre", "post"))
        slope = torch.ones_like(pre)
        if activation:
            linear = at.of(trace.act("pre_linear", layer))[..., neuron] if view.gated else pre
            passed = post - b if view.gated else post
            slope = torch.where(linear == 0, 0.0, passed / linear)
        read = trace.read(site, at)
        constants = []
        if read.bias is not None:
            constants.append((Component("ln2.b", layer), slope * (read.bias @ w)))
        if not view.gated:
            constants.append((Component("b_in", layer), slope * b))
        elif activation:
            constants.append((Component("b_in", layer), b.expand_as(pre)))
        total, place = post if activation else pre, view.mlp_place(layer)
        x = at.of(trace.stream(place))

        def again(stream: Stream, some: slice) -> Float[Tensor, "batch number"]:
            first = trace.first(at)
            moved = view.through_norm(site, x, first=first)
            moved = moved - view.through_norm(site, stream, first=first[:, some])
            return total - slope * (moved @ w)

        name = Component("neuron", layer, neuron).label
        of = f"{self.of} of {name} at {self.pos}"
        return Reading(
            place, at, read.back((slope[..., None] * w).contiguous()), tuple(constants), total,
            again, (of,) * trace.batch, self.of, f"parts = {self.of} of {name}", held,
        )  # fmt: skip


def require_mlp(view: View, layer: Any) -> int:
    """The number of a layer, checked: the layer has an MLP.

    Raises:
        DataError: if the model has no MLP in that layer.
    """
    number = whole_number(layer, "a layer")
    if not view.has_mlps or not 0 <= number < view.n_layers:
        raise DataError(f"the model has no MLP in layer {number}")
    return number


@dataclass(frozen=True, eq=False)
class Probe:
    """The stream at a place along any direction: a linear probe, a steering vector, a feature.

    Attributes:
        direction: The direction, [d_model]; or one for each position, [pos, d_model].
        at: Hook name of the place, such as `blocks.3.hook_resid_mid`. Default: the stream that the
            final norm reads.
        pos: A position, from each prompt's own end if negative, or a slice.
        bias: The probe's bias.

    Examples:
        >>> probe = lf.Probe(free.W_U[:, 7], at="blocks.2.hook_resid_pre")
        >>> lf.attribute(lf.trace(free, "for i in"), probe).verify().unit
        'projection'
    """

    direction: Any
    at: str | Place | None = None
    pos: SupportsIndex | slice = -1
    bias: float = 0.0

    def needs(self, trace: Trace) -> tuple[Place, list[str]]:
        """As `Target.needs`."""
        place = trace.view.place(self.at)
        return place, [place.hook]

    def read(self, trace: Trace) -> Reading:
        """As `Target.read`."""
        trace.require_text()
        place, at = trace.view.place(self.at), trace.positions(self.pos)
        stream = at.of(trace.stream(place))
        direction = torch.as_tensor(self.direction)
        width = stream.shape[-1]
        if direction.ndim == 0 or direction.shape[-1] != width:
            raise DataError(
                f"a direction has {width} entries, not {list(direction.shape)}: give [d_model], or "
                "[pos, d_model]"
            )
        try:
            direction = direction.to(stream).expand(stream.shape).contiguous()
        except RuntimeError as error:
            raise DataError(
                f"directions of shape {list(direction.shape)} do not fit a stream of shape "
                f"{list(stream.shape)}: give one direction, or one for each position"
            ) from error
        constants: Constants = ()
        if self.bias:
            constants = ((Component("probe.b"), torch.full_like(stream[..., 0], self.bias)),)
        several = isinstance(self.pos, slice)

        def again(changed: Stream, some: slice) -> Float[Tensor, "batch number"]:
            return torch.linalg.vecdot(changed, direction[:, some]) + self.bias

        return Reading(
            place, at, direction, constants, again(stream, slice(None)), again,
            (place.hook,) * trace.batch, "projection", f"parts = {place.hook}",
            dims=("prompt", "pos") if several else ("prompt",),
        )  # fmt: skip
