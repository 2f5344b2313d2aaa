"""What each norm costs: the loss that a model gains when one of its sites is frozen, untrained."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, SupportsIndex

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.prompts import read_sequences
from lnfree_interp.analysis.results import read_top
from lnfree_interp.analysis.stream import Place
from lnfree_interp.analysis.view import remember_site_costs
from lnfree_interp.data.named import spread
from lnfree_interp.errors import DataError, NormSiteError
from lnfree_interp.models.loss import entropy_of, loss_of
from lnfree_interp.models.running import Edit
from lnfree_interp.models.site_names import NormSite, name_sites
from lnfree_interp.models.sites import get_norm, live_sites, with_norm_sites
from lnfree_interp.numerics import soft_cap, wide
from lnfree_interp.removal.freezing import (
    Apart,
    Constants,
    Freezing,
    final_input,
    measure_constants,
    restored,
)
from lnfree_interp.removal.statistics import find_outliers

_MATTERS = 0.1
"""In nats per token."""

_POSITIONS = 256
"""Positions whose logits are computed at once."""


@dataclass(frozen=True)
class Cost:
    """What freezing adds, on the tokens that it was measured on."""

    loss: float
    """Cross-entropy added, in nats per token."""
    divergence: float
    """KL divergence of the predictions from the live model's, in nats per token."""
    agreement: float
    """The share of tokens whose most likely next token stays the same."""


