"""A head's attention pattern without some components of what it reads, in closed form.

The parts of queries and keys are known, so taking one away gives the new scores and, by the
softmax, the new pattern, without running the model again. The certificate does run it again, to
check.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import get_act_name

from lnfree_interp.analysis.ablation import by_ablation
from lnfree_interp.analysis.asking import analysis
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.components import KINDS, Component, as_labels
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.parts import expand
from lnfree_interp.analysis.results import CertifiedResult, largest_rows
from lnfree_interp.analysis.score_targets import ScoreParts, require_head
from lnfree_interp.analysis.stream import Place, Stream
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.analysis.view import Side
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import measure_error, soft_cap

Sides = Literal["both", "query", "key"]


@dataclass(frozen=True, eq=False, repr=False)
class CounterfactualPattern(CertifiedResult):
    """A head's attention pattern without some components of what it reads.

    Attributes:
        pattern: [query, key], attention weights without the components, in closed form.
        scores: [query, key], the same before the softmax; -inf where a query does not see a key.
        original: [query, key], the model's own attention weights.
        certificate: The closed form against a run of the model in which the components were
            subtracted from what the head reads; where a live norm is held, the gap is what the
            closed form misses.
        without: The labels of the components.
        head: The head, such as `L2H5`.
        prompts: The tokens of the prompt, as strings.
    """

    pattern: Float[Tensor, "query key"]
    scores: Float[Tensor, "query key"]
    original: Float[Tensor, "query key"]
    certificate: Certificate
    without: tuple[str, ...]
    head: Component
    prompts: tuple[tuple[str, ...], ...]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The prompt's tokens, as strings."""
        return self.prompts[0]

    def to_frame(self) -> pd.DataFrame:
        """One row per query and key that it sees: `query`, `key`, `original`, `without`, `change`,
        in attention weights; `held` where something was held."""
        where = self.scores.isfinite().nonzero().tolist()
        rows = [
            {"query": q, "key": k, "original": self.original[q, k].item(),
             "without": self.pattern[q, k].item()}
            for q, k in where
        ]  # fmt: skip
        frame = pd.DataFrame(rows)
        return self._noted(frame.assign(change=frame["without"] - frame["original"]))

    def top(self, k: SupportsIndex = 10) -> pd.DataFrame:
        """The k weights that change most.

        Raises:
            DataError: if k is less than one.
        """
        return largest_rows(self.to_frame(), "change", k)

    def __repr__(self) -> str:
        moved = (self.pattern - self.original).abs().max().item()
        return (
            f"CounterfactualPattern({self.head.label} without {', '.join(self.without)}: weights "
            f"move by up to {moved:.3f}; {self.certificate})"
        )


