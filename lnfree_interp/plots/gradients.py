"""Figure of gradient balance: the size of gradients over layers, by kind of weight."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.gradients import GradientBalance
from lnfree_interp.plots.over_layers import lines_over_layers
from lnfree_interp.plots.style import styled


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
    figure, height = lines_over_layers(
        {
            name: {kind: dict(enumerate(sizes.tolist())) for kind, sizes in one.by_kind.items()}
            for name, one in named.items()
        },
        shown,
    )
    about = dict.fromkeys(one.about for one in named.values())
    return styled(
        figure,
        "Gradient balance",
        f"mean absolute entry of the gradient, nats per unit of weight; {', '.join(about)}",
        height=height,
        above=30,
    )
