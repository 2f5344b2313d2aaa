"""Neurons of an LN-free model: fixed half-spaces of the stream.

Without a norm, a neuron's input is a sum over the stream's parts and its bias, and its threshold
is the same for every token. Along any direction of the stream the distance to the next flip of a
gate is a quotient, and up to there a ReLU MLP is affine.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.contributions import Component, Contributions, Level
from lnfree_interp.analysis.gaps import largest
from lnfree_interp.analysis.parts import expand, project
from lnfree_interp.analysis.questions import (
    Prompt,
    read_one_prompt,
    read_position,
    strings,
)
from lnfree_interp.analysis.reads import held, read, read_names
from lnfree_interp.analysis.writes import (
    Place,
    require_decomposable,
    require_level,
    write_names,
    writes,
)
from lnfree_interp.errors import DataError
from lnfree_interp.models.running import run_and_keep
from lnfree_interp.numerics import measure_error

Of = Literal["pre", "post"]


def mlp_place(model: HookedTransformer, layer: int) -> Place:
    """What a layer's MLP reads: the stream after its attention, or before it in parallel blocks.

    Raises:
        DataError: if the layer has no MLP.
    """
    if not isinstance(layer, int) or model.cfg.attn_only or not 0 <= layer < model.cfg.n_layers:
        raise DataError(f"the model has no MLP in layer {layer}")
    return Place(layer, mid=not model.cfg.parallel_attn_mlp)


@torch.no_grad()
def attribute_neuron(
    model: HookedTransformer,
    prompt: Prompt,
    layer: int,
    neuron: int,
    pos: int = -1,
    *,
    of: Of = "pre",
    by: Level = "head",
    prepend_bos: bool | None = None,
    biases: bool = False,
    frozen_scale: bool = False,
) -> Contributions:
    """A neuron's input, or its activation, as a sum over what the stream is made of.

    The neuron's bias b_in, and that of its norm, `1_ln2.b`, where it has one, are components too.

    Args:
        model: LN-free.
        prompt: One prompt.
        layer: Of the neuron.
        neuron: Its index.
        pos: Position at which the neuron is read.
        of: `"pre"`: what the activation function gets; minus the bias b_in is its threshold.
            `"post"`: the activation, by the secant post / pre, which splits it completely; in a
            gated MLP what passes the gate, the gate held.
        by: As in `attribute_logits`.
        prepend_bos: As in `attribute_logits`.
        biases: As in `attribute_logits`.
        frozen_scale: Hold the scale of a live norm before the MLP; `.gap` measures what that
            misses, the gate held.

    Returns:
        Values [component], in units of the neuron's input or of its activation.

    Raises:
        DataError: if there is no such neuron, position, level or `of`, or more than one prompt.
        InexactError: if the norm before the MLP is live and `frozen_scale` is False.
        UnsupportedModelError: for a model whose stream has other parts.

    Source:
        Neurons as keys that the stream is compared with: arXiv 2012.14913. The sum over the parts
        of the stream, and the secant, are ours.

    Examples:
        >>> neuron = lf.attribute_neuron(free, "for i in", layer=1, neuron=7).verify()
        >>> neuron.values.shape, neuron.labels[-1]
        (torch.Size([18]), '1_b_in')
        >>> _ = lf.attribute_neuron(free, "for i in", layer=1, neuron=7, of="post").verify()
    """
    if of not in get_args(Of):
        raise DataError(f"of={of!r} is not one of {', '.join(get_args(Of))}")
    require_level(by)
    place, tokens, pos = _question(model, prompt, layer, pos, prepend_bos)
    mlp: Any = model.blocks[layer].mlp
    n_neurons = mlp.W_in.shape[1]
    if not 0 <= neuron < n_neurons:
        raise DataError(f"layer {layer} has neurons 0 to {n_neurons - 1}, not {neuron}")
    site, prefix = f"blocks.{layer}.ln2", f"blocks.{layer}.mlp"
    nonlinear = held(model, frozen_scale, [site])
    gated = model.cfg.gated_mlp
    through = mlp.W_gate if gated and of == "pre" else mlp.W_in
    w, b = through[:, neuron], mlp.b_in[neuron]
    names = [*write_names(model, by, place), *read_names(model, [site])]
    names += [f"{prefix}.hook_pre", f"{prefix}.hook_post", place.hook]
    names += [f"{prefix}.hook_pre_linear"] if gated else []
    _, cache = run_and_keep(model, tokens, names, layer + 1)
    at = slice(pos, pos + 1)
    norm = read(model, cache, site).at(at)
    pre, post = (cache[f"{prefix}.hook_{x}"][:, at, neuron] for x in ("pre", "post"))
    slope = torch.ones_like(pre)
    if of == "post":
        linear = cache[f"{prefix}.hook_pre_linear"][:, at, neuron] if gated else pre
        passed = post - b if gated else post
        slope = torch.where(linear == 0, 0.0, passed / linear)
    constants = []
    if norm.bias is not None:
        constants.append((Component("ln2.b", layer), slope * (norm.bias @ w)))
    if not gated:
        constants.append((Component("b_in", layer), slope * b))
    elif of == "post":
        constants.append((Component("b_in", layer), b.expand_as(pre)))
    direction = norm.back((slope[..., None] * w).expand(1, 1, -1)).contiguous()
    parts = writes(model, cache, by, place, at, biases=biases)
    values, components = project(parts, direction, constants)
    gap = None
    if nonlinear:
        rows = largest(values, components)
        parts = writes(model, cache, by, place, at, biases=biases)
        vectors, _ = expand(parts, [components[row] for row in rows])
        x = cache[place.hook][:, at]
        ln2 = model.blocks[layer].ln2
        losses = [slope[0, 0] * ((ln2(x) - ln2(x - v)) @ w)[0, 0] for v in vectors]
        gap = measure_error(values[rows, 0, 0], torch.stack(losses))
    name = Component("neuron", layer, neuron).label
    return Contributions(
        values[:, 0, 0], components, (pre if of == "pre" else post)[0, 0], by,
        of=(f"{of} of {name} at {pos}",),
        prompts=(tuple(strings(model, tokens[0].tolist())),),
        frozen_scale=bool(nonlinear),
        identity=f"parts = {of} of {name}",
        gap=gap,
    )  # fmt: skip


def _question(
    model: HookedTransformer, prompt: Prompt, layer: int, pos: int, prepend_bos: bool | None
) -> tuple[Place, Int[Tensor, "1 pos"], int]:
    require_decomposable(model)
    tokens = read_one_prompt(model, prompt, prepend_bos)
    return mlp_place(model, layer), tokens, read_position(pos, tokens.shape[1])


@dataclass(frozen=True, eq=False, repr=False)
class Flips:
    """How far the stream can move along a direction before gates of an MLP flip.

    Attributes:
        pre: [neuron], the input of the activation function (of the gate in a gated MLP).
        slope: [neuron], how fast it changes, per unit of distance.
        distance: [neuron], where it is zero, in multiples of the direction; infinite for a neuron
            that moves away from zero.
        certificate: Inputs at the nearest flip, computed by the model, against pre + t slope.
        affine: For a ReLU MLP without gates: its output half way to the nearest flip against the
            affine map; None otherwise.
        layer: Of the MLP.
    """

    pre: Float[Tensor, " neuron"]
    slope: Float[Tensor, " neuron"]
    certificate: Certificate
    affine: Certificate | None
    layer: int

    @property
    def distance(self) -> Float[Tensor, " neuron"]:
        """Where each neuron's input is zero: t = -pre / slope, if that is ahead."""
        t = -self.pre / self.slope
        return torch.where(torch.isfinite(t) & (t > 0), t, torch.inf)

    @property
    def nearest(self) -> tuple[Component, float]:
        """The first neuron to flip, and at which distance."""
        index = int(self.distance.argmin())
        return Component("neuron", self.layer, index), self.distance[index].item()

    def __repr__(self) -> str:
        neuron, distance = self.nearest
        return f"Flips({len(self.pre)} neurons, the first is {neuron.label} at {distance:.3g})"

    def verify(self, tolerance: float | None = None) -> "Flips":
        """Return self if both identities hold.

        Args:
            tolerance: As in `Contributions.verify`.

        Raises:
            InexactError: if one does not.
        """
        for certificate in (self.certificate, self.affine):
            if certificate is not None:
                certificate.require(tolerance)
        return self


