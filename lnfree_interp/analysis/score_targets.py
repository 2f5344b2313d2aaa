"""Targets in attention: a score of a query and a key, and the log-odds of two keys."""

from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import get_act_name

from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.positions import Positions, whole_number
from lnfree_interp.analysis.stream import Place, Read, Stream
from lnfree_interp.analysis.targets import Constants, Reading
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.analysis.view import Side, View
from lnfree_interp.errors import DataError


def require_head(view: View, layer: Any, head: Any) -> tuple[int, int]:
    """The layer and index of a head, checked: the model has it.

    Raises:
        DataError: if there is no such head.
    """
    layer, head = whole_number(layer, "a layer"), whole_number(head, "a head")
    cfg = view.cfg
    if not (0 <= layer < cfg.n_layers and 0 <= head < cfg.n_heads):
        raise DataError(
            f"there is no L{layer}H{head}: the model has layers 0 to {cfg.n_layers - 1} of heads 0 "
            f"to {cfg.n_heads - 1}"
        )
    return layer, head


@dataclass(frozen=True, eq=False)
class ScoreParts:
    """One head's scores in a trace, and the queries and keys whose products they are."""

    trace: Trace
    layer: int
    head: int

    def __post_init__(self) -> None:
        self.trace.view.require_softmax(self.layer)

    @property
    def site(self) -> str:
        """The norm that queries and keys read the stream through."""
        return f"blocks.{self.layer}.ln1.qk"

    def sites(self, *sides: Side) -> list[str]:
        """The norms between the stream and the queries, the keys or both: the one that reads the
        stream, and those on queries and keys themselves, if any."""
        inner = [self.trace.view.qk_norm(self.layer, side) for side in sides or get_args(Side)]
        return [self.site, *(site for site in inner if site is not None)]

    def weights(
        self, side: Side
    ) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"]]:
        """The head's W_Q and b_Q, or W_K and b_K."""
        attention = self.trace.view.attention(self.layer)
        W, b = (attention.W_Q, attention.b_Q) if side == "query" else (attention.W_K, attention.b_K)
        return W[self.head], b[self.head]

    def normed(self, side: Side, at: Positions) -> Read:
        """What the norm on the head's queries or keys does at some positions; the identity if there
        is none."""
        site = self.trace.view.qk_norm(self.layer, side)
        if site is None:
            return Read()
        read = self.trace.read(site)
        if not isinstance(read.scale, Tensor):
            return read
        return replace(read, scale=at.of(self._own(read.scale)))

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
        scales = self.trace.scale_names(self.sites())
        return [*names, self.hook("q"), self.hook("k"), Place(self.layer).hook, *scales]

    def met(self, which: Literal["q", "k"]) -> Float[Tensor, "batch pos d_head"]:
        """The head's queries or keys, as the model computed them, with rotary positions if any."""
        return self._own(self.trace[self.hook(which)])

    def _own(self, x: Float[Tensor, "batch pos some d"]) -> Float[Tensor, "batch pos d"]:
        """The head's share of what each head has, or each group of heads."""
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
        view, (W, b) = self.trace.view, self.weights(side)
        ahead = other / view.attention(self.layer).scale
        if view.rotary:
            turn = view.rotations(self.layer, self.trace.n_pos)
            places = at.numbers(self.trace.n_pos, self.trace.batch).to(turn.device)
            ahead = (turn[places] @ ahead[..., None])[..., 0]
        ahead = self.normed(side, at).back(ahead)
        read = self.trace.read(self.site, at)
        constants = [(Component("b_Q" if side == "query" else "b_K"), ahead @ b)]
        if read.bias is not None:
            constants.insert(0, (Component("ln1.b", self.layer), ahead @ (read.bias @ W)))
        return read.back(ahead @ W.T), tuple(constants)

    def projected(
        self, side: Side, parts: Float[Tensor, "component batch pos d_model"]
    ) -> Float[Tensor, "component batch pos d_head"]:
        """What parts of the stream add to the queries or keys, rotated if these are."""
        W, everywhere = self.weights(side)[0], Positions(slice(None))
        read = self.trace.read(self.site).forward(parts) @ W
        return self.rotated(self.normed(side, everywhere).forward(read), everywhere)

    def rotated(
        self, x: Float[Tensor, "component batch kept d_head"], at: Positions
    ) -> Float[Tensor, "component batch kept d_head"]:
        """Parts of queries or keys at their positions, if these are rotary."""
        view, n_pos = self.trace.view, self.trace.n_pos
        if not view.rotary:
            return x
        turn = view.rotations(self.layer, n_pos)
        turn = turn[at.numbers(n_pos, self.trace.batch).to(turn.device)]
        return einsum(x, turn, "part batch pos d, batch pos d e -> part batch pos e")

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
            trace.require_affine(parts.sites(side), scores=True),
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
