"""Takes a model's norms from live to frozen: which site is in which state, with which sigma."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from lnfree_interp.errors import NormSiteError, TrainingError
from lnfree_interp.models.folding import reads_stream, require_gates_without_bias
from lnfree_interp.models.site_names import NormSite, sites_in, whole_norm
from lnfree_interp.models.sites import get_norm, list_norm_sites, norm_at
from lnfree_interp.removal.recipe import Recipe
from lnfree_interp.removal.schedule import Event, last_step
from lnfree_interp.removal.statistics import (
    APART,
    Forward,
    Group,
    Hooks,
    Moments,
    Reduce,
    SigmaMeter,
    TokenGroups,
    common,
    end_of_text,
    measure,
)


class SigmaError(TrainingError):
    """A site cannot be frozen, since its constant is no positive number: the run has diverged."""


class Transition:
    """Fires a recipe's events on a model with norm sites, and keeps sigma up to date.

    `before(step)` puts each site into the state that the schedule gives it at that step, `hooks()`
    are active during the step, and `after()` takes in what they have measured.

    Attributes:
        events: The schedule, which a rollback may stretch.
        groups: Must be told the tokens of every forward pass (`groups.mark`).
    """

    def __init__(
        self,
        model: HookedTransformer,
        recipe: Recipe,
        text: Int[Tensor, "sequence pos"],
        fwd_hooks: Hooks = (),
        reduce: Reduce = lambda sums: sums,
    ):
        """A transition before its first step.

        Args:
            model: With norm sites.
            recipe: Says what happens when: its events, statistics and special tokens.
            text: The text to measure sigma on, unless it is measured on the training text.
            fwd_hooks: The user's hooks, active while sigma is measured.
            reduce: Sums over processes.

        Raises:
            NormSiteError: if an event names a site that the model lacks, that is frozen, or that
                could not be folded.
        """
        self.model, self.statistics = model, recipe.statistics
        self.follow(recipe)
        self.norms = {str(event.site): get_norm(model, event.site) for event in recipe.events}
        if frozen := [name for name, norm in self.norms.items() if not norm.live]:
            raise NormSiteError(f"{frozen[0]} is frozen already: it cannot be removed again")
        places = {name: norm_at(model, name) for name in self.norms}
        require_gates_without_bias(model.cfg, places)
        # Those that an earlier stage froze can run away too.
        every = {str(site): get_norm(model, site) for site in list_norm_sites(model)}
        self.watched = {
            name: norm for name, norm in every.items() if name in self.norms or norm.frozen
        }
        self.text, self.fwd_hooks, self.reduce = text, tuple(fwd_hooks), reduce
        self.groups = TokenGroups(end_of_text(model))
        self.estimates: dict[str, dict[Group, Moments]] = {}
        self.scales: dict[str, dict[Group, float]] = {}
        self.meter = SigmaMeter(model, self.watched, self.groups)
        self.step = 0
        self._own: dict[str, Tensor] = {}
        self._settled: set[str] = set()  # frozen before this step

    def follow(self, recipe: Recipe) -> None:
        """Follow the schedule of a recipe, which a rollback may have widened."""
        self.events: tuple[Event, ...] = recipe.events
        self.special = recipe.special

    def before(self, step: int, forward: Forward | None = None) -> dict[str, float]:
        """Put every site into the state that it has at this step.

        Args:
            step: The step that follows.
            forward: Runs the model on a batch, to measure sigma. Default: the model itself.

        Returns:
            The sites that are frozen from this step on, and their sigma.
        """
        self.step = step
        self._settled = {name for name, norm in self.norms.items() if norm.frozen}
        if not self.estimates and self.statistics.source != "event" and self.events:
            self._measure(list(self.norms), forward)
        due = [e for e in self.events if e.gate(step) < 1]
        if self.statistics.source == "event":
            new = (str(e.site) for e in due if self.norms[str(e.site)].live)
            sites = dict.fromkeys(map(self._shared, new))
            self._measure([site for site in sites if site not in self.estimates], forward)
        frozen = {}
        for event in due:
            name = str(event.site)
            norm = self.norms[name]
            was_frozen = norm.frozen
            sigma = self._sigma(name) if norm.live or self._follows(event) else norm.constant
            first = self._first(event, sigma)
            if (sigma, event.gate(step), first) != (norm.constant, norm.share_live, norm.first):
                norm.freeze(sigma, event.gate(step), first)
            if norm.frozen and not was_frozen:
                frozen[name] = sigma
        return frozen

    def hooks(self, metering: bool = False) -> list[tuple[str, Callable[..., Any]]]:
        """The forward hooks of this step: special tokens, and the meter if sigma moves.

        Args:
            metering: Measure every site, for the probes; those too that are frozen from the start.
        """
        hooks: list[tuple[str, Callable[..., Any]]] = []
        sites = [name for name, norm in self.norms.items() if not norm.live]
        if self.step < self.special.until:
            hooks += [(f"{name}.hook_sigma", self._special_scale) for name in sites]
        if self.special.cap(self.step) < math.inf:
            hooks += [(f"{name}.hook_in", self._see_scale) for name in sites]
            hooks += [(f"{name}.hook_sigma", self._capped) for name in sites]
        if metering or self._moving:
            hooks += self.meter.hooks(self.watched if metering else self.norms)
        return hooks

    def after(self) -> dict[str, dict[Group, Moments]]:
        """Take in what was measured in this step, and return it."""
        found = self.meter.read(self.reduce)
        if found and self._moving:
            for name in [name for name in found if name in self.norms]:
                new = found[name]
                old = self.estimates.get(name, new)
                self.estimates[name] = self._blend(old, new)
        return found

    def drift(self, found: Mapping[str, Mapping[Group, Moments]]) -> dict[str, float]:
        """By frozen site, the sigma of its inputs over its constant."""
        return {
            name: common(dict(groups), self.statistics) / self.watched[name].constant
            for name, groups in found.items()
            if self.watched[name].frozen
        }

    def _blend(self, old: dict[Group, Moments], new: dict[Group, Moments]) -> dict[Group, Moments]:
        """The moving average: its groups have the shares that they have in the text."""
        before, now = (sum(group.count for group in each.values()) for each in (old, new))
        if not now or not all(math.isfinite(group.second) for group in new.values()):
            return old  # a step that ran away teaches nothing
        if not before or self.statistics.source == "batch":
            return new
        # Rescaled to as many tokens, so that a batch with more of them does not count more.
        m, share = self.statistics.momentum, (1 - self.statistics.momentum) * before / now
        return {
            group: Moments(
                m * old[group].count + share * found.count,
                m * old[group].first + share * found.first,
                m * old[group].second + share * found.second,
            )
            for group, found in new.items()
        }

    @property
    def _moving(self) -> bool:
        """Whether sigma is measured on the training text at this step."""
        if self.statistics.source not in ("ema", "batch") or not self.events:
            return False
        until = self.special.until if self.statistics.follow_frozen else 0
        return self.step <= max(last_step(self.events), until)

    def _follows(self, event: Event) -> bool:
        """Whether the site's sigma may still move at this step."""
        if not self._moving:
            return False
        if self.statistics.follow_frozen:
            return True
        name = str(event.site)
        names = {name, _partner(name) if self.statistics.share_ln1 else None}
        # A step of the schedule at which it waits comes more than once.
        moving = (e for e in self.events if str(e.site) in names - self._settled)
        return any(self.step <= e.end for e in moving)

    def _shared(self, name: str) -> str:
        """The site whose sigma this one uses."""
        partner = _partner(name)
        share = self.statistics.share_ln1 and name.endswith(".ln1.v")
        return partner if share and partner in self.norms else name

    def _measure(self, sites: list[str], forward: Forward | None) -> None:
        if sites:
            hooks = [*self.fwd_hooks, *self.hooks()]
            self.estimates |= measure(
                self.model,
                sites,
                self.text,
                hooks,
                groups=self.groups,
                reduce=self.reduce,
                forward=forward,
            )
            self.meter.sums = {}

    def _sigma(self, name: str) -> float:
        """The constant of a site by its estimate; sets those of its special tokens too."""
        groups = self.estimates[self._shared(name)]
        self.scales[name] = {
            group: groups[group].average(self.statistics.average)
            for group in APART
            if groups[group].count
        }
        sigma = common(groups, self.statistics)
        if not 0 < sigma < float("inf"):
            raise SigmaError(f"the sigma of {name} is {sigma:g}")
        return sigma

    def _first(self, event: Event, sigma: float) -> float | None:
        """The constant that first tokens keep, if they keep one."""
        name, partner = str(event.site), _partner(str(event.site)) or ""
        if not reads_stream(name):
            return None
        norm, other = self.norms[name], self.watched.get(partner)
        # The halves of ln1 are one norm in the frozen form: the second takes the first one's ratio.
        if other is not None and partner not in self.norms:  # which an earlier stage froze
            return None if other.first is None else sigma * other.first / other.constant
        if not self.special.keep_first:
            return None
        follows = self._follows(event) and self.statistics.follow_frozen
        if other is not None and other.first is not None and not (norm.frozen or follows):
            return sigma * other.first / other.constant
        if norm.first is not None and not follows:
            return norm.first
        return self.scales.get(name, {}).get("first")

    def _special_scale(
        self, sigma: Float[Tensor, "batch pos *head one"], hook: HookPoint
    ) -> Float[Tensor, "batch pos *head one"]:
        """A hook on a site's `hook_sigma`."""
        assert hook.name is not None
        name, special = hook.name.removesuffix(".hook_sigma"), self.special
        until = {"first": special.first_until, "end_of_text": special.end_of_text_until}
        for group, scale in self.scales[name].items():
            kinds = special.end_of_text_kinds if group == "end_of_text" else None
            here_too = kinds is None or NormSite.parse(name).kind in kinds
            if here_too and self.step < (until[group] or 0):
                tokens = self.groups.of[group]
                tokens = tokens.view(*tokens.shape, *[1] * (sigma.ndim - 2))
                sigma = torch.where(tokens, scale, sigma)
        return sigma

    def _see_scale(self, x: Float[Tensor, "batch pos *head d"], hook: HookPoint) -> None:
        assert hook.name is not None
        name = hook.name.removesuffix(".hook_in")
        self._own[name] = self.norms[name].token_sigma(x)

    def _capped(
        self, sigma: Float[Tensor, "batch pos *head one"], hook: HookPoint
    ) -> Float[Tensor, "batch pos *head one"]:
        """A hook on a site's `hook_sigma`, behind those of other special tokens."""
        assert hook.name is not None
        r = self._own.pop(hook.name.removesuffix(".hook_sigma"))
        return torch.maximum(sigma, r.to(sigma) / self.special.cap(self.step))

    def state_dict(self) -> dict[str, Any]:
        """Plain data. The constants and gates themselves are buffers of the model."""
        return {
            "estimates": {
                name: {group: [m.count, m.first, m.second] for group, m in groups.items()}
                for name, groups in self.estimates.items()
            },
            "scales": self.scales,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, for a transition of the same recipe."""
        self.estimates = {
            name: {group: Moments(*sums) for group, sums in groups.items()}
            for name, groups in state["estimates"].items()
        }
        self.scales = {name: dict(scales) for name, scales in state["scales"].items()}


def _partner(name: str) -> str | None:
    """The other half of a block's `ln1`."""
    others = [site for site in sites_in(whole_norm(name)) if site != name]
    return others[0] if others else None
