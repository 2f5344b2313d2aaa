"""The flow from tokens through heads and neurons to a logit, conserved at every node.

Patterns and gates held, each part of the model passes on to the logit exactly what it got: what
flows into a head through the tokens that it looks at, and its bias, is what it adds to the logit on
all ways. The graph shows the nodes through which most flows; what the others carry is stated at
every node, so that nothing is lost without being counted.
"""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.contributions import nearest
from lnfree_interp.analysis.flow_parts import Unit, bias_flow, flow_parts, inflow_of
from lnfree_interp.analysis.gaps import token_gap
from lnfree_interp.analysis.gates import hold
from lnfree_interp.analysis.logit_reading import read_logit
from lnfree_interp.analysis.questions import Answer, Prompt
from lnfree_interp.analysis.reads import held
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import MeasuredError, measure_error

if TYPE_CHECKING:
    import networkx


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


@dataclass(frozen=True, repr=False)
class FlowGraph:
    """Nodes and edges, and what they leave out.

    Attributes:
        nodes: Shown nodes, tokens first, the logit last.
        edges: All edges between them of more than `smallest` logits.
        certificate: At every node that is shown, what it reads, computed from the stream, against
            what it passes on, computed from what it writes.
        of: What flows, e.g. `' self' - ' cls'`.
        tokens: The prompt, as strings.
        total: The logit, or the difference of two.
        frozen_scale: True if live norms or a soft cap were held.
        gap: Then, what the largest tokens' flows miss; see `affine_map`.
    """

    nodes: tuple[FlowNode, ...]
    edges: tuple[FlowEdge, ...]
    certificate: Certificate
    of: str
    tokens: tuple[str, ...]
    total: float
    frozen_scale: bool = False
    gap: MeasuredError | None = None

    def verify(self, tolerance: float | None = None) -> "FlowGraph":
        """Return self if flow is conserved at every node.

        Args:
            tolerance: As in `Contributions.verify`.

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
        names = [node.name for node in self.nodes]
        raise DataError(f"no node {name!r} is shown{nearest(name, names)}")

    @property
    def lost(self) -> float:
        """What reaches the logit through nodes that are not shown, in logits."""
        return self.node("logit").from_rest

    def __repr__(self) -> str:
        return (
            f"FlowGraph({self.of}: {self.total:+.3f}, of which {self.lost:+.3f} through nodes that "
            f"are not shown; {len(self.nodes)} nodes, {len(self.edges)} edges, "
            f"error {self.certificate.error})"
        )

    def to_json(self) -> str:
        """Everything, as JSON."""
        plain: dict[str, Any] = {
            "of": self.of,
            "tokens": list(self.tokens),
            "total": self.total,
            "lost": self.lost,
            "frozen_scale": self.frozen_scale,
            "gap": None if self.gap is None else self.gap.relative,
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
    prepend_bos: bool | None = None,
    frozen_scale: bool = False,
) -> FlowGraph:
    """How a logit flows from the tokens through heads and neurons.

    Patterns and gates are held. A node's flow is what it adds to the logit on all ways; biases are
    not nodes, each node states what it gets from them.

    Args:
        model: LN-free.
        prompt: One prompt.
        answer: As in `attribute_logits`, one.
        against: As in `attribute_logits`, one.
        top_k: Nodes to show, those through which most flows, besides the tokens and the logit.
            None: all, which is for small models and short prompts.
        unit: Whole MLPs as nodes, or neurons.
        smallest: Leave out edges that carry no more, in logits; nodes count them as rest.
        prepend_bos: As in `attribute_logits`.
        frozen_scale: Hold live norms' scales; `.gap` measures what that misses.

    Returns:
        Nodes [node] and edges [edge], each with its flow, in logits.

    Raises:
        InexactError: if a norm is live or the logits are capped, and `frozen_scale` is False.
        DataError: as `attribute_logits`; for more than one prompt or answer, an unknown `unit`, or
            a negative `top_k` or `smallest`.
        UnsupportedModelError: as `attribute_logits`.

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
    if unit not in get_args(Unit) or smallest < 0 or (top_k is not None and top_k < 0):
        raise DataError(f"unit={unit!r}, top_k={top_k}, smallest={smallest}: see flow_graph's help")
    nonlinear = held(model, frozen_scale)
    reading = read_logit(model, prompt, answer, against, prepend_bos)
    network = hold(model, reading.tokens)
    parts, all_biases = flow_parts(network, reading, unit, top_k)
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
    biases = torch.tensor([bias_flow(network, part) for part in parts], dtype=torch.float64)
    inflow = torch.tensor([inflow_of(network, part) for part in parts], dtype=torch.float64)
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
    dtype = reading.total.dtype
    through = ~is_token
    # All that starts somewhere, tokens and biases, ends in the logit.
    started = flow[is_token].sum() + all_biases
    found_in = torch.cat([inflow[through], started[None]])
    found_out = torch.cat([flow[through], flow[-1:]])
    error = measure_error(found_in.to(dtype), found_out.to(dtype), flow.abs().max().item())
    return FlowGraph(
        nodes, found, Certificate("what flows into a node = what flows out of it", error),
        reading.of[0], reading.prompts[0], reading.total.item(), bool(nonlinear),
        token_gap(model, network, reading) if nonlinear else None,
    )  # fmt: skip
