"""Levels: how finely a model is taken apart.

A level is an object that splits the residual stream at a place into parts that add up to it. Five
are built in and looked up by name. Any object with the same members may be passed as `by`, such as
the rows of a dictionary and what they miss.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol, runtime_checkable

from torch import Tensor
from transformer_lens.utilities import get_act_name

from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.parts import Constant, Dense, Heads, Part, Rows, Sources
from lnfree_interp.analysis.positions import Positions
from lnfree_interp.analysis.stream import Place
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.analysis.view import View
from lnfree_interp.errors import DataError


@runtime_checkable
class Level(Protocol):
    """What `by` may be: an object that takes the stream apart.

    Examples:
        >>> [component.label for part in lf.level("sublayer").parts(
        ...     lf.trace(free, "for i in"), lf.Place(1)) for component in part.components]
        ['embed', 'pos_embed', '0_attn_out', '0_mlp_out']
    """

    name: str
    """A word for tables and titles."""

    def needs(self, view: View, place: Place) -> list[str]:
        """Hook names of the activations that `parts` reads.

        Args:
            view: The model.
            place: Where the stream is taken apart.
        """
        ...

    def parts(
        self, trace: Trace, place: Place, at: Positions | None = None, biases: bool = False
    ) -> Iterator[Part]:
        """The parts that add up to the stream at a place, in the order of computation.

        Args:
            trace: The forward pass.
            place: Where the stream is taken apart.
            at: The positions that are read. Default: all.
            biases: Whether each head's value bias is a part of its own.
        """
        ...


class _Level:
    """The embeddings, then layer by layer what attention and MLP write."""

    def __init__(self, name: str, attn: tuple[str, ...], mlp: str):
        self.name, self._attn_acts, self._mlp_act = name, attn, mlp

    def __repr__(self) -> str:
        return f"level({self.name!r})"

    def needs(self, view: View, place: Place) -> list[str]:
        """As `Level.needs`."""
        names = [get_act_name("embed")]
        names += [get_act_name("pos_embed")] if view.has_positions else []
        for layer in range(place.layer + place.mid):
            names += [get_act_name(act, layer) for act in self._attn_acts]
            if view.has_mlps and layer < place.layer:
                names.append(get_act_name(self._mlp_act, layer))
        return names

    def parts(
        self, trace: Trace, place: Place, at: Positions | None = None, biases: bool = False
    ) -> Iterator[Part]:
        """As `Level.parts`."""
        at = at or Positions(slice(None))
        trace.need(*self.needs(trace.view, place))
        for kind, x in trace.embeds().items():
            yield Dense((Component(kind),), Place(0), at.of(x))
        for layer in range(place.layer + place.mid):
            with_mlp = trace.view.has_mlps and layer < place.layer
            yield from self._layer(trace, layer, at, biases, with_mlp)

    def _layer(
        self, trace: Trace, layer: int, at: Positions, biases: bool, with_mlp: bool
    ) -> Iterator[Part]:
        yield from self._attention(trace, layer, at, biases)
        if with_mlp:
            yield from self._mlp(trace, layer, at)

    def _attention(self, trace: Trace, layer: int, at: Positions, biases: bool) -> Iterator[Part]:
        """The heads, with the output bias apart."""
        written, z = trace.view.attn_written(layer), at.of(trace.act("z", layer))
        b_V = trace.value_bias(layer, at) if biases else None
        heads, attention = _labels("head", layer, z.shape[2]), trace.view.attention(layer)
        yield Heads(heads, written, z if b_V is None else z - b_V, attention)
        yield from self._attention_biases(trace, layer, z, b_V)

    def _attention_biases(
        self, trace: Trace, layer: int, like: Tensor, b_V: Tensor | None
    ) -> Iterator[Part]:
        view, shape = trace.view, (like.shape[0], like.shape[1])
        attention, written = view.attention(layer), view.attn_written(layer)
        if b_V is not None:
            n_heads = like.shape[2]
            labels = _labels("b_V", layer, n_heads)
            if b_V.ndim == 2:
                wrote = attention.write(b_V, list(range(n_heads)))
                yield Constant(labels, written, wrote, shape)
            else:
                yield Heads(labels, written, b_V, attention)
        yield Constant((Component("b_O", layer),), written, attention.b_O[None], shape)

    def _mlp(self, trace: Trace, layer: int, at: Positions) -> Iterator[Part]:
        out = at.of(trace.act("mlp_out", layer))
        yield Dense((Component("mlp_out", layer),), Place(layer + 1), out)


class _Layers(_Level):
    """Attention and MLP of each layer together."""

    def _layer(
        self, trace: Trace, layer: int, at: Positions, biases: bool, with_mlp: bool
    ) -> Iterator[Part]:
        out = at.of(trace.act("attn_out", layer))
        if with_mlp:
            out = out + at.of(trace.act("mlp_out", layer))
        whole = with_mlp or not trace.view.has_mlps
        written = Place(layer + 1) if whole else trace.view.attn_written(layer)
        yield Dense((Component("layer" if whole else "attn_out", layer),), written, out)


class _Sublayers(_Level):
    """Attention and MLP of each layer."""

    def _attention(self, trace: Trace, layer: int, at: Positions, biases: bool) -> Iterator[Part]:
        out = at.of(trace.act("attn_out", layer))
        yield Dense((Component("attn_out", layer),), trace.view.attn_written(layer), out)


class _SourceTokens(_Level):
    """Each head by the token that it reads, its value bias apart."""

    def _attention(self, trace: Trace, layer: int, at: Positions, biases: bool) -> Iterator[Part]:
        attention = trace.view.attention(layer)
        v, pattern = trace.act("v", layer), at.of(trace.act("pattern", layer), dim=2)
        n_heads = pattern.shape[1]
        v = v.repeat_interleave(n_heads // v.shape[2], dim=2) - trace.view.value_bias(layer)
        labels, written = _source_labels(layer, n_heads, v.shape[1]), trace.view.attn_written(layer)
        yield Sources(labels, written, pattern, v, attention)
        b_V = trace.value_bias(layer, at)
        yield from self._attention_biases(trace, layer, pattern.transpose(1, 2), b_V)


class _Neurons(_Level):
    """Heads, and MLPs by neuron, their output bias apart."""

    def _mlp(self, trace: Trace, layer: int, at: Positions) -> Iterator[Part]:
        post, weights = at.of(trace.act("post", layer)), trace.view.mlp(layer)
        labels, place = _labels("neuron", layer, post.shape[-1]), Place(layer + 1)
        yield Rows(labels, place, post, weights.W_out)
        shape = (post.shape[0], post.shape[1])
        yield Constant((Component("b_out", layer),), place, weights.b_out[None], shape)


LEVELS: dict[str, Level] = {
    "layer": _Layers("layer", ("attn_out",), "mlp_out"),
    "sublayer": _Sublayers("sublayer", ("attn_out",), "mlp_out"),
    "head": _Level("head", ("z",), "mlp_out"),
    "source": _SourceTokens("source", ("v", "pattern"), "mlp_out"),
    "neuron": _Neurons("neuron", ("z",), "post"),
}
"""The built-in levels by name."""


def level(by: str | Level) -> Level:
    """A level by name; a level that is given as an object is returned unchanged.

    Args:
        by: `"layer"`; `"sublayer"`: attention and MLP of each layer; `"head"`: attention by head,
            its output bias b_O apart; `"source"`: each head by the token that it reads, its value
            bias b_V apart; `"neuron"`: heads, and MLPs by neuron, their bias b_out apart. Or any
            object with the members of `Level`.

    Returns:
        The level.

    Raises:
        DataError: if no level has that name, or the object lacks a member.

    Source:
        Ours.

    Examples:
        >>> lf.level("head").name
        'head'
    """
    if isinstance(by, str):
        if by not in LEVELS:
            raise DataError(
                f"by={by!r} is no level: give one of {', '.join(LEVELS)}, or an object with "
                "`name`, `needs` and `parts`"
            )
        return LEVELS[by]
    if not isinstance(by, Level):
        raise DataError(
            f"by={by!r:.60} is no level: give the name of one, or an object with `name`, `needs` "
            "and `parts`"
        )
    return by


@lru_cache(maxsize=256)
def _labels(kind: str, layer: int, n: int) -> tuple[Component, ...]:
    """The heads or neurons of a layer; they are made once, since there are many."""
    return tuple(Component(kind, layer, index) for index in range(n))


@lru_cache(maxsize=24)
def _source_labels(layer: int, n_heads: int, sources: int) -> tuple[Component, ...]:
    """The heads of a layer by source token. Few are kept, since every length of prompt has its
    own."""
    return tuple(Component("head", layer, i, pos) for i in range(n_heads) for pos in range(sources))
