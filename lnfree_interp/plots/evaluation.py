"""Figures of an evaluation: curves over layers and positions."""

import html

import plotly.graph_objects as go

from lnfree_interp.evaluation.results import Evaluation
from lnfree_interp.plots.style import MODEL_NAMES, model_colours, styled


def residual_norms(result: Evaluation) -> go.Figure:
    """Norms of the residual stream by layer: median and largest, with the first position apart.

    Args:
        result: What `evaluate` returned.

    Returns:
        A plotly figure of three lines per model over places, before each block and at the end; the
            axis of norms is logarithmic.

    Examples:
        >>> found = lf.evaluate({"live": model}, tokens, effects=False, neurons=0, pairs=0)
        >>> [line.name for line in lf.plots.residual_norms(found).data]
        ['live, position 0, median', 'live, others, median', 'live, others, largest']
    """
    figure, colours = go.Figure(), model_colours(list(result.models))
    for name, model in result.models.items():
        norms, label = model.residual_norms, html.escape(MODEL_NAMES.get(name, name))
        curves = (
            ("position 0, median", norms.first_median, "dot", False),
            ("others, median", norms.others_median, "solid", True),
            ("others, largest", norms.others_max, "dash", False),
        )
        for what, values, dash, shown in curves:
            figure.add_scatter(
                x=_places(len(values)),
                y=values.tolist(),
                name=f"{label}, {what}",
                legendgroup=name,
                line={"color": colours[name], "dash": dash, "width": 2.5 if shown else 1.5},
            )
    figure.update_yaxes(type="log", dtick="D2", title="norm of the residual stream")
    figure.update_xaxes(title="before block")
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return styled(
        figure,
        "How large the residual stream gets",
        f"{html.escape(result.text)}, {result.tokens:,} tokens; norms depend on the basis of the "
        "stream: compare a model with its own fine-tuning only",
        height=500,
    )


def loss_by_position(result: Evaluation) -> go.Figure:
    """Cross-entropy by position, as a running mean of 16 positions.

    Args:
        result: What `evaluate` returned.

    Returns:
        A plotly figure of one line per model over positions, cross-entropy in nats per token.

    Examples:
        >>> found = lf.evaluate({"live": model}, tokens, effects=False, neurons=0, pairs=0)
        >>> len(lf.plots.loss_by_position(found).data[0].y)
        63
    """
    figure, colours = go.Figure(), model_colours(list(result.models))
    for name, model in result.models.items():
        losses = model.cross_entropy.by_position.tolist()
        smooth = [sum(losses[max(0, i - 15) : i + 1]) / min(16, i + 1) for i in range(len(losses))]
        figure.add_scatter(
            x=list(range(1, len(losses) + 1)),
            y=smooth,
            name=html.escape(MODEL_NAMES.get(name, name)),
            line={"color": colours[name]},
        )
    figure.update_xaxes(title="position of the predicted token")
    figure.update_yaxes(title="cross-entropy (nats per token)")
    figure.update_layout(legend={"orientation": "h", "y": -0.25}, showlegend=True)
    return styled(
        figure,
        "Cross-entropy by position",
        f"{html.escape(result.text)}, {result.tokens:,} tokens; running mean of 16 positions",
    )


def _places(n: int) -> list[str]:
    return [*(str(layer) for layer in range(n - 1)), "end"]
