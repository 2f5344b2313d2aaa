"""A flow graph, as it is read, selected from, saved and drawn."""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, SupportsIndex

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.components import Component, nearest
from lnfree_interp.analysis.positions import read_number
from lnfree_interp.analysis.results import CertifiedResult, read_top
from lnfree_interp.errors import DataError

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
    """What passes through the node to the target, in the target's unit."""
    from_biases: float
    """The share of the flow that comes from biases, the node's own and the stream's."""
    from_rest: float
    """The share of the flow that comes from nodes that are not shown."""
    to_rest: float
    """The share of the flow that goes on through nodes that are not shown."""


@dataclass(frozen=True)
class FlowEdge:
    """What one node passes to another, in the target's unit."""

    source: str
    target: str
    flow: float


@dataclass(frozen=True, eq=False, repr=False)
class FlowGraph(CertifiedResult):
    """Nodes and edges, and what they leave out.

    Attributes:
        components: The component of each node, tokens first, the target last.
        positions: The position of each node; None for the target.
        flow: [node, *batch], what passes through the node to the target.
        from_biases: [node, *batch], the share that comes from biases, the node's own and the
            stream's.
        from_rest: [node, *batch], the share that comes from nodes that are not shown.
        to_rest: [node, *batch], the share that goes on through nodes that are not shown.
        ends: [edge, 2], the numbers of the nodes that the edge leaves and enters.
        edge_flow: [edge, *batch], what each edge carries.
        certificate: For every node that is shown, what it reads, computed from the stream, against
            what it passes on, computed from what it writes.
        of: What flows, for each prompt, e.g. `' self' - ' cls'`.
        prompts: The tokens of each prompt, as strings.
        total: [*batch], the target.
        unit: The unit of all flows.
        dims: `()` for one prompt, `("prompt",)` for a batch.
    """

    components: tuple[Component, ...]
    positions: tuple[int | None, ...]
    flow: Float[Tensor, "node *batch"]
    from_biases: Float[Tensor, "node *batch"]
    from_rest: Float[Tensor, "node *batch"]
    to_rest: Float[Tensor, "node *batch"]
    ends: Int[Tensor, "edge two"]
    edge_flow: Float[Tensor, "edge *batch"]
    certificate: Certificate
    of: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    total: Float[Tensor, "*batch"]
    unit: str = "logit"
    dims: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names."""
        last = len(self.components) - 1
        return tuple(
            self.unit if i == last else f"{c.label}@{pos}"
            for i, (c, pos) in enumerate(zip(self.components, self.positions, strict=True))
        )

    def _one(self) -> None:
        if self.dims:
            raise DataError(
                "this graph is of several prompts: take one with select(prompt=i) to list its "
                "nodes and edges"
            )

    @property
    def nodes(self) -> tuple[FlowNode, ...]:
        """The nodes of one prompt's graph, tokens first, the target last."""
        self._one()
        columns = (self.flow, self.from_biases, self.from_rest, self.to_rest)
        last = len(self.components) - 1
        numbers = zip(*(x.tolist() for x in columns), strict=True)
        return tuple(
            FlowNode(name, self.unit if i == last else c.kind, c.layer, pos, *row)
            for i, (name, c, pos, row) in enumerate(
                zip(self.names, self.components, self.positions, numbers, strict=True)
            )
        )

    @property
    def edges(self) -> tuple[FlowEdge, ...]:
        """The edges of one prompt's graph."""
        self._one()
        names = self.names
        pairs = zip(self.ends.tolist(), self.edge_flow.tolist(), strict=True)
        return tuple(FlowEdge(names[i], names[j], flow) for (i, j), flow in pairs)

    def node(self, name: str) -> FlowNode:
        """A node by name.

        Raises:
            DataError: if no node of that name is shown.
        """
        if name not in self.names:
            raise DataError(f"no node {name!r} is shown{nearest(name, self.names)}")
        return self.nodes[self.names.index(name)]

    @property
    def lost(self) -> Float[Tensor, "*batch"]:
        """[*batch], what reaches the target through nodes that are not shown."""
        return self.from_rest[-1]

    def select(self, index: SupportsIndex | None = None, /, **named: SupportsIndex) -> "FlowGraph":
        """The graph of one prompt of a batch.

        Raises:
            DataError: if there is no such prompt, or the graph is of one prompt already.
        """
        if not self.dims or set(named) - {"prompt"}:
            raise DataError(
                "select(prompt=i) takes one prompt of a batch; the dimensions of this graph: "
                f"{self.dims or 'none'}"
            )
        row = read_number(named["prompt"] if index is None else index, len(self.total), "prompt")
        columns = ("flow", "from_biases", "from_rest", "to_rest", "edge_flow")
        chosen = {name: getattr(self, name)[:, row] for name in columns}
        one = slice(row, row + 1)
        return replace(
            self, **chosen, total=self.total[row], of=self.of[one], prompts=self.prompts[one],
            dims=(),
        )  # fmt: skip

    def to_frame(self) -> pd.DataFrame:
        """One row per node of one prompt's graph, every field a column; `held` where something
        was held."""
        return self._noted(pd.DataFrame([asdict(node) for node in self.nodes]))

    def top(self, k: SupportsIndex = 10) -> pd.DataFrame:
        """The k edges that carry most: `source`, `target`, `flow`; `held` where something was held.

        Raises:
            DataError: for a batch, or if k is less than one.
        """
        edges = sorted(self.edges, key=lambda edge: -abs(edge.flow))
        rows = [asdict(edge) for edge in edges[: read_top(k, len(edges))]]
        columns = [field.name for field in fields(FlowEdge)]
        return self._noted(pd.DataFrame(rows, columns=columns))

    def __repr__(self) -> str:
        what = f"{len(self.components)} nodes, {len(self.ends)} edges"
        if not self.dims:
            total, lost = self.total.item(), self.lost.item()
            what = f"{self.of[0]}: {total:+.3f}, {lost:+.3f} through nodes not shown; {what}"
        return self._line(what)

    def to_json(self) -> str:
        """Everything about one prompt's graph, as JSON.

        Raises:
            DataError: for a batch.
        """
        self._one()
        plain: dict[str, Any] = {
            "of": self.of[0],
            "unit": self.unit,
            "tokens": list(self.prompts[0]),
            "total": self.total.item(),
            "lost": self.lost.item(),
            "held": list(self.held),
            "gap": None if self.gap is None else self.gap.relative,
            "conservation": asdict(self.error) | {
                "dtype": str(self.error.dtype).removeprefix("torch."),
                "holds": self.certificate.holds,
            },
            "nodes": [asdict(node) for node in self.nodes],
            "edges": [asdict(edge) for edge in self.edges],
        }  # fmt: skip
        return json.dumps(plain, indent=1)

    def to_networkx(self) -> "networkx.DiGraph":
        """One prompt's graph for networkx, every field an attribute; an edge's `flow` is its
        weight.

        Raises:
            DataError: for a batch.
        """
        import networkx

        self._one()

        graph = networkx.DiGraph(of=self.of[0], total=self.total.item(), lost=self.lost.item())
        for node in self.nodes:
            graph.add_node(node.name, **{k: v for k, v in asdict(node).items() if k != "name"})
        for edge in self.edges:
            graph.add_edge(edge.source, edge.target, flow=edge.flow, weight=edge.flow)
        return graph
