"""Which numbers about the residual stream are about the model's function.

Without norms the stream can be written in any basis: for every invertible M, writers W M and
readers M^-1 W give the same function. What depends on the basis (the norm of an activation, a
cosine between two, the proximity of a part to the whole) is a fact about the parametrisation and
not about the function. Attributions, scores, paths and virtual weights do not depend on the basis.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from lnfree_interp.analysis.view import view_of
from lnfree_interp.errors import DataError, UnsupportedModelError
from lnfree_interp.models.agreement import compare_logits
from lnfree_interp.models.folding import is_reader, writes_to_stream
from lnfree_interp.numerics import TOLERANCE, MeasuredError

Metric = Callable[[HookedTransformer], float | int | Tensor]


@torch.no_grad()
def random_gauge(
    model: HookedTransformer,
    *,
    kind: Literal["general", "orthogonal"] = "general",
    spread: float = 2.0,
    seed: int = 0,
) -> HookedTransformer:
    """The same function in another basis of the residual stream.

    Args:
        model: An LN-free, folded `HookedTransformer`.
        kind: `"general"`: any invertible matrix. `"orthogonal"`: rotations and reflections only.
        spread: The largest factor by which a direction is stretched or shrunk, if `kind` is
            `"general"`.
        seed: The seed of the random matrix.

    Returns:
        A new model; its logits were compared with those of the given model.

    Raises:
        UnsupportedModelError: if the model has norms, whose mean and standard deviation belong to
            one basis; if it has hooks, or its stream is not the plain sum of its parts.
        DataError: if `spread` is not between 1 and 1000, or `kind` is neither of the two.
        InexactError: if the logits differ by more than rounding explains.

    Source:
        Rotations: arXiv 2401.15024. Ours: any invertible matrix, which needs a model without
        norms.

    Examples:
        >>> turned = lf.random_gauge(free)
        >>> turned.W_E.allclose(free.W_E)
        False
        >>> _ = lf.compare_logits(turned, free).require("the same logits")
    """
    view_of(model)
    if model.cfg.normalization_type is not None:
        raise UnsupportedModelError(
            "a model with norms, even constant ones, has no such symmetry: call fold(model) first"
        )
    if not 1 < spread < 1e3 or kind not in ("general", "orthogonal"):
        raise DataError(
            f"spread={spread} and kind={kind!r}: give a spread between 1 and 1000, and 'general' "
            "or 'orthogonal' as kind"
        )
    if any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values()):
        raise UnsupportedModelError("the model has hooks: call model.reset_hooks() first")
    generator = torch.Generator().manual_seed(seed)
    d_model = model.cfg.d_model
    left, right = (
        torch.linalg.qr(torch.randn(d_model, d_model, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    stretch = torch.ones(d_model, dtype=torch.float64)
    if kind == "general":
        stretch = spread ** (2 * torch.rand(d_model, generator=generator, dtype=torch.float64) - 1)
    M = (left * stretch @ right).to(model.W_E.device)
    back = (right.T / stretch @ left.T).to(model.W_E.device)
    turned = copy.deepcopy(model)
    for name, W in turned.named_parameters():
        if writes_to_stream(name):
            W.copy_(W.double() @ M)
        elif is_reader(name):
            W.copy_(back @ W.double())
    compare_logits(turned, model).require("the model in another basis against itself")
    return turned


@dataclass(frozen=True)
class GaugeReport:
    """Whether a metric of an LN-free model is about its function."""

    error: MeasuredError
    """The largest change of a number between bases, relative to that number (for a number that is
    close to zero, relative to what rounding explains for the largest number)."""
    bases: int
    """How many other bases were tried."""
    kind: str
    """`"general"` or `"orthogonal"`, as in `random_gauge`."""

    @property
    def invariant(self) -> bool:
        """Whether the metric is the same in every basis, up to rounding."""
        return self.error.relative <= 10 * TOLERANCE[self.error.dtype]

    def __str__(self) -> str:
        if self.invariant:
            return f"does not depend on the basis: {self.error} over {self.bases} bases"
        return (
            f"DEPENDS on the basis of the residual stream: changed by {self.error.relative:.0%} "
            f"over {self.bases} bases, while the logits did not change. It is about the "
            "parametrisation, not about the function"
        )


def gauge_check(
    metric: Metric,
    model: HookedTransformer,
    *,
    bases: int = 3,
    kind: Literal["general", "orthogonal"] = "general",
    seed: int = 0,
) -> GaugeReport:
    """Whether a metric of a model is about its function, not about its parametrisation.

    Args:
        metric: A function from a model to a number or a tensor of numbers. It gets the model in
            float64, unless it cannot compute with that.
        model: An LN-free, folded `HookedTransformer`.
        bases: How many random bases to try.
        kind: As in `random_gauge`. A metric that changes in `"general"` bases but not in
            `"orthogonal"` ones is a fact about the basis that training found.
        seed: The seed of the first basis; the others have the seeds that follow.

    Returns:
        The largest change of a number over the bases, relative to that number, and whether
        rounding explains it.

    Raises:
        DataError: if the metric gives no numbers, nan, or numbers of another shape in another
            basis; if `bases` is less than one.
        UnsupportedModelError, InexactError: as for `random_gauge`.

    Source:
        Ours: a fact about the function is the same in every basis of `random_gauge`.

    Examples:
        >>> def norm(model):
        ...     last = model.run_with_cache(tokens)[1]["blocks.3.hook_resid_post"]
        ...     return last.norm(dim=-1).mean()
        >>> print(lf.gauge_check(norm, free, bases=1))
        DEPENDS on the basis of the residual stream: changed by ...
        >>> lf.gauge_check(norm, free, bases=1, kind="orthogonal").invariant
        True
    """
    if bases < 1:
        raise DataError(f"bases={bases}: give how many bases to try, at least 1")
    dtype, precise = model.cfg.dtype, copy.deepcopy(model)
    precise.to(torch.float64, print_details=False)
    try:  # in float64, so that rounding errors do not look like changes of small numbers
        expected = _numbers(metric(precise))
        model = precise
    except RuntimeError:  # the metric has tensors of its own in the model's dtype
        expected = _numbers(metric(model))
    worst: MeasuredError | None = None
    for index in range(bases):
        found = _numbers(metric(random_gauge(model, kind=kind, seed=seed + index)))
        if found.shape != expected.shape:
            raise DataError(
                f"the metric gave numbers of shape {list(expected.shape)}, then of shape "
                f"{list(found.shape)}: give a metric whose shape is the same in every basis"
            )
        error = _change(found, expected, dtype)
        worst = error if worst is None or not error.relative <= worst.relative else worst
    assert worst is not None
    return GaugeReport(worst, bases, kind)


def _change(found: Tensor, expected: Tensor, dtype: torch.dtype) -> MeasuredError:
    """The change of each number relative to its own size: a large number would hide the change of a
    small one."""
    if found.isnan().any() or expected.isnan().any():
        raise DataError("the metric gave nan: give a metric that is a number in every basis")
    if not found.is_floating_point():
        changed = (found != expected).any().item()
        return MeasuredError(float(changed), float(changed), torch.float64)
    found, expected = found.double(), expected.double()
    size = expected.abs()
    # A number below this share of the largest is no more than rounding errors.
    floor = size.max() * TOLERANCE[dtype]
    change = (found - expected).abs()
    relative = torch.where(change == 0, 0.0, change / torch.maximum(size, floor))
    return MeasuredError(change.max().item(), relative.max().item(), dtype)


def _numbers(value: float | int | Tensor) -> Tensor:
    try:
        numbers = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the metric gave {value!r:.60}: a metric gives a number or a tensor of numbers"
        ) from error
    if numbers.numel() == 0:
        raise DataError("the metric gave no numbers: it must give at least one")
    return numbers
