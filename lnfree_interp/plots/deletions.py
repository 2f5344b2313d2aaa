"""A figure of predicted against measured deletions."""

import plotly.graph_objects as go
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
    frame, summary = result.to_frame(), result.summary(["kind"]).set_index("kind")
    kinds = list(summary.index)
    titles = [
        f"{kind}<br>r = {row['correlation']:.3f}, slope {row['slope']:.2f}, n = {row['n']:,.0f}"
        for kind, row in summary.iterrows()
    ]
    rows = (len(kinds) + 1) // 2
    figure = make_subplots(
        rows=rows, cols=2, subplot_titles=titles, vertical_spacing=0.24 / rows,
        horizontal_spacing=0.12,
    )  # fmt: skip
    for number, kind in enumerate(kinds):
        place = {"row": number // 2 + 1, "col": number % 2 + 1}
        some = frame[frame["kind"] == kind]
        ends = [
            some[["predicted", "measured"]].min().min(),
            some[["predicted", "measured"]].max().max(),
        ]
        figure.add_scatter(
            x=ends, y=ends, mode="lines", line={"color": "#999999", "width": 1}, showlegend=False,
            hoverinfo="skip", **place,
        )  # fmt: skip
        for chosen, colour in zip(("random", "top"), OTHER_COLOURS[1::-1], strict=True):
            of = some[some["chosen"] == chosen]
            of = of.sample(min(points, len(of)), random_state=0)
            figure.add_scatter(
                x=of["predicted"].tolist(),
                y=of["measured"].tolist(),
                mode="markers",
                name={"top": "largest shares", "random": "random"}[chosen],
                legendgroup=chosen,
                showlegend=number == 0,
                marker={"size": 5, "opacity": 0.5, "color": colour},
                text=[
                    f"{row.head} prompt {row.prompt}: without {row.deleted}".strip()
                    for row in of.itertuples()
                ],
                hovertemplate="%{text}<br>predicted %{x:.4g}, measured %{y:.4g}<extra></extra>",
                **place,
            )
        unit = _UNITS[kind]
        figure.update_xaxes(title=f"predicted change ({unit})", **place)
        figure.update_yaxes(title=f"measured change ({unit})", **place)
    figure.update_layout(legend={"orientation": "h", "y": -0.1})
    styled(
        figure,
        "Does attribution predict what deletions change?",
        f"one point: components by {result.level} deleted for one head, or one logit, of one prompt"
        f"{show_held(result.certificate)}",
        height=130 + 380 * rows,
    )
    return figure.update_layout(margin_t=130)
