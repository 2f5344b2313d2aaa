"""Figure of gradient balance: the size of gradients over layers, by kind of weight."""

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.gradients import GradientBalance
from lnfree_interp.plots.style import MODEL_NAMES, model_colours, styled

_COLUMNS = 3


def gradient_balance(
    balances: GradientBalance | Mapping[str, GradientBalance], kinds: Sequence[str] | None = None
) -> go.Figure:
    """How large gradients are in each layer, for one model or several.

    Args:
        balances: What `lf.gradient_balance(...)` or `lf.GradientBalance.of_run(...)` returned; or
            several by name.
        kinds: The kinds of weights to draw, such as `["mlp.W_out"]`. Default: all.

    Returns:
        A plotly figure of a panel for each kind of weight with a line for each model, the mean
            absolute entry of the gradient over layers, on a logarithmic axis.

    Raises:
        DataError: if there is nothing to draw, or no model has such a kind of weight.

    Examples:
        >>> balance = lf.gradient_balance(model, tokens)
        >>> len(lf.plots.gradient_balance(balance, ["mlp.W_in", "mlp.W_out"]).data)
        2
    """
    named = balances if isinstance(balances, Mapping) else {"model": balances}
    known = list(dict.fromkeys(kind for one in named.values() for kind in one.by_kind))
    shown = known if kinds is None else list(kinds)
    if wrong := [kind for kind in shown if kind not in known]:
        raise DataError(f"no model has weights of the kind {wrong[0]}: give some of {known}")
    if not shown:
        raise DataError("there is nothing to draw: give at least one gradient balance and kind")
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=shown, shared_xaxes=True,
        vertical_spacing=0.24 / rows, horizontal_spacing=0.09,
    )  # fmt: skip
    colours = model_colours(list(named))
    drawn: set[str] = set()
    for i, kind in enumerate(shown):
        row, col = i // columns + 1, i % columns + 1
        for name, balance in named.items():
            if kind not in balance.by_kind:
                continue
            sizes = balance.by_kind[kind].tolist()
            figure.add_scatter(
                x=list(range(len(sizes))), y=sizes, row=row, col=col, mode="lines+markers",
                name=html.escape(MODEL_NAMES.get(name, name)), legendgroup=name,
                showlegend=name not in drawn,
                line={"color": colours[name], "width": 1.8}, marker={"size": 5},
            )  # fmt: skip
            drawn.add(name)
        if i + columns >= len(shown):  # nothing below
            figure.update_xaxes(title="layer", row=row, col=col)
    layers = max(len(sizes) for one in named.values() for sizes in one.by_kind.values())
    figure.update_yaxes(type="log", exponentformat="power")
    figure.update_xaxes(tickformat="d", dtick=max(1, -(-layers // 8)))
    figure.update_layout(legend={"orientation": "h", "y": -0.2}, showlegend=len(named) > 1)
    about = dict.fromkeys(one.about for one in named.values())
    return styled(
        figure,
        "Gradient balance",
        f"mean absolute entry of the gradient, nats per unit of weight; {', '.join(about)}",
        height=200 + 190 * rows,
        above=30,
    )
