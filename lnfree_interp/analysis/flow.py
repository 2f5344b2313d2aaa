"""The flow from tokens through heads and neurons to a logit, conserved at every node.

Patterns and gates held, each part of the model passes on to the logit exactly what it got: what
flows into a head through the tokens that it looks at, and its bias, is what it adds to the logit on
all ways. The graph shows the nodes through which most flows; what the others carry is stated at
every node, so that nothing is lost without being counted.
"""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.affine import layer_biases, spread
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.contributions import Component
from lnfree_interp.analysis.gates import Held, HeldLayer, hold
from lnfree_interp.analysis.logit_reading import LogitReading, read_logit
from lnfree_interp.analysis.questions import Answer, Prompt
from lnfree_interp.analysis.reads import held
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import measure_error

if TYPE_CHECKING:
    import networkx

Unit = Literal["neuron", "mlp"]


@dataclass(frozen=True)
class FlowNode:
    """A part of the model at a position."""

    name: str
    """`L2H5@7` is head 5 of layer 2 at position 7; `embed@3`; `logit`."""
    kind: str
    layer: int | None
    pos: int | None
    flow: float
    """What passes through it on its way to the logit, in logits."""
    from_biases: float
    """The share of it that comes from biases, its own and the stream's."""
    from_rest: float
    """The share that comes from nodes that are not shown."""
    to_rest: float
    """The share that goes on through nodes that are not shown."""


@dataclass(frozen=True)
class FlowEdge:
    """What one node gets from another, in logits."""

    source: str
    target: str
    flow: float


@dataclass(frozen=True)
class FlowGraph:
    """Nodes and edges, and what they leave out.

    Attributes:
        nodes: Shown nodes, tokens first, the logit last.
        edges: All edges between them of at least `smallest` logits.
        certificate: At every node that is shown, what it reads, computed from the stream, against
            what it passes on, computed from what it writes.
        of: What flows, e.g. `' self' - ' cls'`.
        tokens: The prompt, as strings.
        total: The logit.
        frozen_scale: True if live norms were held.
    """

    nodes: tuple[FlowNode, ...]
    edges: tuple[FlowEdge, ...]
    certificate: Certificate
    of: str
    tokens: tuple[str, ...]
    total: float
    frozen_scale: bool = False

    def verify(self, tolerance: float | None = None) -> "FlowGraph":
        """Return self if flow is conserved at every node.

        Raises:
            InexactError: if it is not.
        """
        self.certificate.require(tolerance)
        return self

    def node(self, name: str) -> FlowNode:
        """A node by name.

        Raises:
            DataError: if it is not shown.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise DataError(f"no node {name!r} is shown")

    @property
    def lost(self) -> float:
        """What reaches the logit through nodes that are not shown, in logits."""
        return self.node("logit").from_rest

    def to_json(self) -> str:
        """Everything, as JSON."""
        plain: dict[str, Any] = {
            "of": self.of,
            "tokens": list(self.tokens),
            "total": self.total,
            "lost": self.lost,
            "frozen_scale": self.frozen_scale,
            "conservation": asdict(self.certificate.error) | {
                "dtype": str(self.certificate.error.dtype).removeprefix("torch."),
                "holds": self.certificate.holds,
            },
            "nodes": [asdict(node) for node in self.nodes],
            "edges": [asdict(edge) for edge in self.edges],
        }  # fmt: skip
        return json.dumps(plain, indent=1)

    def to_networkx(self) -> "networkx.DiGraph":
        """As a networkx graph, every field an attribute; an edge's `flow` is its weight."""
        import networkx

        graph = networkx.DiGraph(of=self.of, total=self.total, lost=self.lost)
        for node in self.nodes:
            graph.add_node(node.name, **{k: v for k, v in asdict(node).items() if k != "name"})
        for edge in self.edges:
            graph.add_edge(edge.source, edge.target, flow=edge.flow, weight=edge.flow)
        return graph


@dataclass(frozen=True, eq=False)
class _Part:
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
        if self.component.kind == "b_U":
            return "logit"
        return f"{self.component.label}@{self.pos}"


