"""Freezes sites while a text runs through the model, each with a constant measured on the way.

What a site reads depends on the sites before it. In one forward pass each site is measured and
frozen as the pass reaches it, so that every constant is measured behind the freezes before it.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.models.folding import reads_stream
from lnfree_interp.models.norms import Norm
from lnfree_interp.models.running import Edit, run_and_keep, watched
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.models.sites import get_norm
from lnfree_interp.removal.statistics import find_outliers

Apart = Literal["none", "first", "outliers"]
"""Which tokens a frozen site divides by numbers of their own: none; the first of each sequence, by
a constant; or that, and each outlier (`find_outliers`) by its own scale."""


@dataclass(frozen=True)
class Constants:
    """What a site was frozen with."""

    sigma: float
    """What tokens are divided by: the mean of their scales."""
    first: float | None
    """What the first token of a sequence is divided by; None where it is sigma."""


def measure_constants(r: Float[Tensor, "sequence pos *head one"], apart: Apart) -> Constants:
    """The constants of a site.

    Args:
        r: The tokens' own scales, of sequences of at least two: what the live norm divides them by.
        apart: Which tokens are left out of sigma.
    """
    if apart == "none":
        return Constants(r.mean().item(), None)
    others = r[:, 1:]
    kept = others[~find_outliers(r)[:, 1:]] if apart == "outliers" else others
    return Constants(kept.mean().item(), r[:, 0].mean().item())


class Freezing:
    """Sites of a model that freeze as a pass reaches them.

    Attributes:
        edits: The edits of a pass, by hook name, for `models.running`.
    """

    def __init__(
        self,
        model: HookedTransformer,
        sites: Iterable[NormSite | str],
        apart: Apart,
        *,
        measured: int | None = None,
        known: Mapping[str, Constants] | None = None,
        keep_first: bool = True,
    ):
        """Sites before a pass.

        Args:
            model: With norm sites.
            sites: The sites to freeze; frozen ones get new constants.
            apart: Which tokens are divided by numbers of their own.
            measured: How many sequences, from the first on, constants are measured on. Default:
                all.
            known: Constants that need not be measured.
            keep_first: Whether first tokens that are apart keep their constant; else they do not
                count in that of the others, and are divided by it.

        Raises:
            NormSiteError: if the model has no such site.
        """
        self._apart: Apart = apart
        self._measured, self._known, self._keep_first = measured, known or {}, keep_first
        self._own: dict[str, tuple[Tensor, Tensor]] = {}
        self.edits: dict[str, Edit] = {}
        for name in map(str, sites):
            self.edits[f"{name}.hook_in"] = partial(self._freeze, name, get_norm(model, name))
            if apart == "outliers":
                self.edits[f"{name}.hook_sigma"] = partial(self._with_own, name)

    def _freeze(self, name: str, norm: Norm, x: Tensor) -> None:
        r, found = norm.token_sigma(x), self._known.get(name)
        if found is None:
            found = measure_constants(r[: self._measured], self._apart)
        # Behind a weight there is no form that could keep the first token apart.
        keeps = self._keep_first and reads_stream(name)
        norm.freeze(found.sigma, first=found.first if keeps else None)
        if self._apart == "outliers":
            self._own[name] = find_outliers(r), r

    def _with_own(self, name: str, sigma: Tensor) -> Tensor:
        far, r = self._own.pop(name)
        return torch.where(far, r.to(sigma), sigma)


@contextmanager
def restored(norms: Iterable[Norm]) -> Iterator[None]:
    """Put norms back into the state that they were in."""
    before = [(norm, norm.constant, norm.share_live, norm.first) for norm in norms]
    try:
        yield
    finally:
        for norm, sigma, gate, first in before:
            norm.thaw()
            if gate < 1:
                norm.freeze(sigma, gate, first)


@torch.no_grad()
def freeze_in_one_pass(
    model: HookedTransformer,
    sites: Iterable[NormSite | str],
    tokens: Int[Tensor, "sequence pos"],
    *,
    first: bool = True,
) -> None:
    """Freeze sites at the means of the tokens' own scales, each measured behind those before it.

    Args:
        model: With norm sites; changed in place.
        sites: The sites to freeze.
        tokens: The text to measure on, which runs as one batch.
        first: Whether the first token of a prompt keeps a constant of its own, or has that of all
            others.

    Raises:
        NormSiteError: if the model has no such site, or a measured constant is not finite.
    """
    freezing = Freezing(model, sites, "first", keep_first=first)
    final_input(model, tokens.to(model.W_E.device), freezing.edits)


def final_input(
    model: HookedTransformer,
    x: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
    edits: Mapping[str, Edit],
    names: Iterable[str] = (),
    start_at_layer: int = 0,
) -> tuple[Float[Tensor, "batch pos d_model"], dict[str, Tensor]]:
    """What the unembedding reads, and activations that a pass computes on the way.

    Args:
        model: The model.
        x: Token ids; or the stream before `start_at_layer`.
        edits: What takes an activation's place, by hook name.
        names: Hook names of the activations to keep.
        start_at_layer: Where a stream enters.
    """
    resid, found = run_and_keep(model, x, names, model.cfg.n_layers, start_at_layer, edits)
    with watched(model, (), {name: edits[name] for name in edits if name.startswith("ln_final.")}):
        return model.ln_final(resid), found
