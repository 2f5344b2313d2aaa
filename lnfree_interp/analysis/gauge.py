"""Which numbers about the residual stream mean something.

Without norms the stream can be written in any basis: for every invertible M, writers W M and
readers M^-1 W give the same model. What depends on the basis (a norm of an activation, a cosine
between two, the proximity of a part to the whole) is a fact about the parametrisation and not about
the function. Attributions, scores, paths and virtual weights do not depend on it.
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
from lnfree_interp.models.folding import is_reader
from lnfree_interp.models.norm_conversions import writes_to_stream
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
        model: LN-free and folded.
        kind: Any invertible matrix, or rotations and reflections only.
        spread: Largest factor by which a direction is stretched or shrunk, if `kind` is
            `"general"`.
        seed: Of the matrix.

    Returns:
        A new model whose logits have been compared with the given one's.

    Raises:
        UnsupportedModelError: if the model has norms: a mean and a standard deviation are read in
            one basis only. Also if it has hooks, or its stream has other parts.
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
            f"spread={spread} must lie in 1..1000, kind={kind!r} be general or orthogonal"
        )
    if any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values()):
        raise UnsupportedModelError("the model has hooks: model.reset_hooks() first")
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
    """Whether a metric means something on an LN-free model."""

    error: MeasuredError
    """Largest change of a number between bases, relative to that number (or, for one that is
    next to nothing, to what rounding of the largest leaves)."""
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
            return f"does not depend on the basis: {self.error} over {self.bases} of them"
        return (
            f"DEPENDS on the basis of the residual stream: changed by {self.error.relative:.0%} "
            f"over {self.bases} of them, while the logits stayed. It says something about the "
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
    """Whether a number that you quote about a model is about its function.

    Args:
        metric: From a model to a number or a tensor of numbers. It gets the model in float64,
            unless it cannot compute with that.
        model: LN-free and folded.
        bases: How many random bases to try.
        kind: As in `random_gauge`; a metric that only `"orthogonal"` ones leave alone is a fact
            about the basis that training happened to find.
        seed: Of the first; the others have the seeds that follow.

    Returns:
        The largest change of a number over the bases, relative to that number, and whether
        rounding explains it.

    Raises:
        DataError: if the metric gives no numbers, nan, or another shape from one basis to the next;
            if `bases` is less than one.
        UnsupportedModelError, InexactError: as `random_gauge`.

    Source:
        Ours: what is a fact about the function is the same in every basis of `random_gauge`.

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
        raise DataError("try at least one basis")
    dtype, precise = model.cfg.dtype, copy.deepcopy(model)
    precise.to(torch.float64, print_details=False)
    try:  # so that the rounding of a large number is no change of a small one
        expected = _numbers(metric(precise))
        model = precise
    except RuntimeError:  # a metric with tensors of its own in the model's dtype
        expected = _numbers(metric(model))
    worst: MeasuredError | None = None
    for index in range(bases):
        found = _numbers(metric(random_gauge(model, kind=kind, seed=seed + index)))
        if found.shape != expected.shape:
            raise DataError(
                f"the metric gave {list(expected.shape)}, then {list(found.shape)} numbers"
            )
        error = _change(found, expected, dtype)
        worst = error if worst is None or not error.relative <= worst.relative else worst
    assert worst is not None
    return GaugeReport(worst, bases, kind)


def _change(found: Tensor, expected: Tensor, dtype: torch.dtype) -> MeasuredError:
    """Each number against its own size: a large one would hide the change of a small one."""
    if found.isnan().any() or expected.isnan().any():
        raise DataError("the metric gave nan")
    if not found.is_floating_point():
        changed = (found != expected).any().item()
        return MeasuredError(float(changed), float(changed), torch.float64)
    found, expected = found.double(), expected.double()
    size = expected.abs()
    # Below this share of the largest, what is left of a number is rounding.
    floor = size.max() * TOLERANCE[dtype]
    change = (found - expected).abs()
    relative = torch.where(change == 0, 0.0, change / torch.maximum(size, floor))
    return MeasuredError(change.max().item(), relative.max().item(), dtype)


def _numbers(value: float | int | Tensor) -> Tensor:
    try:
        numbers = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError) as error:
        raise DataError(f"a metric gives numbers, not {value!r}") from error
    if numbers.numel() == 0:
        raise DataError("the metric gave no numbers")
    return numbers
