"""Attention scores by pairs of components, and patterns with and without components."""

import html

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from lnfree_interp.analysis.counterfactual import CounterfactualPattern
from lnfree_interp.analysis.results import read_top
from lnfree_interp.analysis.scores import ScoreAttribution
from lnfree_interp.errors import DataError
from lnfree_interp.plots.style import (
    diverging,
    row_ticks,
    rows_height,
    show_held,
    show_token,
    show_tokens,
    styled,
    ticks,
)

_PANEL = 240
"""The width of each of three panels, in pixels."""


def scores(result: ScoreAttribution, key: int | None = None, top: int = 12) -> go.Figure:
    """An attention score by pairs of components at the query and at the key.

    Args:
        result: What `attribute_scores` returned.
        key: Position of the key. Default: the key with the highest score.
        top: How many components to show on either side, those of largest values for this key; the
            others are one row and one column.

    Returns:
        A plotly figure: a heatmap of pairs, query component x key component, in units of the score
            before the softmax.

    Raises:
        DataError: if the position is not among the keys, or top is not positive.

    Examples:
        >>> why = lf.attribute_scores(free, "for i in range", layer=1, head=0)
        >>> lf.plots.scores(why, key=1).layout.xaxis.title.text
        'at the key, 1 for'
    """
    if result.dims != ("key",):
        raise DataError("a figure shows one prompt: take one with result.select(i)")
    read_top(top, 1)
    column = int(result.log_pattern.argmax()) if key is None else result.column(key)
    position = result.keys[column]
    values = result.values[:, :, column].double()
    chosen = []
    for dim in (1, 0):
        size = values.abs().sum(dim)
        chosen.append(sorted(size.topk(min(top, len(size))).indices.tolist()))
    rows, columns = chosen
    grid = values.new_zeros(len(rows) + 1, len(columns) + 1)
    grid[:-1, :-1] = values[rows][:, columns]
    grid[:-1, -1] = values[rows].sum(1) - grid[:-1, :-1].sum(1)
    grid[-1, :-1] = values[:, columns].sum(0) - grid[:-1, :-1].sum(0)
    grid[-1, -1] = values.sum() - grid.sum()
    x = [*(result.key_components[i].label for i in columns), "others"]
    y = [*(result.query_components[i].label for i in rows), "others"]
    figure = go.Figure(
        go.Heatmap(
            **diverging(grid, "score"),
            x=x,
            y=y,
            hovertemplate="query %{y}, key %{x}: %{z:.4f}<extra></extra>",
        )
    )
    at_query, at_key = (show_token(result.prompts[0][i]) for i in (result.query[0], position))
    figure.update_xaxes(title=f"at the key, {position} {at_key}", **ticks(x))
    figure.update_yaxes(
        title=f"at the query, {result.query[0]} {at_query}", autorange="reversed", **row_ticks(y)
    )
    return styled(
        figure,
        f"Why {result.head.label} looks from {at_query} to {at_key}: its score by pairs",
        f"before the softmax; score {result.total[column].item():.3f}, attention "
        f"{result.log_pattern[column].exp().item():.3f}; pairs minus score: {result.error}"
        f"{show_held(result.certificate)}",
        height=rows_height(len(grid), 260),
    )


def pattern(result: CounterfactualPattern, start: int = 0, stop: int | None = None) -> go.Figure:
    """A head's original attention pattern, the pattern without some components, and the difference.

    Args:
        result: What `counterfactual_pattern` returned.
        start: The first position to show.
        stop: The position after the last one shown. Default: 64 positions from `start`, or the
            last 64.

    Returns:
        A plotly figure of three heatmaps, query x key, of attention weights and their change.

    Raises:
        DataError: if there are no such positions.

    Examples:
        >>> without = lf.counterfactual_pattern(free, "for i in range", 1, 0, ["L0H0"])
        >>> len(lf.plots.pattern(without).data)
        3
    """
    n_pos = len(result.tokens)
    if stop is None:
        start, stop = (max(start, n_pos - 64), n_pos) if start == 0 else (start, start + 64)
        stop = min(stop, n_pos)
    if not 0 <= start < stop <= n_pos:
        raise DataError(
            f"the prompt has {n_pos} positions, not {start}:{stop}: give a start and a later stop "
            "among them"
        )
    at = slice(start, stop)
    labels = show_tokens(result.tokens[at], start)
    without = ", ".join(result.without)
    figure = make_subplots(
        cols=3,
        horizontal_spacing=0.06,
        subplot_titles=["as it is", f"without {without}", "what that changes"],
        shared_yaxes=True,
    )
    panels = (result.original, result.pattern, result.pattern - result.original)
    read = torch.stack(panels[:2])[:, at, at].amax((0, 1)).tolist()
    for column, weights in enumerate(panels, start=1):
        seen = weights[at, at].double()
        colours = (
            diverging(seen, "change") | {"colorbar": {"title": "change", "x": 1.02}}
            if column == 3
            else {"z": seen.tolist(), "colorscale": "Blues", "zmin": 0, "zmax": 1}
            | {"showscale": False}
        )  # fmt: skip
        figure.add_heatmap(
            **colours,
            x=labels,
            y=labels,
            hovertemplate="from %{y} to %{x}: %{z:.4f}<extra></extra>",
            row=1,
            col=column,
        )
        figure.update_xaxes(title="key", **ticks(labels, read, _PANEL), row=1, col=column)
    figure.update_yaxes(autorange="reversed", **row_ticks(labels))
    figure.update_yaxes(title="query", row=1, col=1)
    return styled(
        figure,
        f"Attention pattern of {result.head.label} without {without}",
        f"{html.escape(result.certificate.identity)}: {result.error}"
        f"{show_held(result.certificate)}",
        height=rows_height(len(labels), 320),
        above=30,
    )