@dataclass(frozen=True, eq=False)
class SiteSensitivity:
    """What each norm site of a model costs, frozen alone and together.

    Attributes:
        loss: Cross-entropy of the live model, in nats per token.
        alone: By site, its cost when it alone divides all tokens by one constant.
        first_apart: The same with a constant of its own for the first token of each sequence.
        outliers_apart: The same with each token that is far above the others divided by its own
            scale; what is left is the cost of the ordinary tokens.
        outliers: By site, the share of tokens but the first that are far above the others.
        together: The sites in the order of cost, each with the cost of freezing it and all before
            it, the first token apart; every constant is measured anew behind the freezes before it.
        n_tokens: How many predictions were measured.
    """

    loss: float
    alone: dict[NormSite, Cost]
    first_apart: dict[NormSite, Cost]
    outliers_apart: dict[NormSite, Cost]
    outliers: dict[NormSite, float]
    together: dict[NormSite, Cost]
    n_tokens: int

    @property
    def order(self) -> tuple[NormSite, ...]:
        """The sites, the cheapest first, by what they cost alone with the first token apart."""
        return _by_cost(self.first_apart)

    @property
    def first_matters(self) -> bool:
        """Whether first tokens need a constant of their own: at some site it saves 0.1 nats of KL
        divergence or more."""
        return any(
            not cost.divergence - self.first_apart[site].divergence < _MATTERS
            for site, cost in self.alone.items()
        )

    def cheapest(self, budget: float) -> tuple[NormSite, ...]:
        """As many sites as can be frozen together within a budget, in the order of cost.

        Args:
            budget: Cross-entropy that may be added, in nats per token.
        """
        found: list[NormSite] = []
        for site, cost in self.together.items():
            if not cost.loss <= budget:
                break
            found.append(site)
        return tuple(found)

    def select(self, sites: Iterable[NormSite]) -> "SiteSensitivity":
        """The costs of some of the sites. What they cost together was not measured: it is empty.

        Raises:
            NormSiteError: if a site was not measured.
        """
        wanted = set(sites)
        if missing := sorted(map(str, wanted - self.alone.keys())):
            more = f", nor that of {len(missing) - 1} more" if missing[1:] else ""
            raise NormSiteError(f"what {missing[0]} costs was not measured{more}")
        if wanted == self.alone.keys():
            return self
        alone, first_apart, outliers_apart = (
            {site: cost for site, cost in costs.items() if site in wanted}
            for costs in (self.alone, self.first_apart, self.outliers_apart)
        )
        outliers = {site: share for site, share in self.outliers.items() if site in wanted}
        return replace(
            self, alone=alone, first_apart=first_apart, outliers_apart=outliers_apart,
            outliers=outliers, together={},
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes the same."""
        plain: dict[str, Any] = {"loss": self.loss, "n_tokens": self.n_tokens}
        plain["outliers"] = {str(site): share for site, share in self.outliers.items()}
        for name in _COSTS:
            costs: Mapping[NormSite, Cost] = getattr(self, name)
            plain[name] = {str(site): list(astuple(cost)) for site, cost in costs.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "SiteSensitivity":
        """What `to_json` described.

        Raises:
            DataError: if it is something else.
        """
        try:
            costs: dict[str, Any] = {
                name: {NormSite.parse(site): Cost(*cost) for site, cost in plain[name].items()}
                for name in _COSTS
            }
            outliers = {NormSite.parse(site): share for site, share in plain["outliers"].items()}
            return cls(loss=plain["loss"], n_tokens=plain["n_tokens"], outliers=outliers, **costs)
        except (AttributeError, KeyError, TypeError, ValueError, NormSiteError) as error:
            raise DataError(f"these are not costs of norm sites: {error!r:.100}") from error

    def to_frame(self) -> pd.DataFrame:
        """A row for each site in the order of computation: `site`; `alone`, `first_apart`,
        `outliers_apart` and `together`, in nats per token; `divergence` and `agreement` with the
        first token apart; and `outliers`, a share of tokens."""
        rows = [
            {
                "site": str(site), "alone": cost.loss,
                "first_apart": self.first_apart[site].loss,
                "outliers_apart": self.outliers_apart[site].loss,
                "divergence": self.first_apart[site].divergence,
                "agreement": self.first_apart[site].agreement,
                "outliers": self.outliers[site],
                "together": self.together[site].loss if site in self.together else float("nan"),
            }
            for site, cost in self.alone.items()
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def top(self, k: SupportsIndex = 10) -> pd.DataFrame:
        """The k sites that cost most alone, with the first token apart.

        Raises:
            DataError: if k is less than one.
        """
        frame = self.to_frame().sort_values("first_apart", ascending=False, na_position="first")
        return frame.head(read_top(k, len(frame))).reset_index(drop=True)

    def __repr__(self) -> str:
        worst = self.order[-1]
        free = sum(cost.loss <= 0.02 for cost in self.first_apart.values())
        return (
            f"SiteSensitivity({len(self.alone)} sites on {self.n_tokens:,} tokens of loss "
            f"{self.loss:.3f}: {free} cost at most 0.02 nats alone, {worst} most with "
            f"{self.first_apart[worst].loss:+.2f}; {len(self.cheapest(0.1))} together within 0.1)"
        )


_COSTS = ("alone", "first_apart", "outliers_apart", "together")


def _by_cost(costs: Mapping[NormSite, Cost]) -> tuple[NormSite, ...]:
    """The cheapest first; what is not finite last."""

    def key(site: NormSite) -> float:
        loss = costs[site].loss
        return loss if math.isfinite(loss) else math.inf

    return tuple(sorted(costs, key=key))


class _Text:
    """Predictions on a text, compared with those of the live model."""

    def __init__(self, model: HookedTransformer, tokens: Tensor, normalised: Tensor):
        self.model, self.targets = model, tokens[:, 1:].flatten().to(normalised.device)
        self.live, self.best, entropies, losses = [], [], [], []
        for logits, targets in self._pieces(normalised):
            log_p = logits.log_softmax(-1)
            losses.append(loss_of(log_p, targets))
            entropies.append(entropy_of(log_p))
            self.live.append(log_p.exp())
            self.best.append(log_p.argmax(-1))
        self.loss = torch.cat(losses).double().mean().item()
        self.entropy = torch.cat(entropies).double().mean().item()

    def _pieces(self, normalised: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits of a few predictions at a time, [token, d_vocab], and what they predict."""
        cap, every = self.model.cfg.output_logits_soft_cap, normalised[:, :-1].flatten(0, 1)
        for some, targets in zip(
            every.split(_POSITIONS), self.targets.split(_POSITIONS), strict=True
        ):
            yield wide(soft_cap(self.model.unembed(some[None])[0], cap)), targets

    def cost(self, normalised: Tensor) -> Cost:
        """What predictions from another input of the unembedding cost."""
        loss, crossed, agrees, n = 0.0, 0.0, 0, len(self.targets)
        for (logits, targets), live, best in zip(
            self._pieces(normalised), self.live, self.best, strict=True
        ):
            total = logits.logsumexp(-1)  # log p = logits - total, without a table of them
            loss += (total - logits.gather(-1, targets[:, None])[:, 0]).double().sum().item()
            crossed += (total - torch.linalg.vecdot(live, logits)).double().sum().item()
            agrees += int((logits.argmax(-1) == best).sum())
        return Cost(loss / n - self.loss, crossed / n - self.entropy, agrees / n)


@torch.no_grad()
def site_sensitivity(
    model: HookedTransformer,
    text: Int[Tensor, "sequence pos"],
    sites: Iterable[NormSite | str] | None = None,
    *,
    stop_above: float = 3.0,
    progress: bool = True,
) -> SiteSensitivity:
    """What each norm costs: loss and KL divergence when its site is frozen, without training.

    Each site is frozen alone, and all together in the order of cost. Constants are the means of the
    tokens' own scales on every fourth sequence; the costs are measured on the others.

    Args:
        model: A model with live norms. It does not change, but the costs are kept with it, so that
            refusals can name them.
        text: Token ids [sequence, pos], such as `pack(...)`, at least two sequences. It runs in
            one batch, and the probabilities of the part that costs are measured on are kept, 4
            bytes for each token and entry of the vocabulary.
        sites: The sites to measure. Default: all that are live.
        stop_above: Stop freezing together when so many nats per token have been added.
        progress: Whether to show a progress bar.

    Returns:
        A `SiteSensitivity`; `lf.plots.site_sensitivity(...)` draws it, and `.cheapest(budget)`
            lists the sites that can be frozen together.

    Raises:
        NormSiteError: if a site is not one of the model, or not live.
        DataError: if the model cannot read the text, or it has one sequence only.
        UnsupportedModelError: if the model's norms cannot be frozen one by one.

    Source:
        Ours. That a few norms cost more than all others: where massive activations (arXiv
        2402.17762) are made and read.

    Examples:
        >>> costs = lf.site_sensitivity(model, tokens, progress=False)
        >>> costs.to_frame().shape
        (13, 8)
        >>> costs.top(1).columns.tolist()[:3]
        ['site', 'alone', 'first_apart']
    """
    tokens = read_sequences(model, text, packed=True)
    if len(tokens) < 2:
        raise DataError(
            "a text of one sequence was given: give at least two, of which one in four measures "
            "the constants and the others the costs"
        )
    sited = with_norm_sites(model, copy_weights=False)
    chosen = _live(sited, sites)
    measured = max(1, len(tokens) // 4)
    rows = set(spread(torch.arange(len(tokens))[:, None], measured).flatten().tolist())
    tokens = tokens[sorted(range(len(tokens)), key=lambda row: row not in rows)]
    found = _measure(sited, tokens, measured, chosen, stop_above, progress)
    remember_site_costs(model, {str(site): cost.loss for site, cost in found.first_apart.items()})
    return found


def _live(model: HookedTransformer, sites: Iterable[NormSite | str] | None) -> list[NormSite]:
    live = live_sites(model)
    if sites is None:
        return list(live)
    chosen = [site if isinstance(site, NormSite) else NormSite.parse(site) for site in sites]
    if wrong := [site for site in chosen if site not in live]:
        raise NormSiteError(
            f"{wrong[0]} is not a live norm site of the model: give some of "
            f"{name_sites(map(str, live))}"
        )
    return sorted(dict.fromkeys(chosen), key=lambda site: site.order)


def _measure(
    model: HookedTransformer,
    tokens: Int[Tensor, "sequence pos"],
    measured: int,
    sites: list[NormSite],
    stop_above: float,
    progress: bool,
) -> SiteSensitivity:
    places = [Place(layer).hook for layer in range(model.cfg.n_layers + 1)]
    constants: dict[Apart, dict[str, Constants]] = {"none": {}, "first": {}, "outliers": {}}
    outliers: dict[NormSite, float] = {}

    def measuring(site: NormSite) -> Edit:
        def measure(x: Tensor) -> None:
            r = get_norm(model, site).token_sigma(x)
            for apart, found in constants.items():
                found[str(site)] = measure_constants(r[:measured], apart)
            outliers[site] = find_outliers(r)[:, 1:].double().mean().item()

        return measure

    looks = {f"{site}.hook_in": measuring(site) for site in sites}
    normalised, streams = final_input(model, tokens, looks, places)
    text = _Text(model, tokens[measured:], normalised[measured:])

    def start(site: NormSite) -> int:
        return model.cfg.n_layers if site.layer is None else site.layer

    def alone(site: NormSite, apart: Apart) -> Cost:
        freezing = Freezing(model, [site], apart, known=constants[apart])
        layer = start(site)
        with restored([get_norm(model, site)]):
            stream = streams[places[layer]][measured:]
            return text.cost(final_input(model, stream, freezing.edits, (), layer)[0])

    costs: dict[Apart, dict[NormSite, Cost]] = {apart: {} for apart in constants}
    with tqdm(total=2 * len(sites), desc="freezing", unit="site", disable=not progress) as bar:
        for site in sites:
            bar.set_postfix_str(f"{site} alone")
            costs["none"][site], costs["first"][site] = alone(site, "none"), alone(site, "first")
            far = outliers[site] > 0
            costs["outliers"][site] = alone(site, "outliers") if far else costs["first"][site]
            bar.update()
        together: dict[NormSite, Cost] = {}
        frozen: list[NormSite] = []
        for site in _by_cost(costs["first"]):
            bar.set_postfix_str(f"{len(frozen) + 1} together")
            frozen.append(site)
            layer = start(site)
            behind = [one for one in frozen if start(one) >= layer]
            freezing = Freezing(model, behind, "first", measured=measured)
            normalised, found = final_input(
                model, streams[places[layer]], freezing.edits, places[layer + 1 :], layer
            )
            streams |= found
            together[site] = text.cost(normalised[measured:])
            bar.update()
            if not together[site].loss <= stop_above:
                break
    return SiteSensitivity(
        text.loss, costs["none"], costs["first"], costs["outliers"],
        outliers, together, len(text.targets),
    )  # fmt: skip
