"""What every figure shares."""

import html

import plotly.graph_objects as go

RAISES, LOWERS, WHOLE = "#2166ac", "#b2182b", "#4d4d4d"
"""Diverging colours around zero, as in `RdBu`: blue raises the logit, red lowers it."""

MODEL_COLOURS = {"original": "#7f7f7f", "vanilla": "#e08214", "lnfree": "#2166ac"}
MODEL_NAMES = {"original": "original", "vanilla": "vanilla fine-tuned", "lnfree": "LN-free"}


def show_prompt(tokens: tuple[str, ...], longest: int = 60) -> str:
    """The end of a prompt, one line."""
    text = "".join(tokens).replace("\n", "↵")
    return html.escape(text if len(text) <= longest else "…" + text[-longest:])


def styled(figure: go.Figure, title: str, subtitle: str = "", height: int = 420) -> go.Figure:
    """Title, margins and fonts."""
    return figure.update_layout(
        template="plotly_white",
        title={"text": title, "subtitle": {"text": subtitle}, "x": 0, "xanchor": "left"},
        margin={"l": 60, "r": 20, "t": 90, "b": 60},
        height=height,
        font={"size": 13},
    )
