"""A figure of the logit lens."""

import plotly.graph_objects as go

from lnfree_interp.analysis.lens import Lens
from lnfree_interp.errors import DataError
from lnfree_interp.plots.style import (
    diverging,
    row_ticks,
    rows_height,
    show_held,
    show_token,
    show_tokens,
    styled,
    ticks,
)

_SHOWN = 24
"""How many positions are shown by default."""


def lens(
    result: Lens, prompt: int = 0, start: int | None = None, stop: int | None = None
) -> go.Figure:
    """The true next token's logit layer by layer, and the token that the lens predicts there; at
    the last position, the logit of the token that the model predicts.

    Args:
        result: What `logit_lens` returned.
        prompt: The number of the prompt in the batch, counted from 0.
        start: The first position to show. Default: 24 positions before `stop`.
        stop: The position after the last one shown. Default: 24 positions after `start`, or the
            end.

    Returns:
        A plotly figure, a heatmap of place x position, in logits.

    Raises:
        DataError: if there is no such prompt or position.

    Examples:
        >>> figure = lf.plots.lens(lf.logit_lens(free, tokens), prompt=1, stop=10)
        >>> len(figure.data[0].y), len(figure.data[0].x)
        (5, 10)
    """
    n_prompts, n_targets = result.values.shape[1:]
    if stop is None:
        stop = n_targets if start is None else min(n_targets, start + _SHOWN)
    start = max(0, stop - _SHOWN) if start is None else start
    if not 0 <= prompt < n_prompts or not 0 <= start < stop <= n_targets:
        raise DataError(
            f"there are {n_prompts} prompts of {n_targets} targets, and prompt {prompt}, positions "
            f"{start}:{stop} were given: give a prompt and positions among them"
        )
    values = result.values[:, prompt, start:stop].double()
    top = result.predicted[:, prompt, start:stop].tolist()
    words = [[show_token(result.names[token], 6) for token in row] for row in top]
    tokens = result.prompts[prompt]
    ids = result.targets[prompt, start:stop].tolist()
    wanted = [show_token(result.names[token]) for token in ids]
    x = show_tokens(tokens[start:stop], start)
    y = ["embeddings", *(f"after block {i}" for i in range(len(values) - 1))]
    figure = go.Figure(
        go.Heatmap(
            **diverging(values),
            x=x,
            y=y,
            text=words,
            texttemplate="%{text}",
            textfont={"size": 10},
            customdata=[wanted] * len(values),
            hovertemplate="%{y}, at %{x}: logit of %{customdata} is %{z:.3f}; "
            "most likely %{text}<extra></extra>",
        )
    )
    figure.update_xaxes(title="position", **ticks(x, values.abs().amax(0).tolist()))
    figure.update_yaxes(autorange="reversed", **row_ticks(y))
    return styled(
        figure,
        "Logit lens: the true next token's logit by layer",
        f"positions {start} to {stop - 1} of {n_targets}; in the cells: the token that would be "
        f"predicted there; steps minus attribution: {result.error}{show_held(result.certificate)}",
        height=rows_height(len(values), 260),
    )