@analysis
def counterfactual_pattern(
    trace: Trace,
    layer: SupportsIndex,
    head: SupportsIndex,
    without: str | Component | Sequence[str | Component],
    *,
    side: Sides = "both",
    by: str | Level = "head",
) -> CounterfactualPattern:
    """The pattern that a head would have if components were missing from what it reads.

    Only what this head reads changes; the rest of the model still reads the components. A soft cap
    on scores is applied, not held.

    Args:
        trace: A trace of one prompt; or a model and a prompt, as two arguments.
        layer: The head's layer, counted from 0.
        head: The head's index in its layer, counted from 0.
        without: Labels of components of the level, such as `"L0H3"`, `"pos_embed"`, `"0_mlp_out"`.
        side: Whether they are missing from queries (`"query"`), from keys (`"key"`), or `"both"`.
        by: The level whose components they are, as in `attribute_logits`.

    Returns:
        Patterns with and without the components, each [query, key], in attention weights.

    Raises:
        DataError: for a component that does not exist at that level before this layer (the message
            names the nearest); for a head, level or side that does not exist, no component, a bias
            that is no part of the stream, or more than one prompt.
        InexactError: if a norm that queries and keys read through is live and the trace does not
            hold.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts, or a
            `TransformerBridge` with norms on queries and keys.

    Source:
        Ours: components are subtracted in the QK circuit (Elhage et al. 2021,
        https://transformer-circuits.pub/2021/framework), and the softmax is taken again.

    Examples:
        >>> without = lf.counterfactual_pattern(free, "for i in", 2, 5, without="L0H3").verify()
        >>> without.pattern.shape
        torch.Size([4, 4])
        >>> without.head.label, without.without
        ('L2H5', ('L0H3',))
    """
    layer, head = require_head(trace.view, layer, head)
    if trace.batch > 1:
        raise DataError(
            f"this question is about one prompt at a time, not {trace.batch}: take one with "
            "trace.select(i)"
        )
    if side not in get_args(Sides):
        raise DataError(f"side={side!r} is not a side: give one of {', '.join(get_args(Sides))}")
    wanted = as_labels(without)
    if not wanted:
        raise DataError("no component was named: give at least one component to take away")
    if biases := [one for one in wanted if not _in_stream(one)]:
        raise DataError(
            f"{biases[0]} is no part of the stream, so it cannot be taken away: give components "
            "that write to the stream"
        )
    parts, chosen, place = ScoreParts(trace, layer, head), level(by), Place(layer)
    trace.need(*parts.needs(), *chosen.needs(trace.view, place))
    sides: tuple[Side, ...] = get_args(Side) if side == "both" else (side,)
    held = trace.require_affine(parts.sites(*sides))
    q, k = parts.met("q")[0], parts.met("k")[0]
    gone = expand(chosen.parts(trace, place), wanted)[0]
    if "query" in sides:
        q = q - parts.projected("query", gone).sum(0)[0]
    if "key" in sides:
        k = k - parts.projected("key", gone).sum(0)[0]
    scores = _scores(parts, q, k)
    pattern = scores.softmax(-1)
    patched = _patched_pattern(parts, chosen, wanted, side)
    error = measure_error(pattern, patched)
    name = f"closed form = patched pattern of {parts.name}"
    gap = None
    if held:  # the gap compares with a run in which the norm reads what is left
        own = _scores(parts, parts.met("q")[0], parts.met("k")[0]).softmax(-1)
        gap = error
        error = measure_error(own, trace.act("pattern", layer)[0, head])
        name = f"closed form = pattern of {parts.name}, nothing missing"
    return CounterfactualPattern(
        pattern, scores, trace.act("pattern", layer)[0, head], Certificate(name, error, held, gap),
        tuple(wanted), Component("head", layer, head), trace.prompts,
    )  # fmt: skip


def _in_stream(label: str) -> bool:
    try:
        return Component.parse(label).in_stream
    except DataError:  # the label is of the caller's own level
        return True


def _scores(parts: ScoreParts, q: Tensor, k: Tensor) -> Float[Tensor, "query key"]:
    """The scores of queries and keys: divided, capped and masked as the model does it."""
    view = parts.trace.view
    scores = soft_cap(q @ k.T / view.attention(parts.layer).scale, view.score_cap)
    return scores.masked_fill(~parts.sees[0], -torch.inf)


def _patched_pattern(
    parts: ScoreParts, by: Level, without: Sequence[str], side: Sides
) -> Float[Tensor, "query key"]:
    """The pattern that the model's own block computes from a stream without the components."""
    trace, layer = parts.trace, parts.layer
    gone = torch.stack([_written(trace, by, one, Place(layer)) for one in without]).sum(0)
    kept, hook = {}, get_act_name("pattern", layer)
    if side != "both":
        other = parts.hook("k" if side == "query" else "q")
        kept = {other: lambda x: trace[other]}
    stream = trace.stream(Place(layer)) - gone
    _, found = trace.view.run(stream, [hook], start=layer, stop=layer + 1, edits=kept)
    return found[hook][0, parts.head]


def _written(trace: Trace, by: Level, label: str, place: Place) -> Stream:
    """What a component writes, measured by ablation where it is one of the model's own parts."""
    try:
        component = Component.parse(label)
    except DataError:
        component = None
    if component is None or component.kind not in KINDS:
        return expand(by.parts(trace, place), [label])[0][0]
    return by_ablation(trace.view, trace.tokens, component)
