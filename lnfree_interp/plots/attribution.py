"""Attribution: what each part adds to a logit."""

import html

import plotly.graph_objects as go
import torch

from lnfree_interp.analysis.contributions import Contributions
from lnfree_interp.errors import DataError
from lnfree_interp.plots.style import LOWERS, RAISES, WHOLE, show_prompt, styled


def attribution(result: Contributions, top: int = 15) -> go.Figure:
    """The figure that suits the result's level.

    By block: a waterfall in the order of computation, from nothing to the logit. By head: a
    heatmap layer x head. By neuron: a waterfall of the largest, with all others as one bar.

    Args:
        result: For one prompt; take one of a batch with `result.select(i)`.
        top: Bars shown by neuron.

    Raises:
        DataError: if the result is a batch.
    """
    if result.values.ndim != 1:
        raise DataError("a figure shows one prompt: pass result.select(i)")
    if result.level == "head":
        return _heatmap(result)
    if result.level == "block":
        return _waterfall(result, result.labels, result.values.tolist())
    order = result.values.abs().argsort(descending=True)
    shown, rest = order[:top].tolist(), order[top:]
    labels = [result.labels[i] for i in shown] + [f"{len(rest)} others"]
    values = [result.values[i].item() for i in shown] + [result.values[rest].double().sum().item()]
    return _waterfall(result, labels, values)


def _titles(result: Contributions) -> tuple[str, str]:
    title = f"By {result.level}"
    if result.of:
        title = f"Logit of {html.escape(result.of[0])}, by {result.level}"
    if result.prompts:
        title += f", after “{show_prompt(result.prompts[0])}”"
    subtitle = f"parts minus logit: {result.error}"
    if result.frozen_scale:
        subtitle += "; final norm live, its scale held"
    return title, subtitle


def _waterfall(result: Contributions, labels: list[str], values: list[float]) -> go.Figure:
    figure = go.Figure(
        go.Waterfall(
            x=[*labels, "logit"],
            y=[*values, result.total.item()],
            measure=["relative"] * len(values) + ["total"],
            increasing={"marker": {"color": RAISES}},
            decreasing={"marker": {"color": LOWERS}},
            totals={"marker": {"color": WHOLE}},
            connector={"line": {"color": "#bbbbbb", "width": 1}},
            text=[f"{value:+.2f}" for value in (*values, result.total.item())],
            hovertemplate="%{x}: %{text}<extra></extra>",
        )
    )
    figure.update_yaxes(title="cumulative logit", zeroline=True)
    figure.update_xaxes(tickangle=-45)
    return styled(figure, *_titles(result))


def _heatmap(result: Contributions) -> go.Figure:
    heads = [(c, v.item()) for c, v in result if c.kind == "head"]
    n_layers = 1 + max(component.layer or 0 for component, _ in heads)
    grid = torch.tensor([value for _, value in heads]).reshape(n_layers, -1)
    others = result.total.item() - grid.double().sum().item()
    largest = grid.abs().max().item()
    figure = go.Figure(
        go.Heatmap(
            z=grid.tolist(),
            x=[f"H{head}" for head in range(grid.shape[1])],
            y=[f"L{layer}" for layer in range(n_layers)],
            colorscale="RdBu",
            zmid=0,
            zmin=-largest,
            zmax=largest,
            colorbar={"title": "logit"},
            texttemplate="%{z:.2f}" if grid.shape[1] <= 12 else None,
            hovertemplate="%{y}%{x}: %{z:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title="head", side="bottom")
    figure.update_yaxes(title="layer", autorange="reversed")
    title, subtitle = _titles(result)
    subtitle += f"; heads {grid.sum().item():+.2f}, everything else {others:+.2f}"
    return styled(figure, title, subtitle, height=220 + 40 * n_layers)
