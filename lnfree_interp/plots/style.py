"""Colours, labels and layout that all figures share."""

import html
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from lnfree_interp.analysis.certificates import Certificate, describe_held

RAISES, LOWERS, WHOLE = "#2166ac", "#b2182b", "#4d4d4d"
"""Diverging colours around zero, as in `RdBu`: blue raises the logit, red lowers it."""

MODEL_COLOURS = {"original": "#7f7f7f", "vanilla": "#e08214", "lnfree": "#2166ac"}
MODEL_NAMES = {"original": "original", "vanilla": "vanilla fine-tuned", "lnfree": "LN-free"}
OTHER_COLOURS = ("#2166ac", "#e08214", "#1b7837", "#762a83", "#b2182b", "#35978f")

WIDTH = 900
"""The width of a picture in pixels that titles and labels are fitted to."""
PLOT = WIDTH - 100
"""What margins leave of it."""
ROW = 14
"""The least height of a heatmap's row, in pixels."""
_UPRIGHT = 11
"""The least distance of upright labels, in pixels."""
_ABOVE, _LINE = 18, 22
"""What is left free above a title, and the height of its lines, in pixels; plotly moves a title up
by half a line for each line."""
_TITLE, _SUBTITLE = 9.6, 7.0
"""The mean width of a letter in pixels, in the widest of the usual fonts."""


def show_token(token: str, longest: int = 14) -> str:
    """A token's text for a figure: escaped, with spaces and line ends made visible."""
    text = token.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    shown = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return html.escape(shown, quote=False) or "∅"  # plotly would show &quot; as it stands


def show_tokens(tokens: Sequence[str], start: int = 0) -> list[str]:
    """Axis labels for tokens, with their positions, so that no two labels are equal."""
    return [f"{pos} {show_token(token)}" for pos, token in enumerate(tokens, start)]


def show_prompt(tokens: Sequence[str], longest: int = 45) -> str:
    """The end of a prompt, in one line."""
    text = "".join(tokens).replace("\n", "↵")
    shown = text if len(text) <= longest else "…" + text[-longest:]
    return html.escape(shown, quote=False)


def show_held(certificate: Certificate) -> str:
    """The end of a subtitle: what was held and what that misses, or that no norm was held."""
    if not certificate.held:
        return "; no norm held"
    held = describe_held(certificate.held, certificate.gap).removeprefix(" with ")
    return f"; NOT exact: {html.escape(held, quote=False)}"


def model_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each model; models of the demo have the same colour in every figure."""
    free = iter(colour for colour in OTHER_COLOURS * 9 if colour not in MODEL_COLOURS.values())
    return {name: MODEL_COLOURS.get(name) or next(free) for name in names}


def diverging(values: Any, unit: str = "logit") -> dict[str, Any]:
    """Settings of a heatmap whose colours are centred on zero."""
    largest = float(values.abs().max()) or 1.0
    return {
        "z": values.tolist(),
        "colorscale": "RdBu",
        "zmid": 0,
        "zmin": -largest,
        "zmax": largest,
        "colorbar": {"title": unit},
    }


def rows_height(n_rows: int, least: int = 220) -> int:
    """The height of a heatmap with so many rows: large cells for few rows, small cells for many."""
    return least + n_rows * max(ROW, 40 - n_rows)


def row_ticks(labels: Sequence[str]) -> dict[str, Any]:
    """Settings of a heatmap's axis of rows: every row has its label. Left to itself, plotly leaves
    out every other one where they are close."""
    return {
        "tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": list(labels),
        "tickfont": {"size": 13 if len(labels) <= 20 else 11},
    }  # fmt: skip


def ticks(
    labels: Sequence[str], sizes: Sequence[float] | None = None, room: int = PLOT
) -> dict[str, Any]:
    """Settings of a horizontal axis of categories: all labels, turned as far as their number needs;
    or, where even upright ones would touch, those of the largest.

    Args:
        labels: Of the categories in order; they stand at 0, 1, 2 and so on.
        sizes: How large each is. Default: all alike, and the first of those that touch is kept.
        room: The width of the axis, in pixels.
    """
    shown, pitch = list(range(len(labels))), room / max(1, len(labels))
    flat = 8 * max(map(len, labels), default=0) + 6
    angle, size = (0, 13) if pitch >= flat else (-45, 13) if pitch >= 20 else (-90, 10)
    if pitch < _UPRIGHT:
        kept: set[int] = set()
        apart = -int(-_UPRIGHT // pitch)
        for i in sorted(shown, key=lambda i: -abs(sizes[i])) if sizes is not None else shown:
            if kept.isdisjoint(range(i - apart + 1, i + apart)):
                kept.add(i)
        shown = sorted(kept)
    return {
        "tickmode": "array", "tickvals": shown, "ticktext": [labels[i] for i in shown],
        "tickangle": angle, "tickfont": {"size": size},
    }  # fmt: skip


def styled(
    figure: go.Figure, title: str, subtitle: str = "", height: int = 420, above: int = 0
) -> go.Figure:
    """The figure with its title, margins and fonts set.

    Args:
        figure: What is drawn.
        title: Its title, in as many lines as it needs.
        subtitle: Its subtitle, in as many lines as it needs.
        height: Its height with a title and a subtitle of one line, in pixels.
        above: How much of it panels' own titles need.
    """
    figure.update_layout(
        template="plotly_white",
        title={
            "text": title, "subtitle": {"text": subtitle}, "x": 0.01, "xanchor": "left",
            "y": 1 - _ABOVE / height, "yref": "container", "yanchor": "top",
        },
        margin={"l": 60, "r": 20, "t": 90 + above, "b": 60},
        height=height,
        font={"size": 13},
    )  # fmt: skip
    return fit_titles(figure, min(WIDTH, pio.renderers["png"].width or WIDTH))


def fit_titles(figure: go.Figure, width: int) -> go.Figure:
    """The figure with lines of its title broken where a picture so wide would cut them off.

    It grows by the new lines. Titles with markup are left as they are.
    """
    layout: Any = figure.layout
    more = 0
    for title, letter, line in (
        (layout.title, _TITLE, _LINE),
        (layout.title.subtitle, _SUBTITLE, 16),
    ):
        text = title.text or ""
        if re.search("<(?!br>)", text):
            continue
        old, longest = text.split("<br>"), int((width - 20) / letter)
        new = [line for one in old for line in _wrapped(one, longest)]
        if len(new) > len(old):
            title.text = "<br>".join(new)
            more += line * (len(new) - len(old))
    if more:
        height = (layout.height or 450) + more
        above = _ABOVE + _LINE // 2 * (layout.title.text or "").count("<br>")
        figure.update_layout(
            margin_t=(layout.margin.t or 100) + more, height=height,
            title={"y": 1 - above / height, "yref": "container", "yanchor": "top"},
        )  # fmt: skip
    return figure


def _wrapped(line: str, longest: int) -> list[str]:
    """A line of a title in lines of so many letters; an escaped letter is one."""
    shown = html.unescape(line)
    if len(shown) <= longest:
        return [line]
    lines = textwrap.wrap(shown, longest, break_long_words=False, break_on_hyphens=False)
    return [html.escape(one, quote=False) for one in lines]
