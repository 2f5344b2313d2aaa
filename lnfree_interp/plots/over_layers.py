"""A panel for each kind of something, with a line over the layers for each model."""

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lnfree_interp.plots.style import MODEL_NAMES, model_colours

_COLUMNS = 3

Layers = Mapping[int, float]


def lines_over_layers(
    models: Mapping[str, Mapping[str, Layers]], kinds: Sequence[str]
) -> tuple[go.Figure, int]:
    """The figure, without a title, and its height in pixels.

    Args:
        models: By model, by kind: what is drawn, by layer.
        kinds: The panels, in their order.
    """
    columns = min(_COLUMNS, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=kinds, shared_xaxes=True,
        vertical_spacing=0.24 / rows, horizontal_spacing=0.09,
    )  # fmt: skip
    colours = model_colours(list(models))
    drawn: set[str] = set()
    for i, kind in enumerate(kinds):
        row, col = i // columns + 1, i % columns + 1
        for name, by_kind in models.items():
            if kind not in by_kind:
                continue
            figure.add_scatter(
                x=list(by_kind[kind]), y=list(by_kind[kind].values()), row=row, col=col,
                mode="lines+markers", name=html.escape(MODEL_NAMES.get(name, name)),
                legendgroup=name, showlegend=name not in drawn,
                line={"color": colours[name], "width": 1.8}, marker={"size": 5},
            )  # fmt: skip
            drawn.add(name)
        if i + columns >= len(kinds):  # nothing below
            figure.update_xaxes(title="layer", showticklabels=True, row=row, col=col)
    layers = max(len(layers) for by_kind in models.values() for layers in by_kind.values())
    figure.update_yaxes(type="log", exponentformat="power")
    figure.update_xaxes(tickformat="d", dtick=max(1, -(-layers // 8)))
    figure.update_layout(legend={"orientation": "h", "y": -0.2}, showlegend=len(models) > 1)
    return figure, 200 + 190 * rows