@torch.no_grad()
def flow_graph(
    model: HookedTransformer,
    prompt: Prompt,
    answer: Answer,
    against: Answer | None = None,
    *,
    top_k: int | None = 40,
    unit: Unit = "mlp",
    smallest: float = 0.0,
    prepend_bos: bool = True,
    frozen_scale: bool = False,
) -> FlowGraph:
    """How a logit flows from the tokens through heads and neurons.

    Args:
        model: LN-free.
        prompt: One prompt.
        answer: As in `attribute_logits`, one.
        against: As in `attribute_logits`, one.
        top_k: Nodes to show, those through which most flows, besides the tokens and the logit.
            None: all, which is for small models and short prompts.
        unit: Whole MLPs as nodes, or neurons.
        smallest: Leave out edges that carry less, in logits; nodes count them as rest.
        prepend_bos: As in `attribute_logits`.
        frozen_scale: Hold live norms' scales.

    Raises:
        InexactError: if a norm is live and `frozen_scale` is False.
        DataError, UnsupportedModelError: as `attribute_logits`.
    """
    if unit not in get_args(Unit) or smallest < 0 or (top_k is not None and top_k < 0):
        raise DataError(f"unit={unit!r}, top_k={top_k}, smallest={smallest}: see flow_graph's help")
    nonlinear = held(model, frozen_scale)
    reading = read_logit(model, prompt, answer, against, prepend_bos)
    network = hold(model, reading.tokens)
    parts, all_biases = _parts(network, reading, unit, top_k)
    reads_of = torch.stack([part.reads for part in parts])
    weights = torch.stack([part.weights for part in parts])
    reads_at = torch.tensor([part.reads_at for part in parts], dtype=torch.float64)
    n = len(parts)
    flow = torch.tensor([part.flow for part in parts], dtype=torch.float64)
    edges = torch.zeros(n, n, dtype=torch.float64)
    for i, part in enumerate(parts):
        if part.writes is None or part.pos is None:
            continue
        carried = (reads_of @ part.writes) * weights[:, part.pos]
        edges[i] = torch.where(reads_at > part.place, carried.double().cpu(), 0)
    shown = edges.abs() > smallest if smallest > 0 else edges != 0
    edges = torch.where(shown, edges, 0)
    biases = torch.tensor([_bias_flow(network, part) for part in parts], dtype=torch.float64)
    inflow = torch.tensor([_inflow(network, part) for part in parts], dtype=torch.float64)
    is_token = reads_at == -1
    rest_in = torch.where(is_token, 0.0, inflow - edges.sum(0) - biases)
    nodes = tuple(
        FlowNode(
            part.name, "logit" if part.name == "logit" else part.component.kind,
            part.component.layer, part.pos, flow[i].item(),
            0.0 if is_token[i] else biases[i].item(), rest_in[i].item(),
            0.0 if part.name == "logit" else (flow[i] - edges[i].sum()).item(),
        )
        for i, part in enumerate(parts)
    )  # fmt: skip
    found = tuple(
        FlowEdge(parts[i].name, parts[j].name, edges[i, j].item())
        for i, j in shown.nonzero().tolist()
    )
    dtype = model.cfg.dtype
    through = ~is_token
    # All that starts somewhere, tokens and biases, ends in the logit.
    started = flow[is_token].sum() + all_biases
    found_in = torch.cat([inflow[through], started[None]])
    found_out = torch.cat([flow[through], flow[-1:]])
    error = measure_error(found_in.to(dtype), found_out.to(dtype), flow.abs().max().item())
    return FlowGraph(
        nodes, found, Certificate("what flows into a node = what flows out of it", error),
        reading.of[0], reading.prompts[0], reading.total.item(), bool(nonlinear),
    )  # fmt: skip


def _parts(
    network: Held, reading: LogitReading, unit: Unit, top_k: int | None
) -> tuple[list[_Part], float]:
    """Tokens, the parts of largest flow in the order of computation, and the logit; and what all
    biases together add to it."""
    start = spread(network, reading)
    u = start
    directions, all_biases = [], sum(value.item() for _, value in reading.constants)
    for layer, behind, at_attn, before in network.back(start):
        directions.append((layer, behind, at_attn))
        all_biases += sum(v.item() for _, v in layer_biases(layer, behind, at_attn))
        u = before
    sizes, keys = [], []
    for layer, behind, at_attn in directions:
        heads = torch.linalg.vecdot(layer.z, layer.onto_z(at_attn))[0]
        sizes.append(heads.flatten())
        keys += [
            (layer.layer, "head", pos, i)
            for pos in range(len(heads))
            for i in range(heads.shape[1])
        ]
        if layer.post is not None:
            flows = (layer.post * layer.onto_post(behind))[0]
            if unit == "mlp":
                sizes.append(flows.sum(1))
                keys += [(layer.layer, "mlp_out", pos, 0) for pos in range(len(flows))]
            else:
                sizes.append(flows.flatten())
                width = flows.shape[1]
                keys += [
                    (layer.layer, "neuron", pos, i)
                    for pos in range(len(flows))
                    for i in range(width)
                ]
    size = torch.cat(sizes)
    chosen = (
        range(len(size))
        if top_k is None
        else size.abs().topk(min(top_k, len(size))).indices.tolist()
    )
    by_layer = {layer.layer: (layer, behind, at_attn) for layer, behind, at_attn in directions}
    parts = []
    for index in chosen:
        number, kind, pos, i = keys[index]
        layer, behind, at_attn = by_layer[number]
        make = _head if kind == "head" else _neuron if kind == "neuron" else _mlp
        parts.append(make(network, layer, behind, at_attn, pos, i, size[index].item()))
    parts.sort(key=lambda part: (part.place, part.pos, part.component.index or 0))
    n_pos = start.shape[1]
    nothing = torch.zeros_like(u[0, 0])
    tokens = [
        _Part(
            Component(kind), pos, torch.dot(x[0, pos], u[0, pos]).item(), x[0, pos],
            nothing, torch.zeros(n_pos, dtype=u.dtype, device=u.device), 0.0, -1.0, -1.0,
        )
        for pos in range(n_pos)
        for kind, x in network.embeds.items()
    ]  # fmt: skip
    at_end = torch.zeros(n_pos, dtype=u.dtype, device=u.device)
    at_end[-1] = 1
    constant = sum(value.item() for _, value in reading.constants)
    logit = _Part(
        Component("b_U"), None, reading.total.item(), None, reading.direction, at_end, constant,
        float("inf"), float("inf"),
    )  # fmt: skip
    return [*tokens, *parts, logit], all_biases


