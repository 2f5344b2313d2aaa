"""Figures of a depth report: curves over layers, angles between layers, and spectra."""

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.depth import DepthReport
from lnfree_interp.plots.style import MODEL_NAMES, model_colours, styled

_BASIS = "in a model without live norms it depends on the basis of the stream"


def depth(reports: DepthReport | Mapping[str, DepthReport]) -> go.Figure:
    """How the stream grows with depth and what each block does, for one model or several.

    Args:
        reports: What `lf.depth_report` returned; or several by name, such as
            `{"original": before, "lnfree": after}`.

    Returns:
        A plotly figure of four panels over layers, with a line for each model: variance of the
            stream, the angle by which a block turns it over pi, the distance of its Jacobian from
            the identity, and the loss without it, in nats per token. Lines that depend on the basis
            of the stream, because no live norm reads it, are dotted.

    Raises:
        DataError: if there is no report.

    Examples:
        >>> report = lf.depth_report(model, tokens, prompts=1, eigenvalues=0, progress=False)
        >>> len(lf.plots.depth({"original": report}).data)
        4
    """
    named = reports if isinstance(reports, Mapping) else {"model": reports}
    if not named:
        raise DataError("there is nothing to draw: give at least one depth report")
    figure = make_subplots(
        rows=2, cols=2, vertical_spacing=0.18, horizontal_spacing=0.11,
        subplot_titles=["variance of the stream", "angle between a block's ends, over pi",
                        "distance of its Jacobian from I", "loss without the block"],
    )  # fmt: skip
    colours = model_colours(list(named))
    for name, report in named.items():
        n = len(report.loss_without)
        layers = list(range(n))
        dash = "solid" if report.basis_fixed else "dot"
        panels = (
            (1, 1, list(range(n + 1)), report.variance.tolist(), dash),
            (1, 2, layers, report.angles.diagonal(1).tolist(), dash),
            (2, 1, layers, report.jacobian_distance.tolist(), dash),
            (2, 2, layers, report.loss_without.tolist(), "solid"),
        )
        errors = {"array": report.jacobian_distance_error.tolist()}
        for row, col, x, y, style in panels:
            figure.add_scatter(
                x=x, y=y, row=row, col=col, mode="lines+markers",
                name=html.escape(MODEL_NAMES.get(name, name)),
                legendgroup=name, showlegend=(row, col) == (2, 2),
                line={"color": colours[name], "dash": style, "width": 1.8}, marker={"size": 5},
                error_y=errors if (row, col) == (2, 1) else None,
            )  # fmt: skip
    figure.update_yaxes(type="log", row=1, col=1)
    figure.update_yaxes(title="norm over sqrt(d_model)", type="log", row=2, col=1)
    figure.update_yaxes(title="nats per token added", rangemode="tozero", row=2, col=2)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    most = max(len(report.loss_without) for report in named.values())
    figure.update_xaxes(tickformat="d", dtick=max(1, -(-most // 12)), title="layer")
    figure.update_xaxes(title="before block", row=1, col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.13}, showlegend=len(named) > 1)
    first = next(iter(named.values()))
    about = f"{first.n_tokens:,} tokens"
    if not all(report.basis_fixed for report in named.values()):
        about += "; dotted: no live norm reads the stream, so it depends on the basis"
    return styled(figure, "What depth does", about, height=680, above=30)


def angles(report: DepthReport) -> go.Figure:
    """The angle between the stream at any two places, as a heatmap.

    Args:
        report: What `lf.depth_report` returned.

    Returns:
        A plotly figure of angles over pi: 0 for one direction, 1/2 for orthogonal ones.

    Examples:
        >>> report = lf.depth_report(model, tokens, prompts=1, eigenvalues=0, progress=False)
        >>> len(lf.plots.angles(report).data[0].z)
        5
    """
    places = _places(len(report.angles))
    hover = "from %{y} to %{x}: %{z:.3f} pi<extra></extra>"
    figure = go.Figure(
        go.Heatmap(
            z=report.angles.tolist(), x=places, y=places, colorscale="Viridis", zmin=0,
            colorbar={"title": "angle / pi"}, hovertemplate=hover,
        )
    )  # fmt: skip
    step = max(1, -(-len(places) // 16))
    ticks = {"tickmode": "array", "tickvals": places[::step], "type": "category"}
    figure.update_xaxes(title="before block", **ticks)
    figure.update_yaxes(title="before block", autorange="reversed", **ticks)
    about = "last tokens of sequences" + ("" if report.basis_fixed else f"; {_BASIS}")
    return styled(figure, "Angles between layers", about, height=560)


def spectrum(report: DepthReport) -> go.Figure:
    """The largest eigenvalues of J - I of each block, in the complex plane and their size by layer.

    Args:
        report: What `lf.depth_report` returned, with eigenvalues.

    Returns:
        A plotly figure of two panels with a point for each block, prompt and eigenvalue, coloured
            by layer. The plane is cut to the size of most blocks; the panel beside it has all, on a
            logarithmic axis. Eigenvalues are the same in every basis of the stream.

    Raises:
        DataError: if the report has no eigenvalues.

    Examples:
        >>> report = lf.depth_report(model, tokens, prompts=1, progress=False)
        >>> len(lf.plots.spectrum(report).data)
        8
    """
    values = report.eigenvalues
    if values.shape[-1] == 0:
        raise DataError("the report has no eigenvalues: make it with eigenvalues=8")
    n, k, prompts = len(values), values.shape[-1], values.shape[1]
    figure = make_subplots(
        rows=1, cols=2, column_widths=[0.56, 0.44], horizontal_spacing=0.12,
        subplot_titles=["complex plane", "absolute value"],
    )  # fmt: skip
    colours = sample_colorscale("Viridis", [layer / max(1, n - 1) for layer in range(n)])
    for layer, colour in enumerate(colours):
        flat = values[layer].flatten()
        marker = {"color": colour, "size": 6}
        figure.add_scatter(
            x=flat.real.tolist(), y=flat.imag.tolist(), mode="markers", name=f"block {layer}",
            marker=marker, hovertemplate=f"block {layer}: %{{x:.3g}} + %{{y:.3g}} i<extra></extra>",
            row=1, col=1,
        )  # fmt: skip
        figure.add_scatter(
            x=[layer] * len(flat), y=flat.abs().tolist(), mode="markers", marker=marker,
            hovertemplate=f"block {layer}: %{{y:.3g}}<extra></extra>", row=1, col=2,
        )  # fmt: skip
    radii = values.abs().nan_to_num().flatten(1).amax(1)
    edge = 1.15 * (2 * radii.median().item() if radii.max() > 4 * radii.median() else
                   radii.max().item()) or 1.0  # fmt: skip
    line = {"range": [-edge, edge], "zeroline": True, "zerolinecolor": "#999999"}
    figure.update_xaxes(title="real part", row=1, col=1, **line)
    figure.update_yaxes(title="imaginary part", scaleanchor="x", row=1, col=1, **line)
    figure.update_xaxes(title="layer", tickformat="d", dtick=max(1, -(-n // 10)), row=1, col=2)
    figure.update_yaxes(type="log", row=1, col=2)
    figure.update_layout(showlegend=False)
    return styled(
        figure,
        "Spectra of the blocks",
        f"the {k} largest eigenvalues of J - I, last token of {prompts} prompts; 0: that direction "
        "is left alone, -1: erased",
        height=500,
        above=30,
    )


def _places(n: int) -> Sequence[str]:
    return [*(str(layer) for layer in range(n - 1)), "end"]
