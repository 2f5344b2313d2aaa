"""The flow from tokens through heads and neurons to a target, conserved at every node.

With patterns and gates given, each part of the model passes on to the target exactly what it gets:
what flows into a head from the tokens that it looks at and from its biases is what the head adds to
the target, directly and through later parts. The graph shows the nodes of largest flow; every node
states what it gets from and passes to the others, so that everything is counted.
"""

from dataclasses import dataclass, replace
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.affine import Backward, as_target, carry_back, needed
from lnfree_interp.analysis.asking import analysis
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.components import Component
from lnfree_interp.analysis.flow_results import FlowGraph
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.parts import Constant, Dense, Part
from lnfree_interp.analysis.positions import whole_number
from lnfree_interp.analysis.prompts import Answers
from lnfree_interp.analysis.stream import Place
from lnfree_interp.analysis.sublayers import GivenMLP
from lnfree_interp.analysis.targets import Target
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import measure_error

_ALWAYS_SHOWN = ("embed", "pos_embed")
_READERS = ("head", "attn_out", "mlp_out", "neuron")
"""Kinds of components that pass on what they read; flow starts at components of other kinds."""
Terms = list[tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch d_model"]]]


@dataclass(frozen=True, eq=False)
class _Node:
    """A node with its vectors."""

    component: Component
    pos: int | None
    flow: Float[Tensor, " batch"]
    writes: Float[Tensor, "batch d_model"] | None
    """What it adds to the stream at its position."""
    written: float
    """Where it writes, in the order of computation."""
    reads: Terms
    """Directions that it reads, with a weight for every position. What it adds to the target is the
    sum over them, plus `own_bias`."""
    reads_at: Place | None
    """The place of the stream that it reads; None for a source."""
    own_bias: Float[Tensor, " batch"]


@analysis
def flow_graph(
    trace: Trace,
    answer: Answers | Target,
    foil: Answers | None = None,
    *,
    by: str | Level = "head",
    top_k: int | None = 40,
    smallest: float = 0.0,
) -> FlowGraph:
    """How a logit flows from the tokens through heads and MLPs or neurons.

    Patterns and gates are given. A node's flow is what it adds to the logit, directly and through
    later nodes. Biases are not nodes; each node states what it gets from them.

    Args:
        trace: A trace; or a model and a prompt, as two arguments.
        answer: The next token, as in `attribute_logits`, one for each prompt; or any target.
        foil: The token whose logit is subtracted.
        by: What the nodes are: `"sublayer"`, `"head"` (with whole MLPs), `"neuron"`, `"source"`;
            or a level of your own, whose parts are where flow starts, unless they are heads, MLPs
            or neurons.
        top_k: How many nodes to show, those of largest flow, besides the tokens and the target.
            None: all, which is for small models and short prompts.
        smallest: Edges that carry no more than this, in the target's unit, are left out; nodes
            count them as rest.

    Returns:
        Nodes [node] and edges [edge], each with its flow, in logits; for several prompts with a
        last dimension [prompt].

    Raises:
        InexactError: if a norm on the way is live or the logits are capped, and the trace does not
            hold.
        DataError: as for `attribute_logits`; for more than one answer, a level without such nodes,
            or a negative `top_k` or `smallest`.
        UnsupportedModelError: for a model whose stream is not the plain sum of its parts.

    Source:
        Graphs of information flow: arXiv 2403.00824, where an edge is the proximity of a part to
        the whole. Ours: an edge is an exact share of the logit, and flow is conserved.

    Examples:
        >>> graph = lf.flow_graph(free, "for i in", " range", top_k=10).verify()
        >>> len(graph.nodes)
        19
        >>> graph.nodes[0].name, graph.nodes[-1].name
        ('embed@0', 'logit')
    """
    chosen = level(by)
    if chosen.name == "layer":
        raise DataError(
            "by='layer': a whole layer reads what it wrote itself, so it is no node: give "
            "by='sublayer'"
        )
    if smallest < 0 or (top_k is not None and whole_number(top_k, "top_k") < 0):
        raise DataError(
            f"top_k={top_k} and smallest={smallest}: neither can be negative, so give 0 or more"
        )
    target = as_target(answer, foil)
    place = needed(trace, target, chosen)
    way = carry_back(trace, target, _sources_alone(trace, chosen, place))
    nodes, biases, started = _nodes(way, chosen, top_k)
    return _graph(way, nodes, biases, started, smallest)


def _sources_alone(trace: Trace, by: Level, place: Place) -> list[str]:
    """Sublayers whose output the level has as sources of its own, or not at all: what flows out of
    them starts there."""
    kinds = {(part.components[0].kind, part.components[0].layer) for part in by.parts(trace, place)}
    passing = {"attn_out": ("head", "attn_out"), "mlp_out": ("neuron", "mlp_out")}
    return [
        f"{layer}_{sublayer}"
        for layer in range(trace.view.n_layers)
        for sublayer, ways in passing.items()
        if not any((kind, layer) in kinds for kind in ways)
    ]


def _nodes(
    way: Backward, by: Level, top_k: int | None
) -> tuple[list[_Node], list[tuple[float, Tensor]], Float[Tensor, " batch"]]:
    """The nodes: tokens, the nodes of largest flow in the order of computation, and the target; the
    stream's biases; and all flow that starts, at tokens, other sources or biases."""
    trace, reading = way.trace, way.reading
    biases: list[tuple[float, Tensor]] = []
    groups: list[tuple[Part, Float[Tensor, "batch pos part"]]] = []
    started = torch.zeros_like(reading.total[:, 0])
    for _, value in way.constants():
        started = started + value[:, 0]
    for part in by.parts(trace, reading.place):
        u, written = way.at(part.written), part.written.order
        apart, part = _biases_apart(trace, part)
        for bias in apart:
            biases.append((written, bias))
            started = started + (u @ bias).sum(1)
        if part is None:
            continue
        flow = u.new_empty(*u.shape[:2], len(part.components))
        part.onto(u, flow)
        groups.append((part, flow))
        kind = part.components[0].kind
        if kind in _READERS:
            started = started + _own_biases(way, part, flow).sum((1, 2))
        else:
            started = started + flow.sum((1, 2))
    always = [kind in _ALWAYS_SHOWN for kind in (part.components[0].kind for part, _ in groups)]
    sizes = [
        torch.full_like(flow[0].flatten(), -1) if shown else flow.abs().mean(0).flatten()
        for (_, flow), shown in zip(groups, always, strict=True)
    ]
    n_free = sum(
        flow[0].numel() for (_, flow), shown in zip(groups, always, strict=True) if not shown
    )
    count = n_free if top_k is None else min(top_k, n_free)
    chosen = torch.cat(sizes).topk(count).indices if count else torch.empty(0, dtype=torch.long)
    starts = torch.tensor([0, *(len(size) for size in sizes)]).cumsum(0)
    picked: list[tuple[int, int, int]] = []
    for number, shown in enumerate(always):
        if shown:
            n_pos, n = groups[number][1].shape[1:]
            picked += [(number, pos, i) for pos in range(n_pos) for i in range(n)]
    for index in chosen.tolist():
        number = int(torch.searchsorted(starts, index, right=True)) - 1
        pos, i = divmod(index - int(starts[number]), groups[number][1].shape[2])
        picked.append((number, pos, i))
    made = [_node(way, *groups[number], pos, i) for number, pos, i in picked]
    tokens = [node for node in made if node.component.kind in _ALWAYS_SHOWN]
    others = [node for node in made if node.component.kind not in _ALWAYS_SHOWN]
    tokens.sort(key=lambda node: node.pos or 0)
    others.sort(key=lambda node: (node.written, node.pos or 0, node.component.index or 0))
    return [*tokens, *others, _target(way)], biases, started


def _biases_apart(trace: Trace, part: Part) -> tuple[list[Tensor], Part | None]:
    """The biases in a group of parts, and the group without its biases."""
    component = part.components[0]
    if isinstance(part, Constant):
        return list(part.biases), None
    layer = component.layer
    if not isinstance(part, Dense) or layer is None:
        return [], part
    if component.kind == "mlp_out":
        bias = trace.view.mlp(layer).b_out
    elif component.kind == "attn_out":
        bias = trace.view.attention(layer).b_O
    else:
        return [], part
    return [bias], replace(part, x=part.x - bias)


def _own_biases(way: Backward, part: Part, like: Tensor) -> Float[Tensor, "batch pos part"]:
    """What each part of a group gets from its own biases."""
    component, u = part.components[0], way.at(part.written)
    layer = component.layer
    assert layer is not None
    block = way.trace.block(layer)
    if component.kind == "head" and component.pos is not None:
        return torch.zeros_like(like)  # by source, b_V is a part of its own
    if component.kind in ("head", "attn_out"):
        by_head = (block.attention.onto_z(u) * block.b_V).sum(-1)
        return by_head if component.kind == "head" else by_head.sum(-1, keepdim=True)
    assert block.mlp is not None
    by_neuron = block.mlp.onto_post(u) * block.mlp.b_in
    return by_neuron if component.kind == "neuron" else by_neuron.sum(-1, keepdim=True)


def _node(way: Backward, part: Part, flow: Tensor, pos: int, i: int) -> _Node:
    """The node of one part at one position, with what it writes and reads."""
    component = part.components[i]
    writes = part.vectors([i])[:, pos, 0]
    nothing = torch.zeros_like(flow[:, 0, 0])
    if component.kind not in _READERS:
        return _Node(component, pos, flow[:, pos, i], writes, part.written.order, [], None, nothing)
    reads, reads_at = _reads(way, component, part.written, pos)
    own = _own_biases(way, part, flow)[:, pos, i]
    return _Node(component, pos, flow[:, pos, i], writes, part.written.order, reads, reads_at, own)


def _reads(way: Backward, component: Component, written: Place, pos: int) -> tuple[Terms, Place]:
    """The directions along which a head, an attention, an MLP or a neuron reads for the target."""
    trace, layer = way.trace, component.layer
    assert layer is not None
    block, u = trace.block(layer), way.at(written)[:, pos]
    if component.kind in ("head", "attn_out"):
        ahead, terms = block.attention.onto_z(u), []
        n_heads = ahead.shape[1]
        heads = range(n_heads) if component.index is None else [component.index]
        for head in heads:
            weights = block.pattern[:, head, pos]
            if component.pos is not None:
                only = torch.arange(trace.n_pos, device=weights.device) == component.pos
                weights = weights * only
            W = block.attention.W_V[head]
            terms.append(block.before.back_weighted(weights, ahead[:, head] @ W.T))
        return terms, Place(layer)
    mlp = block.mlp
    assert mlp is not None
    weights = torch.zeros_like(way.u[..., 0])
    weights[:, pos] = 1
    share = _through_gates(mlp, u, pos, component.index)
    return [mlp.before.back_weighted(weights, share)], trace.view.mlp_place(layer)


def _through_gates(mlp: GivenMLP, u: Tensor, pos: int, index: SupportsIndex | None) -> Tensor:
    """A direction at one position behind an MLP, or behind one neuron, carried back before it."""
    if index is None:
        share = (u @ mlp.weights.W_out.T) * mlp.gate[:, pos]
        return share @ mlp.weights.W_in.T
    share = (u @ mlp.weights.W_out[index]) * mlp.gate[:, pos, index]
    return share[:, None] * mlp.weights.W_in[:, index]


def _target(way: Backward) -> _Node:
    """The node of the target, into which everything flows."""
    reading, trace = way.reading, way.trace
    numbers = reading.at.numbers(trace.n_pos, trace.batch).to(reading.direction.device)
    terms: Terms = [
        (torch.nn.functional.one_hot(at, trace.n_pos).to(way.u), reading.direction[:, column])
        for column, at in enumerate(numbers.T)
    ]
    own = sum((value[:, 0] for _, value in way.constants()), torch.zeros_like(reading.total[:, 0]))
    return _Node(
        Component("b_U"), None, reading.total[:, 0], None, float("inf"), terms, reading.place, own
    )


def _graph(
    way: Backward,
    nodes: list[_Node],
    biases: list[tuple[float, Tensor]],
    started: Float[Tensor, " batch"],
    smallest: float,
) -> FlowGraph:
    reading, trace, n = way.reading, way.trace, len(nodes)
    dtype = reading.total.dtype
    flow = torch.stack([node.flow for node in nodes]).double()
    edges = torch.zeros(n, n, trace.batch, dtype=torch.float64, device=flow.device)
    writers = [i for i, node in enumerate(nodes) if node.writes is not None]
    written = torch.tensor([nodes[i].written for i in writers], device=flow.device)
    vectors = torch.stack([w for node in nodes if (w := node.writes) is not None])
    at = torch.tensor([node.pos or 0 for node in nodes if node.writes is not None])
    into = torch.zeros_like(flow)
    from_biases = torch.zeros_like(flow)
    for j, node in enumerate(nodes):
        if node.reads_at is None:
            continue
        seen = node.reads_at.order
        stream = trace.stream(node.reads_at)
        from_biases[j], into[j] = node.own_bias, node.own_bias
        for weights, direction in node.reads:
            carried = torch.einsum("nbd,bd->nb", vectors, direction) * weights[:, at].T
            before = written <= seen
            edges[writers, j] += torch.where(before[:, None], carried, 0.0).double()
            for place, bias in biases:
                if place <= seen:
                    from_biases[j] += weights.sum(1) * (direction @ bias)
            into[j] += (weights * torch.einsum("bpd,bd->bp", stream, direction)).sum(1)
    shown = (edges.abs() > smallest).any(-1)
    edges = torch.where(shown[..., None], edges, 0.0)
    is_source = torch.tensor([node.reads_at is None for node in nodes], device=flow.device)
    from_rest = torch.where(is_source[:, None], 0.0, into - edges.sum(0) - from_biases)
    to_rest = flow - edges.sum(1)
    to_rest[-1] = 0
    # All flow that starts ends in the target.
    found_in = torch.cat([into[~is_source], started[None].double()]).to(dtype)
    found_out = torch.cat([flow[~is_source], flow[-1:]]).to(dtype)
    error = measure_error(found_in, found_out, max(flow.abs().max().item(), reading.scale))
    certificate = Certificate(
        "what flows into a node = what flows out of it", error, way.held, way.gap
    )
    ends = shown.nonzero()
    graph = FlowGraph(
        tuple(node.component for node in nodes), tuple(node.pos for node in nodes), flow,
        torch.where(is_source[:, None], 0.0, from_biases), from_rest, to_rest, ends,
        edges[ends[:, 0], ends[:, 1]], certificate, reading.of, trace.prompts,
        reading.total[:, 0], reading.unit, ("prompt",),
    )  # fmt: skip
    return graph.select(prompt=0) if trace.single else graph