def _head(
    network: Held, layer: HeldLayer, behind: Tensor, at_attn: Tensor, pos: int, i: int, flow: float
) -> _Part:
    ahead = layer.W_O[i] @ at_attn[0, pos]
    norm = layer.before_attn
    weights, reads = layer.pattern[0, i, pos], norm.back_unscaled(layer.W_V[i] @ ahead)
    if isinstance(norm.scale, float):
        reads = reads / norm.scale
    else:
        weights = weights / norm.scale[0, :, 0]
    return _Part(
        Component("head", layer.layer, i), pos, flow, layer.z[0, pos, i] @ layer.W_O[i],
        reads, weights, (layer.b_V[i] @ ahead).item(), layer.layer + 0.25, layer.layer + 0.0,
    )  # fmt: skip


def _at_position(layer: HeldLayer, reads: Tensor, pos: int, n_pos: int) -> tuple[Tensor, Tensor]:
    """What an MLP reads at its own position."""
    norm = layer.before_mlp
    assert norm is not None
    weights = torch.zeros(n_pos, dtype=reads.dtype, device=reads.device)
    weights[pos] = 1
    reads = norm.back_unscaled(reads)
    if isinstance(norm.scale, float):
        return reads / norm.scale, weights
    return reads, weights / norm.scale[0, :, 0]


def _neuron(
    network: Held, layer: HeldLayer, behind: Tensor, at_attn: Tensor, pos: int, i: int, flow: float
) -> _Part:
    assert layer.post is not None
    share = layer.W_out[i] @ behind[0, pos]
    reads, weights = _at_position(
        layer, share * layer.gate[0, pos, i] * layer.W_in[:, i], pos, behind.shape[1]
    )
    return _Part(
        Component("neuron", layer.layer, i), pos, flow, layer.post[0, pos, i] * layer.W_out[i],
        reads, weights, (share * layer.b_in[0, pos, i]).item(),
        layer.layer + 0.75, layer.layer + (0.0 if network.parallel else 0.5),
    )  # fmt: skip


def _mlp(
    network: Held, layer: HeldLayer, behind: Tensor, at_attn: Tensor, pos: int, i: int, flow: float
) -> _Part:
    assert layer.post is not None
    share = layer.W_out @ behind[0, pos]
    reads, weights = _at_position(
        layer, layer.W_in @ (share * layer.gate[0, pos]), pos, behind.shape[1]
    )
    return _Part(
        Component("mlp_out", layer.layer), pos, flow, layer.post[0, pos] @ layer.W_out,
        reads, weights, (share @ layer.b_in[0, pos]).item(),
        layer.layer + 0.75, layer.layer + (0.0 if network.parallel else 0.5),
    )  # fmt: skip


def _bias_flow(network: Held, part: _Part) -> float:
    """Its own bias, and the stream's biases that it reads."""
    if part.reads_at == -1:
        return 0.0
    read = part.weights.sum()
    flow = part.own_bias
    for layer in network.layers:
        if layer.layer + 0.25 < part.reads_at:
            flow += (read * (layer.b_O @ part.reads)).item()
        if layer.b_out is not None and layer.layer + 0.75 < part.reads_at:
            flow += (read * (layer.b_out @ part.reads)).item()
    return flow


def _inflow(network: Held, part: _Part) -> float:
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
