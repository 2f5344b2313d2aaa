"""Neurons of an LN-free model, which are fixed half-spaces of the stream.

Without a norm, a neuron's input is a sum over the stream's parts and its bias, and its threshold
is the same for every token. Along any direction of the stream the distance to the next flip of a
gate is a quotient, and up to that flip a ReLU MLP is affine.
"""

from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.asking import analysis
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.parts import expand
from lnfree_interp.analysis.results import CertifiedResult, read_top
from lnfree_interp.analysis.targets import require_mlp
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import measure_error


@dataclass(frozen=True, eq=False, repr=False)
class Flips(CertifiedResult):
    """How far the stream can move along a direction before gates of an MLP flip.

    Attributes:
        pre: [neuron], the input of the activation function (of the gate in a gated MLP).
        slope: [neuron], the change of the input per unit of distance.
        distance: [neuron], where the input is zero, in multiples of the direction; infinite for a
            neuron that does not move towards zero.
        certificate: The inputs at the nearest flip, computed by the model, against pre + t slope.
        affine: For a ReLU MLP without gates, its output half way to the nearest flip against the
            affine map; None otherwise.
        layer: The MLP's layer, counted from 0.
    """

    pre: Float[Tensor, " neuron"]
    slope: Float[Tensor, " neuron"]
    certificate: Certificate
    affine: Certificate | None
    layer: int

    @property
    def distance(self) -> Float[Tensor, " neuron"]:
        """Where each neuron's input is zero: t = -pre / slope, if positive; otherwise infinity."""
        return _distance(self.pre, self.slope)

    @property
    def nearest(self) -> tuple[Component, float]:
        """The first neuron to flip, and the distance at which it does."""
        index = int(self.distance.argmin())
        return Component("neuron", self.layer, index), self.distance[index].item()

    def __repr__(self) -> str:
        neuron, distance = self.nearest
        return f"Flips({len(self.pre)} neurons, the first is {neuron.label} at {distance:.3g})"

    def verify(self, tolerance: float | None = None) -> "Flips":
        """Return self if both identities hold.

        Args:
            tolerance: The largest relative error allowed, as in `Result.verify`.

        Raises:
            InexactError: if one of them does not hold.
        """
        if self.affine is not None:
            self.affine.require(tolerance)
        return super().verify(tolerance)

    def to_frame(self) -> pd.DataFrame:
        """One row per neuron: `component`, `pre`, `slope`, `distance`."""
        n = range(len(self.pre))
        return pd.DataFrame(
            {
                "component": [Component("neuron", self.layer, i).label for i in n],
                "pre": self.pre.tolist(), "slope": self.slope.tolist(),
                "distance": self.distance.tolist(),
            }
        )  # fmt: skip

    def top(self, k: SupportsIndex = 10) -> pd.DataFrame:
        """The k neurons that flip first.

        Raises:
            DataError: if k is less than one.
        """
        frame = self.to_frame().sort_values("distance", kind="stable")
        return frame.head(read_top(k, len(frame))).reset_index(drop=True)


def _distance(pre: Tensor, slope: Tensor) -> Tensor:
    t = -pre / slope
    return torch.where(torch.isfinite(t) & (t > 0), t, torch.inf)


@analysis
def flip_distances(
    trace: Trace, layer: int, along: Any, pos: SupportsIndex = -1, *, by: str | Level = "head"
) -> Flips:
    """How far the stream can move along a direction before a neuron's input changes its sign.

    Args:
        trace: A trace of one prompt; or a model and a prompt, as two arguments.
        layer: The MLP's layer, counted from 0.
        along: A direction of the stream, [d_model]; or a component, which is gradually taken away
            and is gone at distance 1.
        pos: Position at which the stream is moved.
        by: The level whose component it is.

    Returns:
        Input, slope and distance of each neuron, [neuron]; distances are multiples of `along`.

    Raises:
        DataError: if there is no such layer, position, level or component, the direction is not
            [d_model], or there is more than one prompt.
        InexactError: if the norm before the MLP is live, so that inputs are not affine.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Ours: without a norm a neuron's input is affine in the stream, so where it is zero is a
        quotient.

    Examples:
        >>> flips = lf.flip_distances(free, "for i in", layer=1, along="L0H3").verify()
        >>> flips.distance.shape
        torch.Size([768])
        >>> neuron, distance = flips.nearest
        >>> neuron.kind, neuron.layer, distance > 0
        ('neuron', 1, True)
    """
    view, layer = trace.view, require_mlp(trace.view, layer)
    if trace.require_text().batch > 1:
        raise DataError(
            f"this question is about one prompt at a time, not {trace.batch}: take one with "
            "trace.select(i)"
        )
    chosen, place, site = level(by), view.mlp_place(layer), f"blocks.{layer}.ln2"
    view.constant_read(site)  # raises an error for a live norm
    trace.need(place.hook, *chosen.needs(view, place), *trace.scale_names([site]))
    at = trace.positions(pos)
    norm, first = trace.read(site, at), trace.first(at)
    if isinstance(norm.scale, Tensor):
        norm = replace(norm, scale=norm.scale[0, 0])
    x = at.of(trace.stream(place))[0, 0]
    if isinstance(along, str | Component):
        v = -expand(chosen.parts(trace, place, at), [along])[0][0, 0, 0]
    else:
        v = torch.as_tensor(along).to(x)
        if v.shape != x.shape:
            raise DataError(
                f"a direction has {len(x)} entries, not {list(v.shape)}: give [d_model]"
            )
    weights = view.mlp(layer)
    W, b = weights.before_activation
    bias = 0 if norm.bias is None else norm.bias @ W

    def inputs(stream: Tensor) -> Tensor:
        """The neurons' inputs, by the model's own norm."""
        return view.through_norm(site, stream[None, None], first=first)[0, 0] @ W + b

    pre, y = norm.forward(x) @ W + bias + b, norm.forward(v)
    slope = y @ W
    # A direction that no neuron reads, such as the mean, gives only rounding errors: no distance.
    lost = torch.finfo(v.dtype).eps * v.abs().max() / y.abs().max().clamp(min=1e-30)
    slope = torch.where(slope.abs() <= lost * (y.abs() @ W.abs()), 0.0, slope)
    t = _distance(pre, slope).min().item()
    t = t if t < torch.inf else 1.0
    largest = max(pre.abs().max().item(), (t * slope).abs().max().item())
    error = measure_error(pre + t * slope, inputs(x + t * v), largest)
    certificate = Certificate("input at the nearest flip = pre + t slope", error)
    affine = None
    if view.cfg.act_fn == "relu" and not view.gated:
        half = pre + 0.5 * t * slope
        expected = weights.activation(inputs(x + 0.5 * t * v)) @ weights.W_out
        found = ((pre > 0).to(pre) * half) @ weights.W_out
        name = "MLP half way to the nearest flip is affine"
        affine = Certificate(name, measure_error(found, expected))
    return Flips(pre, slope, certificate, affine, layer)
