"""The network with patterns and gates given: one affine map from its tokens to a target."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.asking import analysis
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.gaps import token_gap
from lnfree_interp.analysis.levels import Level
from lnfree_interp.analysis.logit_targets import Logit, LogitDifference
from lnfree_interp.analysis.prompts import Answers
from lnfree_interp.analysis.results import CertifiedResult, Contributions
from lnfree_interp.analysis.stream import Place, Stream
from lnfree_interp.analysis.sublayers import GivenBlock
from lnfree_interp.analysis.targets import Reading, Target
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import MeasuredError

Biases = list[tuple[Component, Float[Tensor, " batch"]]]


@dataclass(frozen=True, eq=False)
class Backward:
    """A target carried back to the tokens."""

    trace: Trace
    reading: Reading
    held: tuple[str, ...]
    """What is not affine on the way, and was held."""
    given: frozenset[str]
    """Sublayers whose output is given, which the direction does not pass through."""
    steps: tuple[tuple[GivenBlock, Stream | None, Stream, Stream], ...]
    """What `Trace.back` yields, block by block."""
    start: Stream
    """The direction of the stream at the target's place."""

    @property
    def u(self) -> Stream:
        """The direction at the embeddings."""
        return self.steps[-1][-1] if self.steps else self.start

    def at(self, place: Place) -> Stream:
        """The direction of the stream at a place, including all that lies behind it."""
        if place == self.reading.place:
            return self.start
        for block, behind, at_attn, before in self.steps:
            if place == Place(block.layer + 1) and behind is not None:
                return behind
            if place == Place(block.layer, mid=True):
                return at_attn
            if place == Place(block.layer):
                return before
        raise DataError(
            f"{place.hook} lies behind {self.reading.place.hook}, where the target reads: give an "
            "earlier place"
        )

    @property
    def gap(self) -> MeasuredError | None:
        """What holding misses; None where nothing is held."""
        if not self.held:
            return None
        return token_gap(self.trace, self.reading, self.u, self.given)

    def biases(self) -> Biases:
        """What biases add, in the order of computation."""
        found: Biases = []
        for block, behind, at_attn, _ in self.steps:
            found += layer_biases(block, behind, at_attn)
        constants = [(component, value[:, 0]) for component, value in self.constants()]
        return [*reversed(found), *constants]

    def constants(self) -> Sequence[tuple[Component, Float[Tensor, "batch one"]]]:
        """What biases behind the target's place add."""
        if not self.reading.summed:
            return self.reading.constants
        return [(c, value.sum(1, keepdim=True)) for c, value in self.reading.constants]


def as_target(answer: Answers | Target, foil: Answers | None) -> Target:
    """The target that a caller means by an answer and a foil.

    Raises:
        DataError: for a target with a foil.
    """
    if not isinstance(answer, Target):
        return Logit(answer) if foil is None else LogitDifference(answer, foil)
    if foil is not None:
        raise DataError(
            "a target has its foil in itself, so `foil` cannot be given with one: give "
            "lf.LogitDifference(answer, foil)"
        )
    return answer


def needed(trace: Trace, target: Target, by: Level) -> Place:
    """Where a target reads; what it and a level need on the way back is kept in one run."""
    place, names = target.needs(trace)
    scales = trace.scale_names(trace.sites_back(place))
    trace.need(*names, *trace.block_names(place), *scales, *by.needs(trace.view, place))
    return place


def carry_back(trace: Trace, target: Target, given: Collection[str] = ()) -> Backward:
    """A target, carried back to the embeddings.

    Args:
        trace: The forward pass.
        target: What is carried back.
        given: Sublayers whose output is given, such as `2_mlp_out`.

    Raises:
        DataError: for several answers at once.
    """
    place, names = target.needs(trace)
    sites = trace.sites_back(place, given)
    trace.need(*names, *trace.block_names(place), *trace.scale_names(sites))
    held = trace.require_affine(sites)
    reading = target.read(trace)
    if reading.total.shape[1] != 1:
        raise DataError("several answers or positions were given: carry back one at a time")
    start = trace.spread(reading.direction, reading.at)
    steps = tuple(trace.back(start, place, given))
    held = tuple(dict.fromkeys((*held, *reading.held)))
    return Backward(trace, reading, held, frozenset(given), steps, start)


def layer_biases(block: GivenBlock, behind: Stream | None, at_attn: Stream) -> Biases:
    """What a block's biases add, starting with the last."""
    found: Biases = []
    if block.mlp is not None and behind is not None:
        mlp = block.mlp
        b_in = (mlp.onto_post(behind) * mlp.b_in).sum((1, 2))
        found.append((Component("b_out", block.layer), (behind @ mlp.weights.b_out).sum(1)))
        found.append((Component("b_in", block.layer), b_in))
    onto_z = block.attention.onto_z(at_attn)
    found.append((Component("b_O", block.layer), (at_attn @ block.attention.b_O).sum(1)))
    found.append((Component("b_V", block.layer), (onto_z * block.b_V).sum((1, 2, 3))))
    return found


