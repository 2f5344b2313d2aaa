"""Figure of regressions on words: their errors beside those of baselines, by target and layer."""

import html
from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lnfree_interp.errors import DataError
from lnfree_interp.plots.style import styled, ticks
from lnfree_interp.probing.fitted import BASELINE, MEMBERS, FittedProbe

_COLUMNS = 3
_COLOURS = {BASELINE: "#7f7f7f", "words": "#e08214", "stream": "#2166ac", "ensemble": "#1b7837"}
_NAMES = {
    BASELINE: "mean of the target", "words": "features of words", "stream": "stream",
    "ensemble": "ensemble of both",
}  # fmt: skip
MEASURES = {"mae": "mean absolute error", "r2": "R2"}


def probes(fits: FittedProbe | Mapping[str, FittedProbe], by: str = "mae") -> go.Figure:
    """How well numbers of words are predicted, on sentences held out, beside what needs no model.

    Args:
        fits: What `lf.fit_probe` returned; or several by site, as `lf.fit_probes` returns them, in
            the order of the sites.
        by: `"mae"`: the mean absolute error, in each target's own unit; `"r2"`: the share of its
            variance that is explained.

    Returns:
        A plotly figure of a panel for each target. Of one probe: a bar for the mean of the target,
            features of words, the stream, and the ensemble of both. Of several: a line of each over
            the sites; the mean and the features do not change with them, and are dotted.

    Raises:
        DataError: if there is nothing to draw, the probes are of different targets, or there is no
            such measure.

    Examples:
        >>> data = lf.planted_reading_times(model, "blocks.1.hook_resid_post", sentences=30)
        >>> fits = lf.fit_probes(model, data.targets, words=data.words, progress=False)
        >>> len(lf.plots.probes(fits).data)
        20
    """
    several = fits if isinstance(fits, Mapping) else {fits.site: fits}
    if by not in MEASURES:
        raise DataError(f"by={by!r}: give one of {list(MEASURES)}")
    if not several:
        raise DataError("there is nothing to draw: give at least one fitted probe")
    first = next(iter(several.values()))
    if any(one.names != first.names for one in several.values()):
        raise DataError("the probes are of different targets: draw those of the same ones")
    tables = [getattr(one, by) for one in several.values()]
    columns = min(_COLUMNS, len(first.names))
    rows = -(-len(first.names) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, vertical_spacing=0.4 / rows, horizontal_spacing=0.09,
        subplot_titles=[html.escape(name, quote=False) for name in first.names],
    )  # fmt: skip
    order = (BASELINE, "words", *(member for member in MEMBERS if member != "words"))
    for i, target in enumerate(first.names):
        at = {"row": i // columns + 1, "col": i % columns + 1}
        for member in order:
            y = [table.loc[target, member] for table in tables]
            label = {"name": _NAMES[member], "legendgroup": member, "showlegend": i == 0}
            if len(several) == 1:
                colour = {"color": _COLOURS[member]}
                figure.add_bar(x=[member], y=y, text=[f"{y[0]:.3g}"], marker=colour, **label, **at)
                continue
            flat = member in (BASELINE, "words")
            line = {"color": _COLOURS[member], "width": 1.8, "dash": "dot" if flat else "solid"}
            figure.add_scatter(
                x=list(range(len(y))), y=y, mode="lines" if flat else "lines+markers", line=line,
                marker={"size": 5}, **label, **at,
            )  # fmt: skip
        if at["col"] == 1:
            figure.update_yaxes(title=MEASURES[by], row=at["row"], col=1)
        if len(several) > 1 and i + columns >= len(first.names):  # nothing below
            figure.update_xaxes(title="site", row=at["row"], col=at["col"])
    if by == "mae":
        figure.update_yaxes(rangemode="tozero")
    if len(several) > 1:
        short = [_short(site) for site in several]
        figure.update_xaxes(**ticks(short, room=900 // columns - 60))
    figure.update_layout(legend={"orientation": "h", "y": -0.35 / rows}, bargap=0.25)
    title = "Numbers of words, told from the stream"
    return styled(figure, title, _about(first, by, len(several) > 1), 230 + 240 * rows, above=30)


def _about(one: FittedProbe, by: str, several: bool) -> str:
    unit = ", in the units of the targets" if by == "mae" else ""
    where = "" if several else f" at {one.site}"
    pool = "mean over the tokens" if one.pool == "mean" else f"{one.pool} token"
    return (
        f"{MEASURES[by]}{unit}, on held-out sentences, {int(one.fold.max()) + 1} folds; {one.head}"
        f"{where}, {pool} of {len(one.observed):,} words in {len(one.sentences):,} sentences"
    )


def _short(site: str) -> str:
    """`2 post` for `blocks.2.hook_resid_post`; other names as they are."""
    parts = site.split(".")
    if len(parts) == 3 and parts[2].startswith("hook_resid_"):
        return f"{parts[1]} {parts[2].removeprefix('hook_resid_')}"
    return site.removeprefix("blocks.")
