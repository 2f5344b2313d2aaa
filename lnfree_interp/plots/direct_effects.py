"""A figure of direct logit attribution against measured direct effects."""

import html
from collections.abc import Mapping

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.direct_effects import DirectEffects
from lnfree_interp.evaluation.results import Evaluation
from lnfree_interp.plots.style import MODEL_COLOURS, MODEL_NAMES, styled


def direct_effects(
    results: DirectEffects | Evaluation | Mapping[str, DirectEffects], points: int = 1500
) -> go.Figure:
    """One scatter plot per model of attribution against measured direct effect.

    Args:
        results: What `direct_effects` returned; several results by model name, in the order of the
            panels; or an evaluation of several models.
        points: How many pairs of head and token each panel shows, drawn at random.

    Returns:
        A plotly figure with one panel per model: the measured effect on the horizontal axis, the
            attribution on the vertical one, in logits.

    Raises:
        DataError: if no direct effects were measured.

    Examples:
        >>> effects = lf.direct_effects(free, tokens)
        >>> figure = lf.plots.direct_effects({"lnfree": effects}, points=500)
        >>> len(figure.data[1].x)
        500
    """
    if isinstance(results, Evaluation):
        found = {name: model.direct_effects for name, model in results.models.items()}
        results = {name: effects for name, effects in found.items() if effects is not None}
    elif isinstance(results, DirectEffects):
        results = {"model": results}
    if not results:
        raise DataError(
            "there are no direct effects to draw, since none were measured: give a result of "
            "direct_effects, or call evaluate with effects=True"
        )
    figure = make_subplots(
        cols=len(results),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[
            f"{html.escape(MODEL_NAMES.get(name, name))}<br>NMAE {100 * result.nmae:.3g} %"
            for name, result in results.items()
        ],
    )
    generator = torch.Generator().manual_seed(0)
    for column, (name, result) in enumerate(results.items(), start=1):
        x, y = result.measured.flatten(), result.attribution.flatten()
        sample = torch.randperm(len(x), generator=generator)[:points]
        x, y = x[sample], y[sample]
        ends = [min(x.min().item(), y.min().item()), max(x.max().item(), y.max().item())]
        figure.add_scatter(
            x=ends, y=ends, mode="lines", line={"color": "#999999", "width": 1}, row=1, col=column
        )
        figure.add_scatter(
            x=x.tolist(),
            y=y.tolist(),
            mode="markers",
            marker={"size": 4, "opacity": 0.5, "color": MODEL_COLOURS.get(name, "#333333")},
            row=1,
            col=column,
        )
        figure.update_xaxes(title="measured effect (logit)", row=1, col=column)
    figure.update_yaxes(title="attribution (logit)", row=1, col=1)
    figure.update_layout(showlegend=False)
    return styled(
        figure,
        "Does direct logit attribution predict what removing a head does?",
        "one point: one head at one token, on the true next token",
        height=460,
        above=60,
    )
