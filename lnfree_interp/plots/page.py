"""One self-contained HTML page from figures and tables."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lnfree_interp.tables import Table

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 2rem 0 0; }
h1, h2, h3 { overflow-wrap: anywhere; }
p { max-width: 46rem; overflow-wrap: anywhere; }
p.note { color: #555; font-size: .85rem; margin: .2rem 0; }
figure { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
footer { color: #666; font-size: .85rem; margin: 3rem 0 1rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph of plain text, and tables or figures."""

    heading: str
    text: str = ""
    content: Sequence[Table | go.Figure] = ()


def _figure(figure: go.Figure) -> str:
    """A figure under its title as HTML, which wraps on a narrow screen; plotly's own does not."""
    layout: Any = figure.layout
    title, shown = layout.title, go.Figure(figure)
    lines = max((1 + note.text.count("<br>") for note in layout.annotations), default=0)
    shown.update_layout(title=None, margin_t=30 + 25 * lines)
    plot = shown.to_html(
        full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False}
    )
    heading, below = (one.text.replace("<br>", " ") if one.text else "" for one in
                      (title, title.subtitle))  # fmt: skip
    note = f'<p class="note">{below}</p>' if below else ""
    return f"<figure><h3>{heading}</h3>{note}{plot}</figure>"


def page(title: str, lead: str, sections: Sequence[Section], footer: str = "") -> str:
    """The page as HTML. It includes plotly's script once and opens without a network."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<script>{get_plotlyjs()}</script></head><body>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        if section.text:
            parts.append(f"<p>{html.escape(section.text)}</p>")
        for item in section.content:
            parts.append(item.to_html() if isinstance(item, Table) else _figure(item))
    parts.append(f"<footer>{html.escape(footer)}</footer></body></html>")
    return "\n".join(parts)
