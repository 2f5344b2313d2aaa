"""Colours, labels and layout that all figures share."""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from lnfree_interp.analysis.certificates import Certificate, describe_held

RAISES, LOWERS, WHOLE = "#2166ac", "#b2182b", "#4d4d4d"
"""Diverging colours around zero, as in `RdBu`: blue raises the logit, red lowers it."""

MODEL_COLOURS = {"original": "#7f7f7f", "vanilla": "#e08214", "lnfree": "#2166ac"}
MODEL_NAMES = {"original": "original", "vanilla": "vanilla fine-tuned", "lnfree": "LN-free"}
OTHER_COLOURS = ("#2166ac", "#e08214", "#1b7837", "#762a83", "#b2182b", "#35978f")


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
    return least + n_rows * max(14, 40 - n_rows)


def styled(figure: go.Figure, title: str, subtitle: str = "", height: int = 420) -> go.Figure:
    """The figure with its title, margins and fonts set."""
    return figure.update_layout(
        template="plotly_white",
        title={"text": title, "subtitle": {"text": subtitle}, "x": 0.01, "xanchor": "left"},
        margin={"l": 60, "r": 20, "t": 90, "b": 60},
        height=height,
        font={"size": 13},
    )
