"""Is direct logit attribution what it claims to be? Attribution against measured direct effects.

The direct effect of a head is measured by taking its output out of the final residual stream and
running the rest of the model (final norm and unembedding) again, in float64: it is a difference of
two logits, and a weak head's would drown in their rounding. On an LN-free model the two are equal;
with a live norm, taking a part away changes the scale of all others.

Protocol of 2507.02559, section on direct logit attribution, with one difference: the target is the
true next token at every position; the published code took the logit of the current token.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.contributions import Component, Level, find_components
from lnfree_interp.analysis.logits import attribute_next_tokens
from lnfree_interp.analysis.parts import expand
from lnfree_interp.analysis.questions import read_blocks, split
from lnfree_interp.analysis.writes import Place, write_names, writes
from lnfree_interp.errors import DataError
from lnfree_interp.models.running import run_and_keep
from lnfree_interp.numerics import measure_error


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """Attribution and measured direct effect of every head, in logits of the true next token."""

    attribution: Float[Tensor, "layer head target"]
    """[layer, head, target], in logits: what direct logit attribution says that the head adds."""
    measured: Float[Tensor, "layer head target"]
    """[layer, head, target], in logits: what the logit loses with the head's output taken out of
    the final stream. Targets are every position but the first, block after block."""

    @property
    def nmae_per_head(self) -> Float[Tensor, "layer head"]:
        """mean |attribution - measured| / mean |measured| over all targets; 0 for a dead head."""
        error = (self.attribution - self.measured).abs().mean(-1)
        return torch.where(error == 0, 0.0, error / self.measured.abs().mean(-1))

    @property
    def nmae(self) -> float:
        """The mean of `nmae_per_head`: the published headline, as a fraction."""
        return self.nmae_per_head.mean().item()

    @property
    def pooled_nmae(self) -> float:
        """One ratio over all heads and targets, which heads of large effect dominate."""
        error = (self.attribution - self.measured).abs().mean()
        return (error / self.measured.abs().mean()).item()


@dataclass(frozen=True)
class Additivity:
    """Effects of two groups of components, apart and together, in logits of the true next token.

    Each is a mean over targets of absolute values; `gap` of absolute differences.
    """

    first: float
    """mean |effect(A)|"""
    second: float
    """mean |effect(B)|"""
    both: float
    """mean |effect(A and B)|"""
    gap: float
    """mean |effect(A) + effect(B) - effect(A and B)|"""
    attribution_gap: float
    """mean |attribution(A and B) - effect(A and B)|"""
    targets: int
    """How many next tokens the means are over."""
    certificate: Certificate
    """effect(A) + effect(B) = effect(A and B) = attribution, at every target."""

    @property
    def nmae(self) -> float:
        """The gap in units of the effect of both."""
        return self.gap / self.both if self.both else 0.0

    def verify(self, tolerance: float | None = None) -> "Additivity":
        """Return self if the effects add up, and to the attribution.

        Raises:
            InexactError: if they do not.
        """
        self.certificate.require(tolerance)
        return self


@torch.no_grad()
def direct_effect_additivity(
    model: HookedTransformer,
    tokens: Int[Tensor, "blocks pos"],
    first: str | Component | Sequence[str | Component],
    second: str | Component | Sequence[str | Component],
    *,
    by: Level = "head",
    batch: int = 4,
) -> Additivity:
    """Whether the effects of two groups of components add up, and to their attribution.

    Measured: each group is taken out of the final stream, and final norm and unembedding are run
    again. On an LN-free model effects are additive (so Shapley values equal attribution); with a
    live norm the sum and the whole differ.

    Args:
        model: LN-free or not.
        tokens: [blocks, pos]; the target is the true next token at every position.
        first: Labels of components, e.g. `["L0H1", "2_mlp_out"]`.
        second: Other ones.
        by: The level at which they are components.
        batch: Blocks per forward pass.

    Returns:
        An `Additivity` of mean absolute effects and gaps, in logits of the true next token.

    Raises:
        DataError: for a component that does not exist, is named twice or is in both groups, an
            empty group, or tokens that the model cannot read.
        UnsupportedModelError: as `attribute_next_tokens`.

    Source:
        Direct effect: arXiv 2307.15771. The test of additivity is ours: where it holds, the order
        in which components are taken out is of no consequence.

    Examples:
        >>> effects = lf.direct_effect_additivity(free, tokens, ["L0H1"], ["2_mlp_out"]).verify()
        >>> effects.targets
        252
        >>> lf.direct_effect_additivity(model, tokens, ["L0H1"], ["2_mlp_out"]).certificate.holds
        False
    """
    tokens = read_blocks(model, tokens)
    groups = [_names(group) for group in (first, second)]
    if common := set(groups[0]) & set(groups[1]):
        raise DataError(f"{sorted(common)[0]} is in both groups")
    if not all(groups):
        raise DataError("each group needs a component")
    sums, count, worst = torch.zeros(5, dtype=torch.float64), 0, None
    for chunk in split(tokens, batch):
        attributed = attribute_next_tokens(model, chunk, by=by, frozen_scale=True)
        rows = find_components([*groups[0], *groups[1]], attributed.components)
        claimed = attributed.values[rows].sum(0)
        effects = _group_effects(model, chunk, by, groups)
        a, b, ab = effects
        sizes = (a, b, ab, a + b - ab, claimed.double() - ab)
        sums += torch.stack([x.abs().sum().cpu() for x in sizes])
        count += ab.numel()
        scale = max(attributed.values.abs().max().item(), attributed.total.abs().max().item())
        for found in (a + b, claimed):
            error = replace(measure_error(found, ab, scale), dtype=attributed.total.dtype)
            worst = error if worst is None or not error.relative <= worst.relative else worst
    assert worst is not None
    certificate = Certificate("effect(A) + effect(B) = effect(A and B) = attribution", worst)
    first_alone, second_alone, both, gap, attribution_gap = (sums / count).tolist()
    return Additivity(first_alone, second_alone, both, gap, attribution_gap, count, certificate)


def _group_effects(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"],
    by: Level,
    groups: Sequence[Sequence[str]],
) -> Float[Tensor, "which batch target"]:
    """What the logit loses without the first group, the second, and both."""
    place = Place.last(model)
    names = {*write_names(model, by, place), place.hook}
    _, cache = run_and_keep(model, tokens, names, model.cfg.n_layers)
    stream, logits = cache[place.hook][:, :-1].double(), _target_logits(model, tokens[:, 1:])
    parts = list(writes(model, cache, by, place, slice(0, -1)))
    gone = [expand(parts, group)[0].double().sum(0) for group in groups]
    removed, before = (*gone, gone[0] + gone[1]), logits(stream)
    return torch.stack([before - logits(stream - x) for x in removed])


def _target_logits(
    model: HookedTransformer, targets: Int[Tensor, "batch target"]
) -> Callable[[Float[Tensor, "batch target d_model"]], Float[Tensor, "batch target"]]:
    """What the model's final norm and unembedding make of a stream, for one token per position."""
    norm: Any = None
    if model.cfg.normalization_type is not None:
        norm = copy.deepcopy(model.ln_final).double()
        if hasattr(norm, "cfg"):  # TransformerLens' own cast their output to its dtype
            norm.cfg = replace(norm.cfg, dtype=torch.float64)
        norm.dtype = torch.float64
    W, b, cap = model.W_U.T[targets], model.b_U[targets], model.cfg.output_logits_soft_cap
    W, b = W.double(), b.double()

    def logits(stream: Tensor) -> Tensor:
        found = torch.linalg.vecdot(stream if norm is None else norm(stream), W) + b
        return cap * torch.tanh(found / cap) if cap > 0 else found

    return logits


