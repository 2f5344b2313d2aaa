"""Figures of attribution: what each part adds to a logit."""

import html
from itertools import accumulate

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
    row_ticks,
    rows_height,
    show_held,
    show_prompt,
    show_tokens,
    styled,
    ticks,
)

_HEADS = 20
"""How many heads a figure by source token shows."""
_FLAT, _UPRIGHT, _LARGEST = 20, 40, 15
"""So many bars have their values beside them, so many have them upright; of more bars, only so many
of the largest have values."""
_BESIDE, _BESIDE_UPRIGHT = 0.1, 0.2
"""The room for values above and below all bars, as a share of their height."""
_COLUMNS = 20
"""So many heads in a layer have their values in their cells."""
_SEEN = 0.02
"""Smaller values, as a share of the largest, are not written into cells."""


def attribution(result: Contributions | MeanContributions | AffineMap, top: int = 15) -> go.Figure:
    """The figure that suits the result's level.

    By layer or sublayer: a waterfall in the order of computation, from zero to the logit; of more
    bars than have room for a label, the largest have one. By head: a heatmap layer x head. By
    source: a heatmap of the largest heads x the tokens that they read. By neuron or path: a
    waterfall of the largest, with all others as one bar. By token (`affine_map`): a bar per token,
    and one for biases.

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
        what = html.escape(result.of[0], quote=False)
        title = f"{f'Logit of {what}' if result.unit == 'logit' else what}, by {result.level}"
    if result.prompts:
        title += f", after “{show_prompt(result.prompts[0])}”"
    return title, f"parts minus whole: {result.error}{show_held(result.certificate)}"


def _waterfall(result: Contributions, labels: list[str], values: list[float]) -> go.Figure:
    values = [*values, result.total.item()]
    shown, labels = [f"{value:+.2f}" for value in values], [*labels, result.unit]
    largest = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:_LARGEST]
    few = len(values) <= _UPRIGHT
    figure = go.Figure(
        go.Waterfall(
            x=labels,
            y=values,
            measure=["relative"] * (len(values) - 1) + ["total"],
            increasing={"marker": {"color": RAISES}},
            decreasing={"marker": {"color": LOWERS}},
            totals={"marker": {"color": WHOLE}},
            connector={"line": {"color": "#bbbbbb", "width": 1}},
            text=[text if few or i in largest else "" for i, text in enumerate(shown)],
            textposition="outside",
            textangle=0 if len(values) <= _FLAT else -90,
            textfont={"size": 11 if few else 10},
            constraintext="none",
            cliponaxis=False,
            customdata=shown,
            hovertemplate="%{x}: %{customdata}<extra></extra>",
        )
    )
    ends = [0.0, *accumulate(values[:-1]), values[-1]]
    room = (max(ends) - min(ends) or 1.0) * (_BESIDE if len(values) <= _FLAT else _BESIDE_UPRIGHT)
    figure.update_yaxes(
        title=f"cumulative {result.unit}", zeroline=True,
        range=[min(ends) - room, max(ends) + room],
    )  # fmt: skip
    labelled = ticks(labels, values)
    figure.update_xaxes(**labelled)
    title, subtitle = _titles(result)
    if (n_labels := len(labelled["tickvals"])) < len(labels):
        subtitle += f"; the largest have labels, {n_labels} of {len(labels)}"
    return styled(figure, title, subtitle)


def _heatmap(result: Contributions) -> go.Figure:
    heads = [(c, v.item()) for c, v in result if c.kind == "head"]
    n_layers = 1 + max(component.layer or 0 for component, _ in heads)
    grid = torch.tensor([value for _, value in heads]).reshape(n_layers, -1)
    others = result.total.item() - grid.double().sum().item()
    x = [f"H{head}" for head in range(grid.shape[1])]
    y = [f"L{layer}" for layer in range(n_layers)]
    least = _SEEN * grid.abs().max().item()
    text = [[f"{v:.2f}" if abs(v) >= least else "" for v in row] for row in grid.tolist()]
    with_values = len(x) <= _COLUMNS
    figure = go.Figure(
        go.Heatmap(
            **diverging(grid, result.unit),
            x=x,
            y=y,
            text=text if with_values else None,
            texttemplate="%{text}" if with_values else None,
            textfont={"size": 10 if n_layers > 15 else 12},
            hovertemplate="%{y}%{x}: %{z:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="head", side="bottom", **ticks(x))
    figure.update_yaxes(title="layer", autorange="reversed", **row_ticks(y))
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
    x, y = show_tokens(tokens), [names[row] for row in rows]
    figure = go.Figure(
        go.Heatmap(
            **diverging(shown, result.unit),
            x=x,
            y=y,
            hovertemplate="%{y} reads %{x}: %{z:.4f}<extra></extra>",
        )
    )
    sizes = shown.abs().amax(0).tolist()
    figure.update_xaxes(title="token that the head reads", **ticks(x, sizes))
    figure.update_yaxes(title="head", autorange="reversed", **row_ticks(y))
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
    x = [*show_tokens(tokens), "biases"]
    figure = go.Figure(
        go.Bar(
            x=x,
            y=values,
            marker={"color": [RAISES if value > 0 else LOWERS for value in values]},
            text=[f"{value:+.2f}" for value in values] if len(values) <= 40 else None,
            hovertemplate="%{x}: %{y:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="input token", **ticks(x, values))
    figure.update_yaxes(title=f"share of the {whole.unit}", zeroline=True, zerolinecolor="#999999")
    title, subtitle = _titles(whole)
    return styled(figure, title, f"{subtitle}; patterns and gates given")
