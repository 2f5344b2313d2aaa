"""What each norm of a model costs, as curves over layers."""

import math
from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lnfree_interp.models.site_names import NormSite
from lnfree_interp.plots.style import OTHER_COLOURS, styled
from lnfree_interp.removal.sensitivity import Cost, SiteSensitivity

LEAST = 1e-3
"""Nats per token; smaller costs, and gains, are drawn here."""


def site_sensitivity(result: SiteSensitivity) -> go.Figure:
    """What each norm costs: each site frozen alone over layers, and all together in that order.

    Args:
        result: What `lf.site_sensitivity` returned.

    Returns:
        A plotly figure of two panels with logarithmic axes, in nats per token. Above, a line for
            each kind of site, the first token apart, and a dotted one with tokens far above the
            others apart too, where there are such tokens. Below, the cost of freezing together. A
            cross is a loss that is not finite.

    Examples:
        >>> costs = lf.site_sensitivity(model, tokens, progress=False)
        >>> len(lf.plots.site_sensitivity(costs).data)
        5
    """
    figure = make_subplots(
        rows=2, vertical_spacing=0.2, row_heights=[0.62, 0.38],
        subplot_titles=["one site frozen", "all up to here frozen together, the cheapest first"],
    )  # fmt: skip
    kinds = list(dict.fromkeys(site.kind for site in result.first_apart))
    last = max((site.layer for site in result.first_apart if site.layer is not None), default=0) + 1
    for kind, colour in zip(kinds, OTHER_COLOURS * len(kinds), strict=False):
        sites = [site for site in result.first_apart if site.kind == kind]
        x = [last if site.layer is None else site.layer for site in sites]
        _line(figure, 1, kind, x, result.first_apart, sites, colour)
        if any(result.outliers[site] for site in sites):
            name = f"{kind}, outliers apart"
            _line(figure, 1, name, x, result.outliers_apart, sites, colour, "dot")
    together = list(result.together)
    numbers = list(range(1, len(together) + 1))
    _line(figure, 2, "together", numbers, result.together, together, "#4d4d4d")
    figure.update_yaxes(type="log", dtick=1, title="nats per token added")
    ticks = {"tickformat": "d", "dtick": max(1, last // 15)}
    figure.update_xaxes(title=f"layer ({last}: ln_final)", row=1, **ticks)
    figure.update_xaxes(title="sites frozen", row=2)
    figure.update_layout(legend={"orientation": "h", "y": -0.14}, showlegend=True)
    return styled(
        figure,
        "What each norm costs without training",
        f"loss of the live model {result.loss:.3f}; {result.n_tokens:,} tokens; costs below "
        f"{LEAST:g} are drawn at {LEAST:g}",
        height=760,
        above=40,
    )


def _line(
    figure: go.Figure, row: int, name: str, x: list[int], costs: Mapping[NormSite, Cost],
    sites: list[NormSite], colour: str, dash: str = "solid",
) -> None:  # fmt: skip
    losses = [costs[site].loss for site in sites]
    finite = [max(loss, LEAST) for loss in losses if math.isfinite(loss)]
    top = 3 * max(finite, default=1.0)
    figure.add_scatter(
        x=x,
        y=[max(loss, LEAST) if math.isfinite(loss) else top for loss in losses],
        name=name,
        mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 1.8},
        marker={
            "size": 6, "color": colour,
            "symbol": ["circle" if math.isfinite(loss) else "x" for loss in losses],
        },
        text=[f"{site}: {loss:+.4f}" for site, loss in zip(sites, losses, strict=True)],
        hoverinfo="text",
        row=row,
        col=1,
    )  # fmt: skip
