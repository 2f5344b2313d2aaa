"""Figures of flow: nodes over positions and layers, and paths as a Sankey diagram."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import plotly.graph_objects as go
import torch

from lnfree_interp.analysis.flow_results import FlowGraph, FlowNode
from lnfree_interp.analysis.results import Contributions
from lnfree_interp.errors import DataError
from lnfree_interp.plots.style import (
    LOWERS,
    RAISES,
    WHOLE,
    show_held,
    show_prompt,
    show_tokens,
    styled,
    ticks,
)

_NAMES = 16
"""How many nodes have their name beside them; the others show it on hover."""
_EDGES = 150
"""How many lines are drawn; the thinnest are left out."""


def flow(result: FlowGraph) -> go.Figure:
    """A flow graph over positions (left to right) and layers (upwards).

    The width of a line is what flows along it; blue raises the logit, red lowers it.

    Args:
        result: What `flow_graph` returned.

    Returns:
        A plotly figure of flows in logits; its subtitle says how many lines beyond 150 are not
            drawn.

    Raises:
        DataError: if a flow is not a finite number.

    Examples:
        >>> graph = lf.flow_graph(free, "for i in", " range")
        >>> lf.plots.flow(graph).layout.yaxis.ticktext
        ('embeddings', 'layer 0', 'layer 1', 'layer 2', 'layer 3', 'logit')
    """
    nodes, tokens = result.nodes, result.prompts[0]
    n_layers = 1 + max((node.layer for node in nodes if node.layer is not None), default=0)
    places = _places(nodes, n_layers, len(tokens))
    edges = sorted(result.edges, key=lambda edge: -abs(edge.flow))[:_EDGES]
    largest = max((abs(edge.flow) for edge in edges), default=1.0)
    if not all(math.isfinite(part.flow) for part in (*edges, *nodes)):
        raise DataError(
            "a flow that is no finite number cannot be drawn: check the model's activations for "
            "nan and infinity"
        )
    figure = go.Figure()
    for edge in reversed(edges):  # draws the widest on top
        (x0, y0), (x1, y1) = places[edge.source], places[edge.target]
        figure.add_scatter(
            x=[x0, (x0 + x1) / 2, x1],
            y=[y0, (y0 + y1) / 2, y1],
            mode="lines",
            line={
                "width": 0.3 + 6 * abs(edge.flow) / largest,
                "color": RAISES if edge.flow > 0 else LOWERS,
            },
            opacity=0.45,
            text=f"{edge.source} to {edge.target}: {edge.flow:+.3f}",
            hoverinfo="text",
            showlegend=False,
        )
    inner = [node for node in nodes if node.layer is not None or node.pos is None]
    named = {node.name for node in sorted(inner, key=lambda node: -abs(node.flow))[:_NAMES]}
    scale = max(abs(node.flow) for node in nodes) or 1.0
    figure.add_scatter(
        x=[places[node.name][0] for node in nodes],
        y=[places[node.name][1] for node in nodes],
        mode="markers+text",
        marker={
            "size": [6 + 16 * (abs(node.flow) / scale) ** 0.5 for node in nodes],
            "color": [_colour(node) for node in nodes],
            "line": {"width": 1, "color": "white"},
        },
        text=[_name(node) if node.name in named else "" for node in nodes],
        textposition="top center",
        cliponaxis=False,
        textfont={"size": 10},
        hovertext=[
            f"{node.name}: {node.flow:+.3f}<br>from biases {node.from_biases:+.3f}, from nodes not "
            f"shown {node.from_rest:+.3f}, to them {node.to_rest:+.3f}"
            for node in nodes
        ],
        hoverinfo="text",
        showlegend=False,
    )
    labels = show_tokens(tokens)
    width = [0.0] * len(labels)
    for node in nodes:
        if node.pos is not None:
            width[node.pos] = max(width[node.pos], abs(node.flow))
    figure.update_xaxes(
        **ticks(labels, width), title="position", range=[-0.9, len(tokens) - 0.1], zeroline=False
    )
    figure.update_yaxes(
        tickvals=[-0.5, *(layer + 0.5 for layer in range(n_layers)), n_layers + 0.4],
        ticktext=["embeddings", *(f"layer {layer}" for layer in range(n_layers)), result.unit],
        zeroline=False, range=[-1, n_layers + 1],
    )  # fmt: skip
    left_out = len(result.ends) - len(edges)
    note = f"; {left_out} thinner lines not drawn" if left_out else ""
    return styled(
        figure,
        f"How {show_prompt(result.of)} flows, after “{show_prompt(tokens)}”",
        f"{result.total.item():+.2f} in all, {result.lost.item():+.2f} through nodes not shown; "
        f"patterns and gates given; conserved to {result.error}{show_held(result.certificate)}"
        f"{note}",
        height=320 + n_layers * max(24, min(110, 1100 // n_layers)),
    )


def _places(
    nodes: tuple[FlowNode, ...], n_layers: int, n_pos: int
) -> dict[str, tuple[float, float]]:
    """Where nodes are drawn: positions across, with the nodes of a layer side by side; layers up,
    with heads below the MLP of their layer."""
    rows: dict[tuple[int, int, str], list[FlowNode]] = defaultdict(list)
    places = {}
    for node in nodes:
        if node.pos is None:
            places[node.name] = (n_pos - 1.0, n_layers + 0.4)
        else:
            layer = -1 if node.layer is None else node.layer
            rows[layer, node.pos, "head" if node.kind == "head" else "other"].append(node)
    for (layer, pos, kind), row in rows.items():
        for i, node in enumerate(row):
            across = pos + (i - (len(row) - 1) / 2) * min(0.4, 0.95 / len(row))
            up = -0.5 if layer < 0 else layer + (0.3 if kind == "head" else 0.75)
            places[node.name] = (across, up + (0.14 * (i % 2) if layer >= 0 else 0))
    return places


def _colour(node: FlowNode) -> str:
    if node.pos is None:
        return WHOLE
    return RAISES if node.flow > 0 else LOWERS


def _name(node: FlowNode) -> str:
    if node.pos is None:
        return node.name
    if node.kind in ("embed", "pos_embed"):
        return ""
    return {"mlp_out": f"MLP {node.layer}"}.get(node.kind, node.name.partition("@")[0])


def _through(names: Mapping[str, int], links: Mapping[tuple[str, str, bool], float]) -> list[float]:
    """What enters or what leaves each node, whichever is more."""
    flows = torch.zeros(2, len(names))
    for (one, other, _), value in links.items():
        flows[0, names[one]] += value
        flows[1, names[other]] += value
    return flows.amax(0).tolist()


def _stacked(columns: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """The heights of nodes, stacked and centred in each column, between 0 and 1."""
    totals: dict[float, float] = defaultdict(float)
    for column, size in zip(columns, sizes, strict=True):
        totals[column] += size
    whole, counts = max(totals.values(), default=1.0) or 1.0, Counter(columns)
    pad = 0.3 / max(counts.values(), default=1)
    at = {c: 0.5 - (0.6 * totals[c] / whole + pad * (counts[c] - 1)) / 2 for c in totals}
    heights = []
    for column, size in zip(columns, sizes, strict=True):
        share = 0.6 * size / whole
        heights.append(min(0.999, max(0.001, at[column] + share / 2)))
        at[column] += share + pad
    return heights


def paths(result: Contributions) -> go.Figure:
    """Paths as a Sankey diagram: sources on the left, the heads that they pass, then the logit.

    Args:
        result: What `expand_paths` returned.

    Returns:
        A plotly figure, a Sankey diagram; the width of a link is the absolute value of its paths,
            in logits.

    Raises:
        DataError: if the result is not of paths, or is of several prompts.

    Examples:
        >>> paths = lf.expand_paths(free, "for i in", " range")
        >>> lf.plots.paths(paths).data[0].type
        'sankey'
    """
    if result.level != "path" or result.dims:
        raise DataError(
            f"only paths of one prompt can be drawn, not a result by {result.level} with "
            f"dimensions {result.dims}: call expand_paths, and select(prompt=i) on a batch"
        )
    names: dict[str, int] = {}
    links: dict[tuple[str, str, bool], float] = defaultdict(float)
    depth: dict[str, float] = {}
    for component, value in result:
        stops = [part.label for part in component.through]
        start = component.label.partition(" > ")[0]
        for i, one in enumerate([start, *stops]):
            name = one if i == 0 else f"{one} "  # a head on a path differs from one as a source
            layer = component.layer if i == 0 else component.through[i - 1].layer
            depth[name] = 0.0 if layer is None else layer + (1.0 if i else 0.5)
        route = [start, *(f"{one} " for one in stops), result.unit]
        for one, other in pairwise(route):
            links[one, other, value.item() > 0] += abs(value.item())
    for name in [*depth, result.unit]:
        names.setdefault(name, len(names))
    deepest = max(depth.values(), default=0.0) + 1.0
    figure = go.Figure(
        go.Sankey(
            arrangement="snap",
            node={
                "label": [name.strip() for name in names],
                "color": WHOLE,
                "pad": 12,
                "thickness": 14,
                "x": [0.001 + 0.99 * depth.get(name, deepest) / deepest for name in names],
                "y": _stacked([depth.get(name, deepest) for name in names], _through(names, links)),
            },
            link={
                "source": [names[one] for one, _, _ in links],
                "target": [names[other] for _, other, _ in links],
                "value": list(links.values()),
                "color": [
                    f"rgba({'33,102,172' if raises else '178,24,43'},0.45)"
                    for _, _, raises in links
                ],
                "customdata": [value if key[2] else -value for key, value in links.items()],
                "hovertemplate": "%{source.label} to %{target.label}: %{customdata:+.3f}"
                "<extra></extra>",
            },
        )
    )
    what = f"Paths to {show_prompt(result.of[:1])}" if result.of else "Paths"
    if result.prompts:
        what += f", after “{show_prompt(result.prompts[0])}”"
    return styled(
        figure,
        what,
        f"widths are absolute values, blue raises, red lowers; {len(result)} paths, "
        f"{result.total.item():+.2f} in all; paths minus whole: {result.error}"
        f"{show_held(result.certificate)}",
        height=520,
    )
