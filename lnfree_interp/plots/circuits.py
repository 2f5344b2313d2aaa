"""Interactive views of circuitsvis: tokens and attention heads.

Each carries its own copy of circuitsvis' script, 1.3 MB, and needs JavaScript. Use few in a
notebook, and use `plots.attribution` or `plots.pattern` for pictures to keep. Nothing is loaded
from the network, which circuitsvis itself tries first.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from circuitsvis.attention import attention_heads
from circuitsvis.tokens import colored_tokens
from circuitsvis.utils.render import RenderedHTML
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.affine import AffineMap
from lnfree_interp.analysis.counterfactual import CounterfactualPattern
from lnfree_interp.plots.style import LOWERS, RAISES

_LESS = "\ue000"
"""Stands for "<" until the page is made, so that no token closes the script that contains it."""


@dataclass(frozen=True)
class View:
    """HTML that a notebook shows."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def tokens(result: AffineMap) -> View:
    """The prompt's tokens, coloured by their share of the logit.

    Args:
        result: What `affine_map` returned.

    Returns:
        A `View`, which a notebook shows, of shares in logits; blue raises the logit, red lowers it.

    Examples:
        >>> view = lf.plots.circuits.tokens(lf.affine_map(free, "for i in", " range"))
        >>> "circuits-vis" in view.html
        True
    """
    values = result.by_token.double()
    largest = float(values.abs().max()) or 1.0
    return _view(
        colored_tokens(
            tokens=_guarded(result.contributions.prompts[0]),
            values=values,
            min_value=-largest,
            max_value=largest,
            negative_color=LOWERS,
            positive_color=RAISES,
        )
    )


def heads(result: CounterfactualPattern) -> View:
    """A head's original pattern and the pattern without the components, to hover over.

    Args:
        result: What `counterfactual_pattern` returned.

    Returns:
        A `View` of two patterns [query, key], which a notebook shows.

    Examples:
        >>> without = lf.counterfactual_pattern(free, "for i in range", 1, 0, ["L0H0"])
        >>> "L1H0 without L0H0" in lf.plots.circuits.heads(without).html
        True
    """
    without = ", ".join(result.without)
    patterns: Float[Tensor, "which query key"] = torch.stack([result.original, result.pattern])
    return _view(
        attention_heads(
            attention=patterns,
            tokens=_guarded(result.tokens),
            attention_head_names=[result.head.label, f"{result.head.label} without {without}"],
        )
    )


def _guarded(tokens: Sequence[str]) -> list[str]:
    return [token.replace("<", _LESS) for token in tokens]


def _view(rendered: RenderedHTML) -> View:
    page = rendered.local_src
    return View(page.replace(json.dumps(_LESS)[1:-1], "\\u003c").replace(_LESS, "\\u003c"))