@dataclass(frozen=True, eq=False, repr=False)
class AffineMap(CertifiedResult):
    """A target as the sum over tokens t of J_t (embedding + position), plus biases.

    Attributes:
        jacobian: [*batch, pos, d_model], J_t: the direction that the target reads from the stream
            before block 0, in the target's unit per unit of the stream.
        contributions: `embed@t` and `pos_embed@t` for every token, then biases layer by layer, in
            the target's unit.
    """

    jacobian: Float[Tensor, "*batch pos d_model"]
    contributions: Contributions

    @property
    def by_token(self) -> Float[Tensor, "*batch pos"]:
        """[*batch, pos], what each token adds, including its position."""
        found = [self.contributions.of_kind(kind) for kind in ("embed", "pos_embed")]
        return torch.stack([values for values in found if len(values)]).sum(0).movedim(0, -1)

    @property
    def biases(self) -> Float[Tensor, "*batch"]:
        """[*batch], what comes from biases and not from any token."""
        return self.contributions.total - self.by_token.sum(-1)

    @property
    def certificate(self) -> Certificate:
        """The sum of tokens and biases against the target as the model computed it."""
        return self.contributions.certificate

    def select(self, index: SupportsIndex | None = None, /, **named: SupportsIndex) -> "AffineMap":
        """The map of one prompt of a batch.

        Raises:
            DataError: if there is no such prompt, or the map is of one prompt already.
        """
        chosen = self.contributions.select(index, **named)
        number = index if index is not None else named["prompt"]
        return AffineMap(self.jacobian[number], chosen)

    def to_frame(self) -> Any:
        """One row per token's embedding and position, and per bias (see `Contributions`)."""
        return self.contributions.to_frame()

    def top(self, k: SupportsIndex = 10) -> Any:
        """The k rows of largest absolute value (see `Contributions`)."""
        return self.contributions.top(k)

    def __repr__(self) -> str:
        if self.contributions.dims:
            return self._line(f"jacobians {list(self.jacobian.shape)}")
        whole, biases = self.by_token.sum().item(), self.biases.item()
        tokens = self.by_token.shape[0]
        return self._line(
            f"{tokens} tokens, {whole:+.3f} from tokens and {biases:+.3f} from biases"
        )


@analysis
def affine_map(trace: Trace, answer: Answers | Target, foil: Answers | None = None) -> AffineMap:
    """What each input token adds to a logit, with attention patterns and neuron gates given.

    Only patterns and gates are given; norms are not. Biases belong to no token, stand apart, and
    are often a large share. (Detached Jacobians hold norms as well, so they only add up.)

    Args:
        trace: A trace; or a model and a prompt, as two arguments.
        answer: The next token, as in `attribute_logits`, one for each prompt; or any target.
        foil: The token whose logit is subtracted.

    Returns:
        What each token adds, [pos], and what biases add, in logits; and the Jacobian,
        [pos, d_model]. For several prompts, with a first dimension [prompt].

    Raises:
        InexactError: if a norm on the way is live or the logits are capped, and the trace does not
            hold.
        DataError: as for `attribute_logits`, and for more than one answer.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Ours: with patterns given the logit is a sum over tokens in an attention-only model (Elhage
        et al. 2021, https://transformer-circuits.pub/2021/framework); each neuron's secant
        post / pre carries that through MLPs.

    Examples:
        >>> tokens_add = lf.affine_map(free, "for i in", " range").verify()
        >>> tokens_add.by_token.shape, tokens_add.jacobian.shape
        (torch.Size([4]), torch.Size([4, 192]))
        >>> tokens_add.contributions.labels[-4:]
        ['3_b_O', '3_b_in', '3_b_out', 'b_U']
    """
    way = carry_back(trace, as_target(answer, foil))
    reading, values, components = way.reading, [], []
    for kind, x in trace.embeds().items():
        values.append(torch.linalg.vecdot(x, way.u).T)
        components += [Component(kind, pos=pos) for pos in range(x.shape[1])]
    for component, value in way.biases():
        values.append(value[None])
        components.append(component)
    what = reading.identity.removeprefix("parts = ")
    contributions = Contributions(
        torch.cat(values), tuple(components), reading.total[:, 0], "token", ("prompt",), reading.of,
        trace.prompts, unit=reading.unit, held=way.held, gap=way.gap, scale=reading.scale,
        identity=f"tokens + biases = {what}, patterns and gates given",
    )  # fmt: skip
    whole = AffineMap(way.u, contributions)
    return whole.select(prompt=0) if trace.single else whole
