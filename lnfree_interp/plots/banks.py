"""Figure of what each domain costs after each that was trained."""

import html
from collections.abc import Mapping

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from lnfree_interp.errors import DataError
from lnfree_interp.plots.style import styled
from lnfree_interp.tuning.bank_evaluation import BankEvaluation

_UNITS = {"loss": "nats per token", "accuracy": "share of next tokens"}
_APART = {"loss": "nats above the best", "accuracy": "share below the best"}


def norm_banks(
    evaluations: BankEvaluation | Mapping[str, BankEvaluation], of: str = "loss"
) -> go.Figure:
    """Losses or accuracies on each domain after each domain that was trained.

    Args:
        evaluations: What `NormBanks.evaluate` returned; or several by name, beside each other.
        of: `"loss"` in nats per token, or `"accuracy"`, the share of next tokens that are the most
            likely one.

    Returns:
        A plotly figure, a heatmap of stage x domain for each evaluation, with the values in its
            cells. The colour is how far a domain is from its best in all that is drawn. Below the
            name of an evaluation stands what was forgotten.

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
    titles = [
        f"{html.escape(name)}<br>" * bool(name)
        + (
            f"forgetting {one.forgetting:.3f} nats"
            if of == "loss"
            else f"forgotten {one.forgotten_accuracy:.3f}"
        )
        for name, one in named.items()
    ]
    figure = make_subplots(
        cols=len(named), subplot_titles=titles, horizontal_spacing=0.28 / (len(named) + 1)
    )
    sign = -1 if of == "loss" else 1
    best: dict[str, float] = {}
    for name, one in named.items():
        for domain, value in zip(one.domains, (sign * tables[name]).amax(0).tolist(), strict=True):
            best[domain] = max(value, best[domain]) if domain in best else value
    apart = {
        name: torch.tensor([best[d] for d in one.domains], dtype=torch.float64)
        - sign * tables[name]
        for name, one in named.items()
    }
    high = max(values.max().item() for values in apart.values())
    for col, (name, one) in enumerate(named.items(), 1):
        domains, stages = (list(map(html.escape, names)) for names in (one.domains, one.stages))
        figure.add_heatmap(
            z=apart[name].tolist(), x=domains, y=stages, zmin=0, zmax=high or 1,
            colorscale="Blues", showscale=col == 1,
            colorbar={"title": {"text": _APART[of], "side": "right"}},
            text=tables[name].tolist(), texttemplate="%{text:.3f}", textfont={"size": 13},
            hovertemplate="%{x} after %{y}: %{text:.4f}<extra></extra>", row=1, col=col,
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
        f"{_UNITS[of]}, after each domain that was trained, in this order; colour: how "
        "far from the domain's best",
        height=260 + 50 * rows,
        above=40,
    )