@torch.no_grad()
def flip_distances(
    model: HookedTransformer,
    prompt: Prompt,
    layer: int,
    along: Float[Tensor, " d_model"] | str | Component,
    pos: int = -1,
    *,
    by: Level = "head",
    prepend_bos: bool | None = None,
) -> Flips:
    """How far the stream may move before a neuron's input changes its sign.

    Args:
        model: LN-free: with a live norm the input is no straight line.
        prompt: One prompt.
        layer: Of the MLP.
        along: A direction of the stream, [d_model]; or a component, which is taken away: at
            distance 1 it is gone.
        pos: Position at which the stream is moved.
        by: Level at which the component is looked up.
        prepend_bos: As in `attribute_logits`.

    Returns:
        Input, slope and distance of each neuron, [neuron]; distances in multiples of `along`.

    Raises:
        DataError: if there is no such layer, position, level or component, the direction is not
            [d_model], or there is more than one prompt.
        InexactError: if the norm before the MLP is live.
        UnsupportedModelError: for a model whose stream has other parts.

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
    place, tokens, pos = _question(model, prompt, layer, pos, prepend_bos)
    require_level(by)
    site = f"blocks.{layer}.ln2"
    held(model, False, [site])
    gated = model.cfg.gated_mlp
    block: Any = model.blocks[layer]
    names = [*write_names(model, by, place), place.hook]
    _, cache = run_and_keep(model, tokens, names, layer + 1)
    x = cache[place.hook][0, pos]
    if not isinstance(along, str | Component):
        along = torch.as_tensor(along)
        if along.shape != x.shape:
            raise DataError(f"a direction has {len(x)} entries, not {list(along.shape)}")
        v = along.to(x)
    else:
        parts = writes(model, cache, by, place, slice(pos, pos + 1))
        v = -expand(parts, [along])[0][0, 0, 0]
    W = block.mlp.W_gate if gated else block.mlp.W_in
    b = 0 if gated else block.mlp.b_in
    norm = read(model, {}, site)
    bias = 0 if norm.bias is None else norm.bias @ W

    def inputs(stream: Tensor) -> Tensor:
        """By the model's own modules."""
        return block.ln2(stream[None, None])[0, 0] @ W + b

    pre = norm.forward(x) @ W + bias + b
    y = norm.forward(v)
    slope = y @ W
    # A direction that nothing reads, such as the mean, leaves rounding, and no distance.
    lost = torch.finfo(v.dtype).eps * v.abs().max() / y.abs().max().clamp(min=1e-30)
    slope = torch.where(slope.abs() <= lost * (y.abs() @ W.abs()), 0.0, slope)
    flips = Flips(pre, slope, Certificate("", measure_error(pre, pre)), None, layer)
    t = flips.nearest[1]
    t = t if t < torch.inf else 1.0
    there = inputs(x + t * v)
    largest = max(pre.abs().max().item(), (t * slope).abs().max().item())
    certificate = Certificate(
        "input at the nearest flip = pre + t slope", measure_error(pre + t * slope, there, largest)
    )
    affine = None
    if model.cfg.act_fn == "relu" and not gated:
        gate = (pre > 0).to(pre)
        expected = block.mlp(block.ln2((x + 0.5 * t * v)[None, None]))[0, 0]
        found = (gate * (pre + 0.5 * t * slope)) @ block.mlp.W_out + block.mlp.b_out
        affine = Certificate(
            "MLP half way to the nearest flip is affine", measure_error(found, expected)
        )
    return Flips(pre, slope, certificate, affine, layer)
