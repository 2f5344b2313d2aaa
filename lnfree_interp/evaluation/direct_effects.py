"""Direct logit attribution against measured direct effects.

The direct effect of a head is measured by taking its output out of the final residual stream and
running the rest of the model (final norm and unembedding) again. This is done in float64, since the
effect is a difference of two logits, and that of a weak head would be lost in their rounding. On an
LN-free model attribution and effect are equal; with a live norm, taking a part away changes the
scale of all others.

The protocol is that of 2507.02559, section on direct logit attribution, with one difference: the
target is the true next token at every position, while the published code used the current token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lnfree_interp.analysis.attribute import attribute_next_tokens
from lnfree_interp.analysis.certificates import Certificate
from lnfree_interp.analysis.components import Component, as_labels, find_components
from lnfree_interp.analysis.interventions import ablate
from lnfree_interp.analysis.levels import Level, level
from lnfree_interp.analysis.parts import Heads, expand
from lnfree_interp.analysis.positions import Positions
from lnfree_interp.analysis.prompts import batches, read_sequences
from lnfree_interp.analysis.results import CertifiedResult, Contributions
from lnfree_interp.analysis.stream import Stream
from lnfree_interp.analysis.trace import Trace, trace
from lnfree_interp.analysis.view import Model, View, view_of
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import measure_error, soft_cap


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """Attribution and measured direct effect of every head, in logits of the true next token."""

    attribution: Float[Tensor, "layer head target"]
    """[layer, head, target], in logits: what the head adds, by direct logit attribution."""
    measured: Float[Tensor, "layer head target"]
    """[layer, head, target], in logits: what the logit loses when the head's output is taken out of
    the final stream. Targets are all positions but the first, sequence after sequence."""

    @property
    def nmae_per_head(self) -> Float[Tensor, "layer head"]:
        """mean |attribution - measured| / mean |measured| over all targets; 0 for a dead head."""
        error = (self.attribution - self.measured).abs().mean(-1)
        return torch.where(error == 0, 0.0, error / self.measured.abs().mean(-1))

    @property
    def nmae(self) -> float:
        """The mean of `nmae_per_head`, which 2507.02559 reports, as a fraction."""
        return self.nmae_per_head.mean().item()

    @property
    def pooled_nmae(self) -> float:
        """One ratio over all heads and targets, dominated by heads of large effect."""
        error = (self.attribution - self.measured).abs().mean()
        return (error / self.measured.abs().mean()).item()


@dataclass(frozen=True)
class Additivity(CertifiedResult):
    """Effects of two groups of components, A and B, apart and together, in logits of the true next
    token.

    Each is a mean over targets of absolute values or absolute differences.
    """

    first: float
    """mean |effect(A)|"""
    second: float
    """mean |effect(B)|"""
    both: float
    """mean |effect(A and B)|"""
    interaction: float
    """mean |effect(A) + effect(B) - effect(A and B)|"""
    attribution_error: float
    """mean |attribution(A and B) - effect(A and B)|"""
    targets: int
    """The number of next tokens that the means are over."""
    certificate: Certificate
    """effect(A) + effect(B) = effect(A and B) = attribution, at every target."""

    @property
    def nmae(self) -> float:
        """The interaction as a fraction of the effect of both groups."""
        return self.interaction / self.both if self.both else 0.0

    def to_frame(self) -> pd.DataFrame:
        """One row: every mean, in logits, and the NMAE."""
        names = ("first", "second", "both", "interaction", "attribution_error", "targets", "nmae")
        return pd.DataFrame([{name: getattr(self, name) for name in names}])


@torch.no_grad()
def direct_effect_additivity(
    model: Model,
    tokens: Int[Tensor, "sequence pos"],
    first: str | Component | Sequence[str | Component],
    second: str | Component | Sequence[str | Component],
    *,
    by: str | Level = "head",
    batch: int = 4,
) -> Additivity:
    """Whether the effects of two groups of components add up, and equal their attribution.

    To measure an effect, a group is taken out of the final stream, and final norm and unembedding
    run again. On an LN-free model effects are additive (so Shapley values equal attribution); with
    a live norm the sum and the whole differ.

    Args:
        model: A model, LN-free or not.
        tokens: Token ids, [sequence, pos]; the target is the true next token at every position.
        first: Labels of the components of group A, such as `["L0H1", "2_mlp_out"]`.
        second: Labels of the components of group B, which must be others.
        by: The level whose components they are.
        batch: How many sequences run at once.

    Returns:
        An `Additivity` of mean absolute effects and differences, in logits of the true next token.

    Raises:
        DataError: for a component that does not exist, is named twice or is in both groups, an
            empty group, or tokens that the model cannot read.
        UnsupportedModelError: as for `attribute_next_tokens`.

    Source:
        Direct effect: arXiv 2307.15771. The test of additivity is ours: where it holds, the order
        in which components are taken out does not matter.

    Examples:
        >>> effects = lf.direct_effect_additivity(free, tokens, ["L0H1"], ["2_mlp_out"]).verify()
        >>> effects.targets
        252
        >>> lf.direct_effect_additivity(model, tokens, ["L0H1"], ["2_mlp_out"]).certificate.holds
        False
    """
    view = view_of(model)
    tokens = read_sequences(model, tokens)
    groups = [as_labels(group) for group in (first, second)]
    if common := set(groups[0]) & set(groups[1]):
        raise DataError(f"{sorted(common)[0]} is in both groups: name it in one of them only")
    if not all(groups):
        raise DataError("a group is empty: name at least one component in each")
    sums, count, worst = torch.zeros(5, dtype=torch.float64), 0, None
    held: tuple[str, ...] = ()
    for chunk in batches(tokens, batch):
        one, attributed = _attributed(view, chunk, by)
        rows = find_components([*groups[0], *groups[1]], attributed.components)
        claimed = attributed.values[rows].sum(0)
        a, b, ab = _group_effects(one, by, groups)
        sizes = (a, b, ab, a + b - ab, claimed.double() - ab)
        sums += torch.stack([x.abs().sum().cpu() for x in sizes])
        count += ab.numel()
        held = attributed.held
        scale = max(attributed.values.abs().max().item(), attributed.total.abs().max().item())
        for found in (a + b, claimed):
            error = replace(measure_error(found, ab, scale), dtype=attributed.total.dtype)
            worst = error if worst is None or not error.relative <= worst.relative else worst
    assert worst is not None
    name = "effect(A) + effect(B) = effect(A and B) = attribution"
    first_alone, second_alone, both, interaction, wrong = (sums / count).tolist()
    return Additivity(
        first_alone, second_alone, both, interaction, wrong, count, Certificate(name, worst, held)
    )


def _attributed(view: View, tokens: Tensor, by: str | Level) -> tuple[Trace, Contributions]:
    """A trace of a batch, and the attribution of its next tokens, with live norms held."""
    one = trace(view.model, tokens, attention_mask=torch.ones_like(tokens), hold=True, keep="asked")
    return one, attribute_next_tokens(one, by=by)


def _group_effects(
    one: Trace, by: str | Level, groups: Sequence[Sequence[str]]
) -> Float[Tensor, "which batch target"]:
    """What the logits lose without the first group, without the second, and without both."""
    view, at = one.view, Positions(slice(0, -1))
    stream = at.of(one.stream(view.last)).double()
    logits = _target_logits(view, one.tokens[:, 1:])
    gone = [at.of(_written(one, by, group)).double() for group in groups]
    removed, before = (*gone, gone[0] + gone[1]), logits(stream)
    return torch.stack([before - logits(stream - x) for x in removed])


def _written(one: Trace, by: str | Level, group: Sequence[str]) -> Stream:
    """What a group of components writes, measured in the model's own blocks; biases by their
    weights."""
    try:
        return ablate(one, group, by=None if isinstance(by, str) else by).gone
    except DataError:
        return expand(level(by).parts(one, one.view.last), group)[0].sum(0)


def _target_logits(
    view: View, targets: Int[Tensor, "batch target"]
) -> Callable[[Float[Tensor, "batch target d_model"]], Float[Tensor, "batch target"]]:
    """A function from a stream to the logit of one token per position, by the model's final norm
    and unembedding in float64."""
    precise = view.through_norm_in_float64("ln_final")
    W, b, cap = view.W_U.T[targets].double(), view.b_U[targets].double(), view.logit_cap

    def logits(stream: Tensor) -> Tensor:
        found = torch.linalg.vecdot(precise(stream), W) + b
        return soft_cap(found, cap)

    return logits


@torch.no_grad()
def direct_effects(
    model: Model,
    tokens: Int[Tensor, "sequence pos"],
    batch: int = 4,
    progress: bool = False,
) -> DirectEffects:
    """Attribution and measured direct effect of every head on the true next token.

    Args:
        model: A model, LN-free or not. With a live final norm the attribution holds its scale, as
            direct logit attribution always does.
        tokens: Token ids, [sequence, pos]; every position with a next token counts.
        batch: How many sequences run at once.
        progress: Whether to show a progress bar.

    Returns:
        A `DirectEffects` of two tensors [layer, head, target], in logits; `.nmae` compares them.

    Raises:
        DataError, UnsupportedModelError: as for `attribute_next_tokens`.

    Source:
        arXiv 2507.02559, section on direct logit attribution, but with the true next token as the
        target (the published code used the current token); direct effect: arXiv 2307.15771.

    Examples:
        >>> effects = lf.direct_effects(free, tokens)
        >>> effects.measured.shape
        torch.Size([4, 6, 252])
        >>> effects.nmae < 1e-3 < lf.direct_effects(model, tokens).nmae
        True
    """
    view = view_of(model)
    chunks = batches(read_sequences(model, tokens), batch)
    layers = len(chunks) * view.n_layers
    with tqdm(total=layers, desc="direct effects", unit="layer", disable=not progress) as bar:
        found = [_of_batch(view, chunk, bar) for chunk in chunks]
    attribution, measured = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return DirectEffects(attribution, measured)


def _of_batch(
    view: View, tokens: Int[Tensor, "batch pos"], bar: tqdm
) -> tuple[Float[Tensor, "layer head target"], Float[Tensor, "layer head target"]]:
    one, attributed = _attributed(view, tokens, "head")
    n_heads, at = view.cfg.n_heads, Positions(slice(0, -1))
    heads = attributed.of_kind("head").flatten(1).unflatten(0, (view.n_layers, n_heads))
    stream = at.of(one.stream(view.last)).double()
    logits = _target_logits(view, tokens[:, 1:])
    before = logits(stream)
    measured = heads.new_empty(heads.shape, dtype=torch.float64)
    for part in level("head").parts(one, view.last, at):
        if not isinstance(part, Heads):
            continue
        layer, attention = part.components[0].layer or 0, part.attention.double()
        for head in range(n_heads):
            wrote = attention.write(part.z[:, :, [head]].double(), [head])[:, :, 0]
            measured[layer, head] = (before - logits(stream - wrote)).flatten()
        bar.update()
    return heads.cpu(), measured.cpu()
