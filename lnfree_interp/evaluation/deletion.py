"""Whether attribution predicts what deletions do: to scores, to patterns, and to logits.

Components are deleted from the stream that one side of a head reads, or that the final norm reads.
The prediction is the sum of their shares, with the scale of a live norm held, as attribution always
has it. The measurement holds nothing: the model's own norm, block and unembedding run again on what
is left. On a model on which the question is exact both are equal.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lnfree_interp.analysis.components import Component, as_labels
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.logit_targets import Logit, LogitDifference
from lnfree_interp.analysis.parts import Part, expand, project
from lnfree_interp.analysis.positions import Positions, whole_number
from lnfree_interp.analysis.prompts import Answers, Prompt, read_answers
from lnfree_interp.analysis.score_targets import ScoreParts, require_head
from lnfree_interp.analysis.stream import Place
from lnfree_interp.analysis.trace import Trace, trace
from lnfree_interp.analysis.view import Model, Side, View
from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.deletion_results import Deletion, DeletionCheck
from lnfree_interp.numerics import own_precision

HEADS = 24
"""At least so many heads are drawn, if none are named and the model has them."""


@own_precision
def deletion_check(
    model: Model,
    prompts: Prompt,
    heads: str | Component | Sequence[str | Component] | None = None,
    *,
    k: SupportsIndex | Iterable[SupportsIndex] = (1, 2, 4, 8),
    by: str | Level = "head",
    draws: int = 4,
    seed: int = 0,
    answers: Answers | None = None,
    foils: Answers | None = None,
    prepend_bos: bool | None = None,
    batch: int = 16,
    progress: bool = True,
) -> DeletionCheck:
    """Delete what attribution says matters, and as many components at random, and measure.

    For each prompt and head: the score of the last token's query and the key that it attends to
    most, the first token and itself apart. The components of largest share in that score are
    deleted from the stream at the query (only queries of this head read that), then those at the
    key. For each prompt also: the logit of its answer, by deletions from the final stream.

    Args:
        model: A model, LN-free or not. For the prediction a live norm's scale is held, as
            attribution always does; nothing is held in the measurement.
        prompts: One prompt or several, as text or token ids, of at least three tokens each.
        heads: Labels such as `"L2H5"`. Default: as many from each layer, at random, 24 in all or a
            few more; none from the first layer, whose stream is the embeddings alone.
        k: How many components are deleted. One that leaves nothing of the stream is left out.
        by: The level whose components they are, as in `attribute_logits`.
        draws: How many times as many components are drawn at random, as a control.
        seed: The seed of heads and of random components.
        answers: The token whose logit is read after each prompt, one for all or one each. Default:
            the one that the model finds most likely.
        foils: The tokens whose logits are subtracted, given as `answers` are.
        prepend_bos: Whether each text starts with the beginning-of-sequence token, as in `trace`.
        batch: How many prompts run at once; it changes nothing but rounding.
        progress: Whether to show a progress bar.

    Returns:
        A `DeletionCheck`; `.summary()` is the table, `lf.plots.deletions(...)` draws it.

    Raises:
        DataError: for a head that does not exist, a prompt of fewer than three tokens, several
            answers to one prompt, foils without answers, or numbers that are too small.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts, or a
            `TransformerBridge` with norms on queries and keys.

    Source:
        Deletion as a test of attribution: arXiv 1705.07874, arXiv 2307.15771. The comparison over
        scores, patterns and logits, with norms live and frozen, is ours.

    Examples:
        >>> check = lf.deletion_check(free, ["for i in range", "while True:\\n"], progress=False)
        >>> check.verify().summary(["kind"]).columns.tolist()
        ['kind', 'n', 'correlation', 'slope', 'nmae', 'sign']
        >>> live = lf.deletion_check(model, "for i in range", ["L2H5"], progress=False)
        >>> live.certificate.holds, live.held
        (False, ('blocks.2.ln1.qk', 'ln_final'))
    """
    whole = trace(model, prompts, prepend_bos=prepend_bos, hold=True, keep="asked").require_text()
    if min(whole.lengths) < 3:
        raise DataError(
            "a prompt has fewer than three tokens, so its last one has no key but the first and "
            "itself: give longer prompts"
        )
    if foils is not None and answers is None:
        raise DataError("foils were given without answers: give both, or answers alone")
    numbers = k if isinstance(k, Iterable) else [k]
    ks = sorted({whole_number(one, "the number of components") for one in numbers})
    if not ks or ks[0] < 1 or draws < 0 or batch < 1:
        raise DataError(
            f"k={ks}, draws={draws}, batch={batch}: give at least one k of 1 or more, no negative "
            "number of draws, and a batch of 1 or more"
        )
    chosen = level(by)
    wanted = _draw_heads(whole.view, seed) if heads is None else _read_heads(whole.view, heads)
    given = [_one_each(whole, one) for one in (answers, foils)]
    rows: list[Deletion] = []
    held: dict[str, None] = {}
    starts = range(0, whole.batch, batch)
    total = len(starts) * (2 * len(wanted) + 1)
    with tqdm(total=total, desc="deletions", unit="side", disable=not progress) as bar:
        for start in starts:
            some = range(start, min(start + batch, whole.batch))
            one, draw = _some_of(whole, some), _Choice(tuple(ks), draws, seed, some)
            one.need(*_needs(one, wanted, chosen))
            for layer, head in wanted:
                parts = ScoreParts(one, layer, head)
                held |= dict.fromkeys(one.require_affine(parts.sites(), scores=True))
                for side in ("query", "key"):
                    rows += _of_score(parts, side, chosen, draw)
                    bar.update()
            tokens = [None if ids is None else [ids[i] for i in some] for ids in given]
            rows += _of_logit(one, tokens[0], tokens[1], chosen, draw)
            held |= dict.fromkeys(one.require_affine(["ln_final"], logits=True))
            bar.update()
    if not rows:
        raise DataError(f"k={ks} leaves nothing of any stream: give fewer components to delete")
    return DeletionCheck.of(rows, chosen.name, seed, tuple(held), whole.view.W_E.dtype)


# What is asked for


def _read_heads(
    view: View, heads: str | Component | Sequence[str | Component]
) -> list[tuple[int, int]]:
    found = []
    for label in as_labels(heads):
        one = Component.parse(label)
        if one.kind != "head" or one.label != label or one.pos is not None or one.through:
            raise DataError(f"{label} is no head: give labels such as L2H5")
        found.append(require_head(view, one.layer, one.index))
    return list(dict.fromkeys(found))


def _draw_heads(view: View, seed: int) -> list[tuple[int, int]]:
    """As many heads from each layer but the first."""
    generator = torch.Generator().manual_seed(seed)
    behind = range(min(1, view.n_layers - 1), view.n_layers)
    layers = [layer for layer in behind if view.weighing(layer) == "softmax"]
    n_heads = view.cfg.n_heads
    each = min(n_heads, -(-HEADS // max(len(layers), 1)))
    drawn = [
        (layer, head)
        for layer in layers
        for head in sorted(torch.randperm(n_heads, generator=generator)[:each].tolist())
    ]
    return [require_head(view, layer, head) for layer, head in drawn]


def _one_each(whole: Trace, given: Answers | None) -> list[int] | None:
    """One token for each prompt."""
    if given is None:
        return None
    ids, _ = read_answers(whole.view, given, whole.batch, whole.single)
    if ids.shape[1] != 1:
        raise DataError("several answers were given to one prompt: give one")
    return ids[:, 0].tolist()


def _some_of(whole: Trace, numbers: range) -> Trace:
    rows = [whole.tokens[i, : whole.lengths[i]] for i in numbers]
    return Trace(whole.view, rows, hold=True, keep="asked")


def _needs(one: Trace, heads: list[tuple[int, int]], by: Level) -> list[str]:
    """Everything that is asked of one trace, so that the model runs once."""
    names = [one.view.last.hook, *by.needs(one.view, one.view.last)]
    for layer, head in heads:
        names += ScoreParts(one, layer, head).needs()
    return names


# What is deleted


class _Choice:
    """Components to delete: of largest share, and at random, the same in every batch."""

    def __init__(self, ks: tuple[int, ...], draws: int, seed: int, prompts: range):
        self.ks, self.draws, self.prompts = ks, draws, prompts
        self._generators = [
            torch.Generator().manual_seed(seed * 1_000_003 + number) for number in prompts
        ]

    def of(
        self, shares: Float[Tensor, "component prompt"]
    ) -> Iterator[tuple[int, str, Int[Tensor, "k prompt"]]]:
        """How many, how they were chosen, and their rows. Random ones have a share that is not
        zero, so that no bias that the model lacks is among them."""
        size = shares.abs()
        for k in self.ks:
            if k >= len(size):
                break
            yield k, "top", size.topk(k, dim=0).indices
            for _ in range(self.draws):
                ranks = [torch.rand(len(size), generator=one) for one in self._generators]
                drawn = torch.stack(ranks, dim=1).to(size.device).masked_fill(size == 0, -1.0)
                yield k, "random", drawn.topk(k, dim=0).indices


@dataclass(frozen=True, eq=False)
class _Deleted:
    """A choice of components for each prompt."""

    k: int
    chosen: str
    rows: Int[Tensor, "k prompt"]
    labels: list[str]
    gone: Float[Tensor, "prompt one d_model"]
    """What the stream loses."""


def _deletions(
    parts: list[Part],
    components: Sequence[Component],
    shares: Float[Tensor, "component prompt"],
    draw: _Choice,
) -> Iterator[_Deleted]:
    """The choices of components; only those that are in one of them are expanded."""
    choices = list(draw.of(shares))
    if not choices:
        return
    used = torch.cat([rows.flatten() for _, _, rows in choices]).unique()
    vectors = expand(parts, [components[i] for i in used.tolist()])[0][:, :, 0]
    each = torch.arange(shares.shape[1], device=shares.device)
    for k, chosen, rows in choices:
        gone = vectors[torch.searchsorted(used, rows), each].sum(0)
        labels = [", ".join(components[i].label for i in column) for column in rows.T.tolist()]
        yield _Deleted(k, chosen, rows, labels, gone[:, None])


# What that changes


def _of_score(parts: ScoreParts, side: Side, by: Level, draw: _Choice) -> Iterator[Deletion]:
    """What deletions from the stream at one side change in a score and in its weight."""
    one, place, query = parts.trace, Place(parts.layer), parts.trace.positions(-1)
    q = query.numbers(one.n_pos, one.batch).to(one.view.device)
    each = torch.arange(one.batch, device=q.device)
    key = _most_attended(parts, q)
    at = query if side == "query" else Positions(key)
    shares, components = _shares(parts, side, by, q, key)
    own = shares.gather(-1, key.expand(len(shares), -1, -1))[..., 0]
    before = parts.scores[each, q[:, 0]].double()
    weights = one.act("pattern", parts.layer)[each, parts.head, q[:, 0]].double()
    stream, at_side = at.of(one.stream(place)), list(by.parts(one, place, at))
    for deleted in _deletions(at_side, components, own, draw):
        left = before - shares[deleted.rows, each].double().sum(0)
        again = parts.attention_again(side, at, stream - deleted.gone)
        scores, pattern = (x[each, q[:, 0]] for x in again)
        changed = {
            f"score at {side}": (before, before - left, before - scores),
            "pattern": (weights, before.softmax(-1) - left.softmax(-1), weights - pattern),
        }
        for kind, numbers in changed.items():
            found = [x.gather(-1, key)[:, 0] for x in numbers]
            yield from _rows(kind, parts.name, side, key[:, 0].tolist(), deleted, found, draw)


def _most_attended(parts: ScoreParts, q: Int[Tensor, "prompt one"]) -> Int[Tensor, "prompt one"]:
    """The key that each query attends to most, the first token and itself apart."""
    each = torch.arange(len(q), device=q.device)
    scores = parts.scores[each, q[:, 0]].masked_fill(~parts.sees[each, q[:, 0]], -torch.inf)
    scores[:, 0] = -torch.inf
    return scores.scatter(1, q, -torch.inf).argmax(-1, keepdim=True)


def _shares(
    parts: ScoreParts,
    side: Side,
    by: Level,
    q: Int[Tensor, "prompt one"],
    key: Int[Tensor, "prompt one"],
) -> tuple[Float[Tensor, "component prompt pos"], tuple[Component, ...]]:
    """What each component at one side adds to the scores of a query: of all keys if it is at the
    query, of one key if it is there."""
    one, keys = parts.trace, torch.arange(parts.trace.n_pos, device=q.device).expand(len(q), -1)
    at_query = side == "query"
    at = replace(one.positions(-1), repeat=one.n_pos) if at_query else Positions(key)
    there = keys if at_query else key
    met = parts.met("k") if at_query else one.positions(-1).of(parts.met("q"))
    slope = parts.slope(q.expand_as(there), there)[..., None]
    direction, _ = parts.direction(side, at, met * slope)
    values, components = project(by.parts(one, Place(parts.layer), at), direction)
    if at_query:
        sees = parts.sees[torch.arange(len(q), device=q.device), q[:, 0]]
        return values.masked_fill(~sees, 0.0), components
    nothing = values.new_zeros(*values.shape[:2], one.n_pos)
    return nothing.scatter(-1, key.expand(len(values), -1, -1), values), components


def _of_logit(
    one: Trace, answers: list[int] | None, foils: list[int] | None, by: Level, draw: _Choice
) -> Iterator[Deletion]:
    """What deletions from the final stream change in a logit or logit difference."""
    view, at = one.view, one.positions(-1)
    stream = at.of(one.stream(view.last))
    if answers is None:
        answers = view.logits(stream, first=one.first(at))[0][:, 0].argmax(-1).tolist()
    target = Logit(answers) if foils is None else LogitDifference(answers, foils)
    reading = target.read(one)
    parts = list(by.parts(one, view.last, at))
    shares, components = project(parts, reading.direction)
    total = reading.total.double()[:, 0]
    for deleted in _deletions(parts, components, shares[..., 0], draw):
        each = torch.arange(one.batch, device=total.device)
        lost = shares[deleted.rows, each, 0].double().sum(0)
        left = reading.again(stream - deleted.gone, slice(None)).double()[:, 0]
        found = [total, lost, total - left]
        yield from _rows("logit", "", "", [-1] * one.batch, deleted, found, draw)


def _rows(
    kind: str,
    head: str,
    side: str,
    keys: list[int],
    deleted: _Deleted,
    found: list[Float[Tensor, " prompt"]],
    draw: _Choice,
) -> Iterator[Deletion]:
    numbers = torch.stack(found, dim=1).tolist()
    for prompt, key, label, row in zip(draw.prompts, keys, deleted.labels, numbers, strict=True):
        yield Deletion(kind, prompt, head, side, key, deleted.k, deleted.chosen, label, *row)
