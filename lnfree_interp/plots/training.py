"""Figures of a removal run: its training curve with its events, and the drift of frozen sites."""

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from lnfree_interp.errors import DataError
from lnfree_interp.models.site_names import NormSite, SiteKind
from lnfree_interp.plots.style import MODEL_COLOURS, MODEL_NAMES, styled
from lnfree_interp.removal.run import Run, StepRecord

_KIND_COLOURS: Mapping[SiteKind, str] = {
    "ln1": "#762a83",
    "ln1.qk": "#762a83",
    "ln1.v": "#c51b7d",
    "attn.q_norm": "#9970ab",
    "attn.k_norm": "#c2a5cf",
    "attn.inner": "#de77ae",
    "ln1_post": "#e9a3c9",
    "ln2": "#1b7837",
    "mlp.inner": "#5aae61",
    "ln2_post": "#7fbf7b",
    "ln_final": "#000000",
}


History = Run | Sequence[StepRecord]
"""A run, or the records of its steps from its folder (`read_history`)."""


def _steps(run: History) -> Sequence[StepRecord]:
    return run.history if isinstance(run, Run) else run


def training_curve(runs: History | Mapping[str, History], window: int = 10) -> go.Figure:
    """Cross-entropy in training, for one run or several, and when each norm site was frozen.

    Args:
        runs: A `Run`, or the records of its steps; or several by name, such as
            `{"lnfree": run, "vanilla": control}`.
        window: How many steps the running mean covers, which is drawn over the single steps.

    Returns:
        A plotly figure of loss in nats per token over steps, with a line at each step where a site
            was frozen.

    Raises:
        DataError: if no run has a step.

    Examples:
        >>> from lnfree_interp.removal.run import StepRecord
        >>> frozen = {3: {"blocks.0.ln2": 1.7}}
        >>> loss = {"cross_entropy": 3.0}
        >>> steps = [StepRecord(i, loss, 1e-4, frozen.get(i, {})) for i in range(9)]
        >>> [line.name for line in lf.plots.training_curve({"lnfree": steps}).data]
        [None, 'LN-free', 'ln2 frozen']
    """
    if not isinstance(runs, Mapping):
        runs = {"lnfree": runs}
    if not any(_steps(run) for run in runs.values()):
        raise DataError("no step was taken, so there is no curve: give a run with steps")
    figure = go.Figure()
    events: dict[SiteKind, list[tuple[int, str, float]]] = {}
    for name, run in runs.items():
        losses = [record.loss for record in _steps(run)]
        smooth = [
            sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1)
            for i in range(len(losses))
        ]
        steps, colour = list(range(len(losses))), MODEL_COLOURS.get(name, "#333333")
        label = html.escape(MODEL_NAMES.get(name, name))
        figure.add_scatter(
            x=steps,
            y=losses,
            line={"color": colour, "width": 0.6},
            opacity=0.35,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(x=steps, y=smooth, name=label, line={"color": colour, "width": 2})
        for record in _steps(run):
            for site, sigma in record.frozen.items():
                kind = NormSite.parse(site).kind
                events.setdefault(kind, []).append((record.step, site, sigma))
    for kind, frozen in events.items():
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
        shapes=[
            {
                "type": "line",
                "x0": step,
                "x1": step,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": _KIND_COLOURS[kind], "width": 1, "dash": "dot"},
            }
            for kind, frozen in events.items()
            for step, _, _ in frozen
        ],
        yaxis={"title": "cross-entropy (nats per token)"},
        yaxis2={"overlaying": "y", "range": [-20, 1], "visible": False},
        legend={"orientation": "h", "y": -0.2},
    )
    figure.update_xaxes(title="step")
    return styled(
        figure,
        "Removing the norms" if events else "Training",
        f"on the text of each step; thick: mean of {window} steps",
        height=460,
    )


def sigma_drift(run: History) -> go.Figure:
    """How far the standard deviation of each frozen site's input has moved from its constant.

    Args:
        run: A removal with `log_every` above 0: a `Run`, or the records of its steps.

    Returns:
        A plotly figure of one line per site over steps; the ratio is 1 without drift.

    Raises:
        DataError: if no drift was logged.

    Examples:
        >>> from lnfree_interp.removal.run import StepRecord
        >>> drift = {"drift": {"blocks.0.ln2": 1.1}}
        >>> figure = lf.plots.sigma_drift([StepRecord(0, {}, 1e-4, {}, probes=drift)])
        >>> figure.data[0].y
        (1.1,)
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in _steps(run):
        for site, ratio in record.probes.get("drift", {}).items():
            curves.setdefault(site, []).append((record.step, ratio))
    if not curves:
        raise DataError(
            "the run logged no drift, since no site was frozen or log_every was 0: give a removal "
            "with log_every above 0"
        )
    figure, seen = go.Figure(), set()
    for site, points in curves.items():
        kind = NormSite.parse(site).kind
        figure.add_scatter(
            x=[step for step, _ in points],
            y=[ratio for _, ratio in points],
            mode="lines+markers",
            marker={"size": 4},
            line={"color": _KIND_COLOURS[kind], "width": 1.5},
            name=kind,
            legendgroup=kind,
            showlegend=kind not in seen,
            text=[site] * len(points),
            hovertemplate="step %{x}: %{text} %{y:.3f}<extra></extra>",
        )
        seen.add(kind)
    figure.add_hline(y=1, line={"color": "#999999", "dash": "dot"})
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="sigma of the input over the constant")
    return styled(
        figure,
        "Drift of frozen sites",
        "1 is the moment of freezing; each line is a site, from when it was frozen",
    )
