"""Targets of attribution: an object that says which direction of the stream it reads, and where.

A logit, a score with its keys given, a neuron's input and a probe are each a sum over the parts of
the stream at some place, plus what biases behind that place add. A target of your own needs the
members of `Target`. Logits and scores have files of their own, `logit_targets` and `score_targets`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, SupportsIndex, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import get_act_name

from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.positions import Positions, whole_number
from lnfree_interp.analysis.stream import Place, Read, Stream
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.analysis.view import View
from lnfree_interp.errors import DataError, NormSiteError
from lnfree_interp.models.site_names import NormSite

Constants = tuple[tuple[Component, Float[Tensor, "batch kept"]], ...]


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
            final norm reads. Or the name of a norm that reads the stream, such as `ln_final`: then
            the probe reads what that norm makes of the stream, gain and bias included.
        pos: A position, from each prompt's own end if negative, or a slice.
        bias: The probe's bias.
        mean: Whether the number is the mean over the positions; if not, each has a number.

    Examples:
        >>> probe = lf.Probe(free.W_U[:, 7], at="blocks.2.hook_resid_pre")
        >>> lf.attribute(lf.trace(free, "for i in"), probe).verify().unit
        'projection'
        >>> whole = lf.Probe(free.W_U[:, 7], pos=slice(1, None), mean=True)
        >>> lf.attribute(lf.trace(free, "for i in"), whole).verify().total.shape
        torch.Size([])
    """

    direction: Any
    at: str | Place | None = None
    pos: SupportsIndex | slice = -1
    bias: float = 0.0
    mean: bool = False

    def needs(self, trace: Trace) -> tuple[Place, list[str]]:
        """As `Target.needs`."""
        place, site = read_at(trace.view, self.at)
        if site is None or site == "ln_final":  # a run stops before that
            return place, [place.hook]
        return place, [place.hook, *trace.scale_names([site])]

    def read(self, trace: Trace) -> Reading:
        """As `Target.read`."""
        trace.require_text()
        view, at = trace.view, trace.positions(self.pos)
        place, site = read_at(view, self.at)
        held = () if site is None else trace.require_affine([site])
        stream, first = at.of(trace.stream(place)), trace.first(at)
        read = Read() if site is None else self._norm(trace, site, at, stream)
        n = stream.shape[1] if self.mean else 1
        direction = self._directions(stream) / n
        constants: list[tuple[Component, Tensor]] = []
        if site is not None and read.bias is not None:
            layer = NormSite.parse(site).layer
            kind = f"{NormSite.parse(site).kind.partition('.')[0]}.b"
            constants.append((Component(kind, layer), direction @ read.bias))
        if self.bias:
            each = torch.full_like(stream[..., 0], self.bias / n)
            constants.append((Component("probe.b"), each))

        def again(changed: Stream, some: slice) -> Float[Tensor, "batch number"]:
            if site is not None:
                changed = view.through_norm(site, changed, first=first[:, some])
            each = torch.linalg.vecdot(changed, direction[:, some])
            return (each.sum(1, keepdim=True) if self.mean else each) + self.bias

        several = isinstance(self.pos, slice) and not self.mean
        what = f"{place.hook}{'' if site is None else f' behind {site}'}"
        what = f"the mean of {what} over positions" if self.mean else what
        return Reading(
            place, at, read.back(direction).contiguous(), tuple(constants),
            again(stream, slice(None)), again, (what,) * trace.batch, "projection",
            f"parts = {what}", held, ("prompt", "pos") if several else ("prompt",),
            summed=self.mean,
        )  # fmt: skip

    def _norm(self, trace: Trace, site: str, at: Positions, stream: Stream) -> Read:
        """How the norm reads the stream at the positions."""
        hook = trace.view.scale_hook(site)
        if site != "ln_final" or hook is None:
            return trace.read(site, at)
        _, found = trace.view.logits(stream, [hook], first=trace.first(at))
        return trace.view.read(site, found[hook])

    def _directions(self, stream: Stream) -> Stream:
        """A direction for each position that is read."""
        direction = torch.as_tensor(self.direction)
        width = stream.shape[-1]
        if direction.ndim == 0 or direction.shape[-1] != width:
            raise DataError(
                f"a direction has {width} entries, not {list(direction.shape)}: give [d_model], or "
                "[pos, d_model]"
            )
        try:
            return direction.to(stream).expand(stream.shape).contiguous()
        except RuntimeError as error:
            raise DataError(
                f"directions of shape {list(direction.shape)} do not fit a stream of shape "
                f"{list(stream.shape)}: give one direction, or one for each position"
            ) from error


def read_at(view: View, at: str | Place | None) -> tuple[Place, str | None]:
    """A place of the stream, and the norm behind it whose output is meant, if one is named.

    Raises:
        DataError: if there is no such place, or the model has no such norm that reads the stream.
    """
    try:
        site = NormSite.parse(str(at))
    except NormSiteError:
        return view.place(at), None
    if site.kind == "ln_final":
        return view.last, site.name
    layer = whole_number(site.layer, "a layer")
    if 0 <= layer < view.n_layers:
        if site.kind in ("ln1.qk", "ln1.v"):
            return Place(layer), site.name
        if site.kind == "ln2" and view.has_mlps:
            return view.mlp_place(layer), site.name
    raise DataError(
        f"{at!r} is no norm that reads this model's stream: give 'ln_final', or one like "
        "'blocks.0.ln1.qk', 'blocks.0.ln1.v' or 'blocks.0.ln2'; or the hook name of a place"
    )