def _names(group: str | Component | Sequence[str | Component]) -> list[str]:
    given = [group] if isinstance(group, str | Component) else group
    return [one if isinstance(one, str) else one.label for one in given]


@torch.no_grad()
def direct_effects(
    model: HookedTransformer,
    tokens: Int[Tensor, "blocks pos"],
    batch: int = 4,
    progress: bool = False,
) -> DirectEffects:
    """Attribution and measured direct effect of every head on the true next token.

    Args:
        model: LN-free or not; with a live final norm the attribution holds its scale, as
            direct logit attribution always does there.
        tokens: [blocks, pos]. Every position with a next token counts.
        batch: Blocks per forward pass.
        progress: Whether to show a progress bar.

    Returns:
        A `DirectEffects` of two tensors [layer, head, target], in logits; `.nmae` compares them.

    Raises:
        DataError, UnsupportedModelError: as `attribute_next_tokens`.

    Source:
        arXiv 2507.02559, section on direct logit attribution, but with the true next token as the
        target (the published code took the current one); direct effect: arXiv 2307.15771.

    Examples:
        >>> effects = lf.direct_effects(free, tokens)
        >>> effects.measured.shape
        torch.Size([4, 6, 252])
        >>> effects.nmae < 1e-3 < lf.direct_effects(model, tokens).nmae
        True
    """
    tokens = read_blocks(model, tokens)
    layers = len(split(tokens, batch)) * model.cfg.n_layers
    with tqdm(total=layers, desc="direct effects", unit="layer", disable=not progress) as bar:
        chunks = [_of_batch(model, chunk, bar) for chunk in split(tokens, batch)]
    attribution, measured = (torch.cat(parts, dim=-1) for parts in zip(*chunks, strict=True))
    return DirectEffects(attribution, measured)


def _of_batch(
    model: HookedTransformer, tokens: Int[Tensor, "batch pos"], bar: tqdm
) -> tuple[Float[Tensor, "layer head target"], Float[Tensor, "layer head target"]]:
    attribution = attribute_next_tokens(model, tokens, by="head", frozen_scale=True)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    heads = attribution.of_kind("head").flatten(1).unflatten(0, (n_layers, n_heads))

    resid_name = f"blocks.{n_layers - 1}.hook_resid_post"
    wanted = {resid_name, *(f"blocks.{layer}.attn.hook_z" for layer in range(n_layers))}
    _, cache = run_and_keep(model, tokens, wanted, n_layers)
    resid, logits = cache[resid_name][:, :-1].double(), _target_logits(model, tokens[:, 1:])
    before = logits(resid)
    measured = heads.new_empty(heads.shape, dtype=torch.float64)
    for layer, block in enumerate(model.blocks):
        z, W_O = cache[f"blocks.{layer}.attn.hook_z"][:, :-1].double(), block.attn.W_O.double()
        for head in range(n_heads):
            without = logits(resid - z[:, :, head] @ W_O[head])
            measured[layer, head] = (before - without).flatten()
        bar.update()
    return heads.cpu(), measured.cpu()
