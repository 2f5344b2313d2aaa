"""A figure of predicted against measured deletions."""

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from lnfree_interp.evaluation.deletion_results import KINDS, DeletionCheck
from lnfree_interp.plots.style import OTHER_COLOURS, show_held, styled

_UNITS = dict(zip(KINDS, ("score", "score", "attention weight", "logit"), strict=True))


def deletions(result: DeletionCheck, points: int = 1500) -> go.Figure:
    """What deletions change, predicted by attribution and measured: a panel for each kind.

    Args:
        result: What `lf.deletion_check` returned.
        points: How many deletions of each colour a panel shows, drawn at random.

    Returns:
        A plotly figure: the predicted change on the horizontal axis, the measured one on the
        vertical one, in scores, attention weights and logits; the components of largest share in
        one colour, random ones in another; the grey line is where both are equal.

    Examples:
        >>> check = lf.deletion_check(model, "for i in range", ["L2H5"], progress=False)
        >>> [panel.text.split("<br>")[0] for panel in lf.plots.deletions(check).layout.annotations]
        ['score at query', 'score at key', 'pattern', 'logit']
    """
    summary = result.summary(["kind"]).to_dict("records")
    rows = (len(summary) + 1) // 2
    figure = make_subplots(
        rows=rows, cols=2, vertical_spacing=0.24 / rows, horizontal_spacing=0.12,
        subplot_titles=[
            f"{of['kind']}<br>r = {of['correlation']:.3f}, slope {of['slope']:.2f}, n = {of['n']:,}"
            for of in summary
        ],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for number, of in enumerate(summary):
        row, col = number // 2 + 1, number % 2 + 1
        its = [i for i, kind in enumerate(result.kind) if kind == of["kind"]]
        both = torch.cat([result.predicted[its], result.measured[its]])
        ends = [both.min().item(), both.max().item()]
        figure.add_scatter(
            x=ends, y=ends, mode="lines", line={"color": "#999999", "width": 1}, showlegend=False,
            hoverinfo="skip", row=row, col=col,
        )  # fmt: skip
        for chosen, colour in zip(("random", "top"), OTHER_COLOURS[1::-1], strict=True):
            some = torch.tensor([i for i in its if result.chosen[i] == chosen], dtype=torch.long)
            some = some[torch.randperm(len(some), generator=generator)[:points]].tolist()
            figure.add_scatter(
                x=result.predicted[some].tolist(),
                y=result.measured[some].tolist(),
                mode="markers",
                name="largest shares" if chosen == "top" else "random",
                legendgroup=chosen,
                showlegend=number == 0,
                marker={"size": 5, "opacity": 0.5, "color": colour},
                text=[
                    f"{result.head[i]} prompt {result.prompt[i]}: without {result.deleted[i]}"
                    for i in some
                ],
                hovertemplate="%{text}<br>predicted %{x:.4g}, measured %{y:.4g}<extra></extra>",
                row=row,
                col=col,
            )
        unit = _UNITS[of["kind"]]
        figure.update_xaxes(title=f"predicted change ({unit})", row=row, col=col)
        figure.update_yaxes(title=f"measured change ({unit})", row=row, col=col)
    figure.update_layout(legend={"orientation": "h", "y": -0.1})
    styled(
        figure,
        "Does attribution predict what deletions change?",
        f"one point: components by {result.level} deleted for one head, or one logit, of one prompt"
        f"{show_held(result.certificate)}",
        height=130 + 380 * rows,
    )
    return figure.update_layout(margin_t=130)
