"""Figure of what a fine-tuning rewrote: the change of components over layers."""

from collections.abc import Mapping

import plotly.graph_objects as go

from lnfree_interp.errors import DataError
from lnfree_interp.evaluation.component_change import MEASURES, ComponentChange
from lnfree_interp.plots.over_layers import lines_over_layers
from lnfree_interp.plots.style import styled


def component_change(
    changes: ComponentChange | Mapping[str, ComponentChange], by: str = "relative"
) -> go.Figure:
    """What a fine-tuning rewrote in each layer, for one or several beside each other.

    Args:
        changes: What `lf.component_change(...)` returned; or several by name, such as
            `{"lnfree": ..., "vanilla": ...}`.
        by: The measure: `"relative"`, `"mean_abs"` or `"largest"`.

    Returns:
        A plotly figure of a panel for each kind of component that blocks have, with a line for each
            change over the layers, all components of the kind together, on a logarithmic axis.
            What is outside of blocks is named below the title, in the order of the changes.

    Raises:
        DataError: if there is nothing to draw, or no such measure.

    Examples:
        >>> run = lf.train(model, lf.recipes.finetuning(steps=2, batch=2), tokens, progress=False)
        >>> figure = lf.plots.component_change(lf.component_change(model, run.model))
        >>> len(figure.data)
        5
    """
    named = changes if isinstance(changes, Mapping) else {"model": changes}
    found = {name: one.by_layer(by) for name, one in named.items()}
    inside = {
        name: {
            kind: {layer: x for layer, x in layers.items() if layer is not None}
            for kind, layers in one.items()
            if None not in layers
        }
        for name, one in found.items()
    }
    kinds = list(dict.fromkeys(kind for one in inside.values() for kind in one))
    if not kinds:
        raise DataError("there is nothing to draw: give at least one change of a model with blocks")
    outside = [
        f"{kind} " + " / ".join(f"{one[kind][None]:.2g}" for one in found.values() if kind in one)
        for kind in dict.fromkeys(kind for one in found.values() for kind in one)
        if kind not in kinds
    ]
    figure, height = lines_over_layers(inside, kinds)
    return styled(
        figure,
        "What was rewritten",
        f"{MEASURES[by]}; {', '.join(outside)}",
        height=height,
        above=30,
    )
