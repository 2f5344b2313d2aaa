"""Figure of Fisher information: of which parameters a text knows most, over layers."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from lnfree_interp.errors import DataError
from lnfree_interp.plots.over_layers import lines_over_layers
from lnfree_interp.plots.style import styled
from lnfree_interp.tuning.fisher import FisherInformation


def fisher_information(
    found: FisherInformation | Mapping[str, FisherInformation],
) -> go.Figure:
    """The mean Fisher information of a parameter in each layer, for one text or several.

    Args:
        found: What `lf.fisher_information(...)` returned; or several by name, such as
            `{"Python": ..., "English": ...}`.

    Returns:
        A plotly figure of a panel for each kind of component that blocks have, with a line for each
            text over the layers, on a logarithmic axis, in squared nats per squared unit. What is
            outside of blocks is named below the title, in the order of the texts.

    Raises:
        DataError: if nothing inside of blocks was measured.

    Examples:
        >>> fisher = lf.fisher_information(model, tokens, trainable="norms", progress=False)
        >>> len(lf.plots.fisher_information(fisher).data)
        2
    """
    named = found if isinstance(found, Mapping) else {"text": found}
    inside: dict[str, dict[str, dict[int, float]]] = {}
    outside: dict[str, list[str]] = {}
    for name, one in named.items():
        rows = one.to_frame().to_dict("records")
        sums: dict[tuple[str, int], list[float]] = {}
        for row in rows:
            if pd.isna(row["layer"]):
                outside.setdefault(row["component"], []).append(f"{row['mean']:.2g}")
                continue
            both = sums.setdefault((row["kind"], int(row["layer"])), [0.0, 0.0])
            both[0] += row["total"]
            both[1] += row["parameters"]
        inside[name] = {kind: {} for kind, _ in sums}
        for (kind, layer), (total, parameters) in sums.items():
            inside[name][kind][layer] = total / parameters
    kinds = list(dict.fromkeys(kind for one in inside.values() for kind in one))
    if not kinds:
        raise DataError(
            "there is nothing to draw: give Fisher information of parameters inside of blocks"
        )
    figure, height = lines_over_layers(inside, kinds)
    also = "".join(f"; {name} {' / '.join(means)}" for name, means in outside.items())
    kind = next(iter(named.values())).kind
    return styled(
        figure,
        f"Fisher information, {kind}",
        f"mean over the entries of a component, squared nats per squared unit{also}",
        height=height,
        above=30,
    )
