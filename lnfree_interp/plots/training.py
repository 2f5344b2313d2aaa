"""The training curve of a removal run, with its events."""

from collections.abc import Mapping

import plotly.graph_objects as go

from lnfree_interp.plots.style import MODEL_COLOURS, MODEL_NAMES, styled
from lnfree_interp.removal.run import Run

_KIND_COLOURS = {
    "ln2": "#1b7837",
    "ln2_post": "#7fbf7b",
    "qk": "#762a83",
    "q_norm": "#9970ab",
    "k_norm": "#c2a5cf",
    "v": "#c51b7d",
    "ln1_post": "#e9a3c9",
    "ln_final": "#000000",
}


def training_curve(runs: Mapping[str, Run], window: int = 10) -> go.Figure:
    """Training loss of several runs on the same data, and when each norm site was frozen.

    Args:
        runs: By name, e.g. `{"lnfree": run, "vanilla": control}`.
        window: Steps in the running mean drawn over the single steps.
    """
    figure = go.Figure()
    events: dict[str, list[tuple[int, str, float]]] = {}
    for name, run in runs.items():
        losses = [record.loss for record in run.history]
        smooth = [
            sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1)
            for i in range(len(losses))
        ]
        steps, colour = list(range(len(losses))), MODEL_COLOURS.get(name, "#333333")
        label = MODEL_NAMES.get(name, name)
        figure.add_scatter(
            x=steps,
            y=losses,
            line={"color": colour, "width": 0.6},
            opacity=0.35,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(x=steps, y=smooth, name=label, line={"color": colour, "width": 2})
        for record in run.history:
            for site, sigma in record.frozen.items():
                kind = site.rpartition(".")[2]
                events.setdefault(kind, []).append((record.step, site, sigma))
    for kind, frozen in events.items():
        for step, _, _ in frozen:
            figure.add_vline(x=step, line={"color": _KIND_COLOURS[kind], "width": 1, "dash": "dot"})
        figure.add_scatter(
            x=[step for step, _, _ in frozen],
            y=[0.0] * len(frozen),
            yaxis="y2",
            mode="markers",
            name=f"{kind} frozen",
            marker={"color": _KIND_COLOURS[kind], "symbol": "triangle-down", "size": 9},
            text=[f"{site}, sigma {sigma:.3g}" for _, site, sigma in frozen],
            hovertemplate="step %{x}: %{text}<extra></extra>",
        )
    figure.update_layout(
        yaxis2={"overlaying": "y", "range": [-20, 1], "visible": False},
        legend={"orientation": "h", "y": -0.2},
    )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="training loss (nats per token)", selector={"anchor": "x"})
    return styled(
        figure, "Removing the norms", f"thin: every step; thick: mean of {window} steps", height=460
    )
