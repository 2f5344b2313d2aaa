"""Figure of what each domain costs after each that was trained."""

import html
from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lnfree_interp.errors import DataError
from lnfree_interp.plots.style import styled
from lnfree_interp.tuning.bank_evaluation import BankEvaluation

_UNITS = {"loss": "nats per token", "accuracy": "share of next tokens"}


def norm_banks(
    evaluations: BankEvaluation | Mapping[str, BankEvaluation], of: str = "loss"
) -> go.Figure:
    """Losses or accuracies on each domain after each domain that was trained.

    Args:
        evaluations: What `NormBanks.evaluate` returned; or several by name, beside each other.
        of: `"loss"` in nats per token, or `"accuracy"`, the share of next tokens that are the most
            likely one.

    Returns:
        A plotly figure, a heatmap of stage x domain for each evaluation, all in one colour scale.
            Below its name stands what was forgotten.

    Raises:
        DataError: if there is nothing to draw, or for another word than the two.

    Examples:
        >>> banks = lf.NormBanks.of(model)
        >>> recipe = lf.recipes.finetuning(steps=2, batch=2)
        >>> run = banks.train("python", tokens, recipe, progress=False)
        >>> figure = lf.plots.norm_banks(banks.evaluate({"python": tokens}))
        >>> len(figure.data)
        1
    """
    named = evaluations if isinstance(evaluations, Mapping) else {"": evaluations}
    if not named:
        raise DataError("there is nothing to draw: give what NormBanks.evaluate returned")
    tables = {name: one.values(of) for name, one in named.items()}
    what = "forgetting" if of == "loss" else "forgotten"
    titles = [
        f"{html.escape(name)}<br>" * bool(name)
        + f"{what} {one.forgetting if of == 'loss' else one.forgotten_accuracy:.3f}"
        for name, one in named.items()
    ]
    figure = make_subplots(
        cols=len(named), subplot_titles=titles, horizontal_spacing=0.28 / (len(named) + 1)
    )
    low = min(values.min().item() for values in tables.values())
    high = max(values.max().item() for values in tables.values())
    for col, (name, one) in enumerate(named.items(), 1):
        domains, stages = (list(map(html.escape, names)) for names in (one.domains, one.stages))
        figure.add_heatmap(
            z=tables[name].tolist(), x=domains, y=stages, zmin=low, zmax=high,
            colorscale="Blues", reversescale=False, showscale=col == 1,
            colorbar={"title": {"text": _UNITS[of], "side": "right"}},
            texttemplate="%{z:.3f}", textfont={"size": 13},
            hovertemplate="%{x} after %{y}: %{z:.4f}<extra></extra>", row=1, col=col,
        )  # fmt: skip
        figure.update_xaxes(title="text of", type="category", row=1, col=col)
        figure.update_yaxes(
            title="after training" if col == 1 else None, type="category", autorange="reversed",
            row=1, col=col,
        )  # fmt: skip
    rows = max(len(one.stages) for one in named.values())
    return styled(
        figure,
        "Next-token loss by domain" if of == "loss" else "Next-token accuracy by domain",
        f"{_UNITS[of]}, after each domain that was trained, in this order",
        height=260 + 50 * rows,
        above=40,
    )
