"""Measures sigma, the constant that replaces a token's own standard deviation.

A hook on a site's `hook_in` adds up what a live norm there would divide by, token by token.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from lnfree_interp.models.norms import Norm
from lnfree_interp.models.site_names import NormSite
from lnfree_interp.models.sites import get_norm
from lnfree_interp.removal.settings import OUTLIER, Statistics

Hooks = Sequence[tuple[str | Callable[[str], bool], Callable[..., object]]]
"""TransformerLens' own form: (name or filter, function of the activation and `hook`)."""

Group = Literal["ordinary", "outlier", "first", "end_of_text"]
GROUPS: tuple[Group, ...] = ("ordinary", "outlier", "first", "end_of_text")
"""Position 0; other end-of-text tokens; of the rest, at each site, those far above the others, and
the ordinary ones."""

APART: tuple[Group, ...] = ("first", "end_of_text")
"""The groups that may have a constant of their own."""

Reduce = Callable[[Tensor], Tensor]
"""Sum over the processes of a distributed run."""

Forward = Callable[[Tensor], object]
"""Runs a forward pass; only its hooks matter."""

_MEASURING_BATCH = 4


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of their standard deviation r."""

    count: float
    first: float
    """Sum of r."""
    second: float
    """Sum of r^2."""

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count, self.first + other.first, self.second + other.second
        )

    def average(self, kind: str) -> float:
        """E[r], sqrt(E[r^2]) or E[r^2] / E[r], as `Statistics.average` names them."""
        if kind == "mean":
            return self.first / self.count
        if kind == "rms":
            return (self.second / self.count) ** 0.5
        return self.second / self.first


def find_outliers(
    r: Float[Tensor, "batch pos *rest"], ordinary: Bool[Tensor, "batch pos"] | None = None
) -> Bool[Tensor, "batch pos *rest"]:
    """Which of the ordinary tokens have a scale that is `OUTLIER` times their median.

    Args:
        r: The tokens' own scales.
        ordinary: False at tokens that are special. Default: at position 0 alone.
    """
    if ordinary is None:
        ordinary = torch.ones(r.shape[:2], dtype=torch.bool, device=r.device)
        ordinary[:, 0] = False
    median = r[ordinary].median() if ordinary.any() else r.new_tensor(torch.inf)
    return (r > OUTLIER * median) & ordinary.view(*ordinary.shape, *[1] * (r.ndim - 2))


class TokenGroups:
    """The group of each token of the current batch; outliers are ordinary here."""

    def __init__(self, end_of_text: int | None):
        self.end_of_text = end_of_text
        self.of: dict[Group, Bool[Tensor, "batch pos"]] = {}

    def mark(self, tokens: Int[Tensor, "batch pos"]) -> None:
        """Set the tokens of the next forward pass."""
        first = torch.zeros_like(tokens, dtype=torch.bool)
        first[:, 0] = True
        if self.end_of_text is None:
            end_of_text = torch.zeros_like(first)
        else:
            end_of_text = (tokens == self.end_of_text) & ~first
        ordinary = ~(first | end_of_text)
        self.of = {"ordinary": ordinary, "first": first, "end_of_text": end_of_text}


class SigmaMeter:
    """Adds up the standard deviations that tokens have at some sites."""

    def __init__(
        self, model: HookedTransformer, sites: Iterable[NormSite | str], groups: TokenGroups
    ):
        self.norms: dict[str, Norm] = {str(site): get_norm(model, site) for site in sites}
        self.groups = groups
        self.sums: dict[str, Float[Tensor, "group moment"]] = {}

    def hooks(self, sites: Iterable[str] | None = None) -> list[tuple[str, Callable[..., None]]]:
        """For `model.hooks(fwd_hooks=...)`; they change nothing.

        Args:
            sites: Some of the meter's. Default: all.
        """
        return [(f"{name}.hook_in", self._add) for name in (self.norms if sites is None else sites)]

    @torch.no_grad()
    def _add(self, x: Float[Tensor, "batch pos *head d"], hook: HookPoint) -> None:
        assert hook.name is not None
        name = hook.name.removesuffix(".hook_in")
        r = self.norms[name].token_sigma(x.detach()).flatten(2)  # [batch, pos, head]
        of = self.groups.of
        far = find_outliers(r, of["ordinary"])
        members = {group: mask[..., None].expand_as(r) for group, mask in of.items()}
        members |= {"ordinary": members["ordinary"] & ~far, "outlier": far}
        in_group = torch.stack([members[group] for group in GROUPS])
        # A mask, not a product: the scale of a runaway token may be infinite.
        powers = (torch.where(in_group, r.double() ** n, 0.0) for n in range(3))
        sums = torch.stack([power.sum((1, 2, 3)) for power in powers], -1)
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def read(self, reduce: Reduce = lambda sums: sums) -> dict[str, dict[Group, Moments]]:
        """What was measured since the last reading, over all processes."""
        if not self.sums:
            return {}
        rows = reduce(torch.stack(list(self.sums.values()))).tolist()
        names, self.sums = list(self.sums), {}
        return {
            name: {group: Moments(*row) for group, row in zip(GROUPS, site, strict=True)}
            for name, site in zip(names, rows, strict=True)
        }


def common(groups: dict[Group, Moments], statistics: Statistics) -> float:
    """The sigma of all tokens or of the ordinary ones, as the recipe says."""
    together = Moments(0.0, 0.0, 0.0)
    for group in groups.values():
        together += group
    if statistics.tokens == "ordinary" and groups["ordinary"].count:
        together = groups["ordinary"]
    return together.average(statistics.average)


@torch.no_grad()
def measure(
    model: HookedTransformer,
    sites: Iterable[NormSite | str],
    tokens: Int[Tensor, "sequence pos"],
    fwd_hooks: Hooks = (),
    *,
    groups: TokenGroups | None = None,
    reduce: Reduce = lambda sums: sums,
    forward: Forward | None = None,
) -> dict[str, dict[Group, Moments]]:
    """The moments of each site's standard deviations, by group of tokens.

    Args:
        model: With norm sites.
        sites: The sites to measure, live or not.
        tokens: [sequence, pos], this process's share of the text to measure on.
        fwd_hooks: Active while measuring, as in `run_with_hooks`.
        groups: Knows the end-of-text token. Default: that of the model's tokenizer.
        reduce: Sums over processes.
        forward: Runs the model on a batch. Default: `model` itself.

    Raises:
        NormSiteError: if the model lacks a site.
    """
    groups = TokenGroups(end_of_text(model)) if groups is None else groups
    meter = SigmaMeter(model, sites, groups)
    with model.hooks(fwd_hooks=[*fwd_hooks, *meter.hooks()]):
        for batch in tokens.to(model.W_E.device).split(_MEASURING_BATCH):
            groups.mark(batch)
            model(batch, return_type=None) if forward is None else forward(batch)
    return meter.read(reduce)


def measure_sigma(
    model: HookedTransformer,
    sites: Iterable[NormSite | str],
    tokens: Int[Tensor, "sequence pos"],
    fwd_hooks: Hooks = (),
    statistics: Statistics | None = None,
) -> dict[str, float]:
    """The constant that would replace the tokens' own standard deviations at each site.

    By default the mean over all tokens of sqrt(variance + eps), as in 2507.02559; for an RMSNorm
    the root mean square instead of the standard deviation.

    Args:
        model: With norm sites.
        sites: The sites to measure.
        tokens: [sequence, pos], the text to measure on.
        fwd_hooks: Active while measuring, as in `run_with_hooks`.
        statistics: Which average, over which tokens. Default: `Statistics()`.

    Returns:
        From site name to sigma, in the units of the residual stream.

    Raises:
        NormSiteError: if the model lacks a site.

    Examples:
        >>> sites = lf.with_norm_sites(model)  # doctest: +SKIP
        >>> measure_sigma(sites, lf.list_norm_sites(sites), tokens)  # doctest: +SKIP
    """
    statistics = Statistics() if statistics is None else statistics
    found = measure(model, sites, tokens, fwd_hooks)
    return {name: common(moments, statistics) for name, moments in found.items()}


def end_of_text(model: HookedTransformer) -> int | None:
    """The token that closes a document, if the model's tokenizer has one."""
    return getattr(model.tokenizer, "eos_token_id", None)
