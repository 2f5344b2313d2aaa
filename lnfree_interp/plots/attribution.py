"""Figures of attribution: what each part adds to a logit."""

import html

import plotly.graph_objects as go
import torch

from lnfree_interp.analysis.affine import AffineMap
from lnfree_interp.analysis.averages import MeanContributions
from lnfree_interp.analysis.results import Contributions, read_top
from lnfree_interp.errors import DataError
from lnfree_interp.plots.style import (
    LOWERS,
    RAISES,
    WHOLE,
    diverging,
    rows_height,
    show_held,
    show_prompt,
    show_tokens,
    styled,
)

_HEADS = 20
"""How many heads a figure by source token shows."""


def attribution(result: Contributions | MeanContributions | AffineMap, top: int = 15) -> go.Figure:
    """The figure that suits the result's level.

    By layer or sublayer: a waterfall in the order of computation, from zero to the logit. By head:
    a heatmap layer x head. By source: a heatmap of the largest heads x the tokens that they read.
    By neuron or path: a waterfall of the largest, with all others as one bar. By token
    (`affine_map`): a bar per token, and one for biases.

    Args:
        result: A result for one prompt (take one of a batch with `result.select(i)`), a mean over
            many tokens, or an `AffineMap`.
        top: How many neurons or paths to show.

    Returns:
        A plotly figure of values in logits, or in the unit of what was taken apart.

    Raises:
        DataError: if the result is of a batch or of vectors, or `top` is less than one.

    Examples:
        >>> dla = lf.attribute_logits(free, "for i in", " range", by="head")
        >>> lf.plots.attribution(dla).data[0].type
        'heatmap'
        >>> lf.plots.attribution(lf.affine_map(free, "for i in", " range")).data[0].type
        'bar'
    """
    if isinstance(result, AffineMap):
        return _tokens(result)
    if isinstance(result, MeanContributions):
        result = result.as_contributions()
    if result.dims:
        raise DataError(
            "a figure shows one number per part: take one prompt with result.select(i), average "
            "with result.mean(), or project a residual stream with decompose_residual(..., "
            "onto=direction)"
        )
    read_top(top, len(result))
    if result.level == "source":
        return _sources(result)
    if result.level == "head" and any(component.kind == "head" for component in result.components):
        return _heatmap(result)
    if result.level in ("layer", "sublayer"):
        return _waterfall(result, result.labels, result.values.tolist())
    order = [i for i in result.values.abs().argsort(descending=True).tolist()
             if result.components[i].kind != "rest"]  # fmt: skip
    shown, rest = order[:top], order[top:]
    rest += [i for i, component in enumerate(result.components) if component.kind == "rest"]
    labels = [result.labels[i] for i in shown]
    values = [result.values[i].item() for i in shown]
    if rest:
        labels.append("all others" if result.level == "path" else f"{len(rest)} others")
        values.append(result.values[rest].double().sum().item())
    return _waterfall(result, labels, values)


def _titles(result: Contributions) -> tuple[str, str]:
    title = f"By {result.level}"
    if result.of:
        what = html.escape(result.of[0])
        title = f"{f'Logit of {what}' if result.unit == 'logit' else what}, by {result.level}"
    if result.prompts:
        title += f", after “{show_prompt(result.prompts[0])}”"
    return title, f"parts minus whole: {result.error}{show_held(result.certificate)}"


def _waterfall(result: Contributions, labels: list[str], values: list[float]) -> go.Figure:
    shown = [f"{value:+.2f}" for value in (*values, result.total.item())]
    figure = go.Figure(
        go.Waterfall(
            x=[*labels, result.unit],
            y=[*values, result.total.item()],
            measure=["relative"] * len(values) + ["total"],
            increasing={"marker": {"color": RAISES}},
            decreasing={"marker": {"color": LOWERS}},
            totals={"marker": {"color": WHOLE}},
            connector={"line": {"color": "#bbbbbb", "width": 1}},
            text=shown if len(shown) <= 40 else None,
            customdata=shown,
            hovertemplate="%{x}: %{customdata}<extra></extra>",
        )
    )
    figure.update_yaxes(title=f"cumulative {result.unit}", zeroline=True)
    figure.update_xaxes(tickangle=-45)
    return styled(figure, *_titles(result))


def _heatmap(result: Contributions) -> go.Figure:
    heads = [(c, v.item()) for c, v in result if c.kind == "head"]
    n_layers = 1 + max(component.layer or 0 for component, _ in heads)
    grid = torch.tensor([value for _, value in heads]).reshape(n_layers, -1)
    others = result.total.item() - grid.double().sum().item()
    figure = go.Figure(
        go.Heatmap(
            **diverging(grid, result.unit),
            x=[f"H{head}" for head in range(grid.shape[1])],
            y=[f"L{layer}" for layer in range(n_layers)],
            texttemplate="%{z:.2f}" if grid.numel() <= 150 else None,
            hovertemplate="%{y}%{x}: %{z:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="head", side="bottom")
    figure.update_yaxes(title="layer", autorange="reversed")
    title, subtitle = _titles(result)
    subtitle += f"; heads {grid.sum().item():+.2f}, everything else {others:+.2f}"
    return styled(figure, title, subtitle, height=rows_height(n_layers))


def _sources(result: Contributions) -> go.Figure:
    heads = [i for i, component in enumerate(result.components) if component.kind == "head"]
    n_sources = 1 + max(result.components[i].pos or 0 for i in heads)
    grid = result.values[heads].reshape(-1, n_sources)
    names = [result.components[i].label.partition("@")[0] for i in heads[::n_sources]]
    rows = sorted(grid.abs().sum(1).topk(min(_HEADS, len(grid))).indices.tolist())
    shown = grid[rows].double()
    tokens = result.prompts[0] if result.prompts else [""] * n_sources
    figure = go.Figure(
        go.Heatmap(
            **diverging(shown, result.unit),
            x=show_tokens(tokens),
            y=[names[row] for row in rows],
            hovertemplate="%{y} reads %{x}: %{z:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="token that the head reads", tickangle=-45)
    figure.update_yaxes(title="head", autorange="reversed")
    title, subtitle = _titles(result)
    left = result.total.item() - shown.sum().item()
    subtitle += f"; shown {shown.sum().item():+.2f}, everything else {left:+.2f}"
    return styled(figure, title, subtitle, height=rows_height(len(rows), 260))


def _tokens(result: AffineMap) -> go.Figure:
    whole = result.contributions
    if whole.dims:
        raise DataError("a figure shows one prompt: take one with result.select(i)")
    values = [*result.by_token.tolist(), result.biases.item()]
    tokens = whole.prompts[0] if whole.prompts else [""] * len(result.by_token)
    figure = go.Figure(
        go.Bar(
            x=[*show_tokens(tokens), "biases"],
            y=values,
            marker={"color": [RAISES if value > 0 else LOWERS for value in values]},
            text=[f"{value:+.2f}" for value in values] if len(values) <= 40 else None,
            hovertemplate="%{x}: %{y:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="input token", tickangle=-45)
    figure.update_yaxes(title=f"share of the {whole.unit}", zeroline=True, zerolinecolor="#999999")
    title, subtitle = _titles(whole)
    return styled(figure, title, f"{subtitle}; patterns and gates given")
