"""Pictures of figures for viewers without JavaScript, such as GitHub's of notebooks."""

import importlib.util
import os
import shutil
from pathlib import Path

import plotly.graph_objects as go
import plotly.io as pio

from lnfree_interp.errors import OutputError, UnsupportedModelError
from lnfree_interp.plots.style import fit_titles

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FORMATS = (".png", ".svg", ".pdf", ".html")


def show_in_notebooks(width: int = 950) -> None:
    """Let a notebook keep a picture beside each interactive figure, where one can be drawn.

    GitHub and other viewers remove scripts and show the picture. Without Chrome, figures are
    interactive only.

    Args:
        width: The width of the pictures, in pixels.

    Examples:
        >>> lf.plots.show_in_notebooks(width=800)  # doctest: +SKIP
    """
    found = os.environ.get("BROWSER_PATH") or any(map(shutil.which, _BROWSERS))
    pictures = bool(found) and importlib.util.find_spec("kaleido") is not None
    pio.renderers["png"].width = width
    pio.renderers.default = "plotly_mimetype+png" if pictures else "plotly_mimetype"


def save(
    figure: go.Figure, path: str | os.PathLike[str], width: int = 900, scale: float = 2.0
) -> Path:
    """Write a figure to a file, by its suffix: .png, .svg, .pdf, or .html that needs no network.

    Args:
        figure: A figure that a function of `lnfree_interp.plots` returned.
        path: The file to write. An existing file is replaced.
        width: The width in pixels, before `scale`; titles are broken into lines that fit it. The
            height is the figure's own.
        scale: How many pixels of a .png file there are per pixel of the figure, in each direction.

    Returns:
        The path.

    Raises:
        OutputError: for another suffix, or a folder that does not exist.
        UnsupportedModelError: if pictures cannot be drawn here, which needs kaleido and Chrome or
            Chromium (`apt install chromium`, or `plotly_get_chrome`).

    Examples:
        >>> dla = lf.attribute_logits(free, "for i in", " range", by="sublayer")
        >>> lf.plots.save(lf.plots.attribution(dla), "range.html").name
        'range.html'
    """
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise OutputError(f"{path}: give a name that ends in one of {', '.join(_FORMATS)}")
    if target.is_dir() or not target.parent.is_dir():
        raise OutputError(
            f"{path} is a folder, or in a folder that does not exist: give a file in an existing "
            "folder"
        )
    try:
        if target.suffix.lower() == ".html":
            figure.write_html(target, include_plotlyjs=True)
        else:
            shown = fit_titles(go.Figure(figure), width)
            shown.write_image(target, format=target.suffix[1:].lower(), width=width, scale=scale)
    except (ValueError, RuntimeError, OSError) as error:
        if "kaleido" in str(error).lower() or "chrome" in str(error).lower():
            raise UnsupportedModelError(
                "pictures need kaleido and Chrome: pip install kaleido, and "
                "apt install chromium or run plotly_get_chrome; .html needs neither"
            ) from error
        if isinstance(error, OSError):
            raise OutputError(f"{path} cannot be written: {error}") from error
        raise
    return target
