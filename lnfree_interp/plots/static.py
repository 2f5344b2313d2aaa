"""Pictures for places without JavaScript, such as a notebook on GitHub."""

import importlib.util
import os
import shutil
from pathlib import Path

import plotly.graph_objects as go
import plotly.io as pio

from lnfree_interp.errors import OutputError, UnsupportedModelError

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FORMATS = (".png", ".svg", ".pdf", ".html")


def show_in_notebooks(width: int = 950) -> None:
    """Let a notebook keep a picture beside each interactive figure, where one can be drawn.

    GitHub and other viewers strip scripts: they show the picture. Without Chrome figures stay
    interactive only.

    Args:
        width: Of the pictures, in pixels.

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
        figure: Any of `lnfree_interp.plots`.
        path: Where to. What stands there is replaced.
        width: In pixels, before `scale`; the height is the figure's own.
        scale: Pixels of the file per pixel, for .png.

    Returns:
        The path.

    Raises:
        OutputError: for another suffix, or a folder that does not exist.
        UnsupportedModelError: if pictures cannot be drawn here: that takes kaleido and a Chrome or
            Chromium (`apt install chromium`, or `plotly_get_chrome`).

    Examples:
        >>> dla = lf.attribute_logits(free, "for i in", " range", by="sublayer")
        >>> lf.plots.save(lf.plots.attribution(dla), "range.html").name
        'range.html'
    """
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise OutputError(f"{path}: write one of {', '.join(_FORMATS)}")
    if target.is_dir() or not target.parent.is_dir():
        raise OutputError(f"{path}: a folder, or in a folder that does not exist")
    try:
        if target.suffix.lower() == ".html":
            figure.write_html(target, include_plotlyjs=True)
        else:
            figure.write_image(target, format=target.suffix[1:].lower(), width=width, scale=scale)
    except (ValueError, RuntimeError, OSError) as error:
        if "kaleido" in str(error).lower() or "chrome" in str(error).lower():
            raise UnsupportedModelError(
                "pictures need kaleido and Chrome: pip install 'lnfree_interp[pictures]', and "
                "apt install chromium or plotly_get_chrome; .html needs neither"
            ) from error
        if isinstance(error, OSError):
            raise OutputError(f"{path} cannot be written: {error}") from error
        raise
    return target
