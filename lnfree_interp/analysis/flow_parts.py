"""The nodes of a flow graph with their vectors: what each writes, and what it reads."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.affine import layer_biases
from lnfree_interp.analysis.contributions import Component
from lnfree_interp.analysis.gates import Held, HeldLayer, HeldMLP
from lnfree_interp.analysis.logit_reading import LogitReading

Unit = Literal["neuron", "mlp"]


@dataclass(frozen=True, eq=False)
class FlowPart:
    """A node with its vectors."""

    component: Component
    pos: int | None
    flow: float
    writes: Float[Tensor, " d_model"] | None
    """What it adds to the stream at its position."""
    reads: Float[Tensor, " d_model"]
    """The direction that it reads, at every position times `weights`; its output's share of the
    logit is the sum, plus `own_bias`."""
    weights: Float[Tensor, " pos"]
    own_bias: float
    place: float
    """Where it writes, in the order of computation; it reads what was written before `reads_at`."""
    reads_at: float

    @property
    def name(self) -> str:
        """As in `FlowNode`."""
        if self.component.kind == "b_U":
            return "logit"
        return f"{self.component.label}@{self.pos}"


def flow_parts(
    network: Held, reading: LogitReading, unit: Unit, top_k: int | None
) -> tuple[list[FlowPart], float]:
    """Tokens, the parts of largest flow in the order of computation, and the logit; and what all
    biases together add to it."""
    start = reading.spread(network.streams[-1])
    u = start
    directions, all_biases = [], sum(value.item() for _, value in reading.constants)
    for layer, behind, at_attn, before in network.back(start):
        directions.append((layer, behind, at_attn))
        all_biases += sum(v.item() for _, v in layer_biases(layer, behind, at_attn))
        u = before
    # Candidates in one row; a section of it has the parts of one kind in one layer, by position.
    sizes: list[Tensor] = []
    sections: list[tuple[int, str, int]] = []
    for layer, behind, at_attn in directions:
        flows = [("head", torch.linalg.vecdot(layer.z, layer.onto_z(at_attn))[0])]
        if layer.mlp is not None:
            neurons = (layer.mlp.post * layer.mlp.onto_post(behind))[0]
            whole = neurons.sum(1, keepdim=True)
            flows.append(("mlp_out", whole) if unit == "mlp" else ("neuron", neurons))
        for kind, flow in flows:
            sizes.append(flow.flatten())
            sections.append((layer.layer, kind, flow.shape[1]))
    size = torch.cat(sizes)
    starts = list(accumulate((len(section) for section in sizes), initial=0))
    count = len(size) if top_k is None else min(top_k, len(size))
    chosen = size.abs().topk(count).indices.tolist()
    by_layer = {layer.layer: (layer, behind, at_attn) for layer, behind, at_attn in directions}
    parts = []
    for index in chosen:
        section = bisect_right(starts, index) - 1
        number, kind, width = sections[section]
        pos, i = divmod(index - starts[section], width)
        layer, behind, at_attn = by_layer[number]
        make = _head if kind == "head" else _neuron if kind == "neuron" else _mlp
        parts.append(make(network, layer, behind, at_attn, pos, i, size[index].item()))
    parts.sort(key=lambda part: (part.place, part.pos, part.component.index or 0))
    n_pos = start.shape[1]
    nothing = torch.zeros_like(u[0, 0])
    tokens = [
        FlowPart(
            Component(kind), pos, torch.dot(x[0, pos], u[0, pos]).item(), x[0, pos],
            nothing, torch.zeros(n_pos, dtype=u.dtype, device=u.device), 0.0, -1.0, -1.0,
        )
        for pos in range(n_pos)
        for kind, x in network.embeds.items()
    ]  # fmt: skip
    at_end = torch.zeros(n_pos, dtype=u.dtype, device=u.device)
    at_end[-1] = 1
    constant = sum(value.item() for _, value in reading.constants)
    logit = FlowPart(
        Component("b_U"), None, reading.total.item(), None, reading.direction, at_end, constant,
        float("inf"), float("inf"),
    )  # fmt: skip
    return [*tokens, *parts, logit], all_biases


def _head(
    network: Held, layer: HeldLayer, behind: Tensor, at_attn: Tensor, pos: int, i: int, flow: float
) -> FlowPart:
    ahead = layer.W_O[i] @ at_attn[0, pos]
    weights, reads = layer.before.back_weighted(layer.pattern[0, i, pos], layer.W_V[i] @ ahead)
    return FlowPart(
        Component("head", layer.layer, i), pos, flow, layer.z[0, pos, i] @ layer.W_O[i],
        reads, weights, (layer.b_V[i] @ ahead).item(), layer.layer + 0.25, layer.layer + 0.0,
    )  # fmt: skip


def _at_position(mlp: HeldMLP, reads: Tensor, pos: int, n_pos: int) -> tuple[Tensor, Tensor]:
    """What an MLP reads at its own position: weights, and a direction."""
    weights = torch.zeros(n_pos, dtype=reads.dtype, device=reads.device)
    weights[pos] = 1
    return mlp.before.back_weighted(weights, reads)


def _neuron(
    network: Held, layer: HeldLayer, behind: Tensor, at_attn: Tensor, pos: int, i: int, flow: float
) -> FlowPart:
    mlp = layer.mlp
    assert mlp is not None
    share = mlp.W_out[i] @ behind[0, pos]
    weights, reads = _at_position(
        mlp, share * mlp.gate[0, pos, i] * mlp.W_in[:, i], pos, behind.shape[1]
    )
    return FlowPart(
        Component("neuron", layer.layer, i), pos, flow, mlp.post[0, pos, i] * mlp.W_out[i],
        reads, weights, (share * mlp.b_in[0, pos, i]).item(),
        layer.layer + 0.75, layer.layer + (0.0 if network.parallel else 0.5),
    )  # fmt: skip


def _mlp(
    network: Held, layer: HeldLayer, behind: Tensor, at_attn: Tensor, pos: int, i: int, flow: float
) -> FlowPart:
    mlp = layer.mlp
    assert mlp is not None
    share = mlp.W_out @ behind[0, pos]
    weights, reads = _at_position(mlp, mlp.W_in @ (share * mlp.gate[0, pos]), pos, behind.shape[1])
    return FlowPart(
        Component("mlp_out", layer.layer), pos, flow, mlp.post[0, pos] @ mlp.W_out,
        reads, weights, (share @ mlp.b_in[0, pos]).item(),
        layer.layer + 0.75, layer.layer + (0.0 if network.parallel else 0.5),
    )  # fmt: skip


def bias_flow(network: Held, part: FlowPart) -> float:
    """Its own bias, and the stream's biases that it reads."""
    if part.reads_at == -1:
        return 0.0
    read = part.weights.sum()
    flow = part.own_bias
    for layer in network.layers:
        if layer.layer + 0.25 < part.reads_at:
            flow += (read * (layer.b_O @ part.reads)).item()
        if layer.mlp is not None and layer.layer + 0.75 < part.reads_at:
            flow += (read * (layer.mlp.b_out @ part.reads)).item()
    return flow


def inflow_of(network: Held, part: FlowPart) -> float:
    """All that it reads, from the stream as it was there, and its own bias."""
    if part.reads_at == -1:
        return part.flow
    if part.reads_at == float("inf"):
        stream = network.streams[-1]
    elif part.reads_at == int(part.reads_at):
        stream = network.streams[int(part.reads_at)]
    else:
        stream = network.mids[int(part.reads_at)]
    return (part.weights @ (stream[0] @ part.reads)).item() + part.own_bias
