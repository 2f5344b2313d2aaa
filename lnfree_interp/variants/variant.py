"""What a call of this room returns: a model of another architecture, and what became of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformer_lens import HookedTransformer

from lnfree_interp.models.agreement import compare_logits, require_same_logits
from lnfree_interp.models.sites import with_norm_sites
from lnfree_interp.numerics import MeasuredError


@dataclass(frozen=True)
class Variant:
    """A model of another architecture, made from a given one."""

    name: str
    """The architecture, e.g. `"NormFormer"`."""
    model: HookedTransformer
    """The new model; the given one is as it was."""
    same_function: bool
    """Whether it computes what the given model does, but for rounding; if so, that was checked."""
    steps: tuple[str, ...]
    """What was done, in order, in words."""
    error: MeasuredError
    """The largest logit difference from the given model, on random tokens."""
    d_model: tuple[int, int]
    """Width of the residual stream, before and after."""
    parameters: tuple[int, int]
    """Number of parameters, before and after."""

    def __str__(self) -> str:
        same = "the same function" if self.same_function else "another function: train it"
        lines = [
            f"{self.name}, {same}",
            *self.steps,
            f"d_model {self.d_model[0]} -> {self.d_model[1]}",
            f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,}",
            f"largest logit difference: {self.error}",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        same = "same function" if self.same_function else "another function"
        return f"Variant({self.name}, {same}, largest logit difference {self.error})"


def kept(
    name: str,
    before: HookedTransformer,
    after: HookedTransformer,
    steps: tuple[str, ...],
    parameters: int | None = None,
) -> Variant:
    """A variant that must be the same function.

    Args:
        name: The architecture.
        before: The given model.
        after: The new one.
        steps: What was done.
        parameters: How many the given model counts as. Default: all it has.

    Raises:
        InexactError: if its logits differ by more than rounding explains.
    """
    error = require_same_logits(after, before, f"{name} against the model before")
    widths = (before.cfg.d_model, after.cfg.d_model)
    counts = (_count(before) if parameters is None else parameters, _count(after))
    return Variant(name, after, True, steps, error, widths, counts)


def made(
    name: str,
    before: HookedTransformer,
    change: Callable[[HookedTransformer], tuple[str, ...]],
    *,
    same_function: bool,
) -> Variant:
    """A copy with norm sites that is changed in place.

    Args:
        name: The architecture.
        before: The given model.
        change: Changes the copy, and says how.
        same_function: Whether the change keeps the function; if so, that is checked.

    Raises:
        InexactError: if it should, and does not.
        UnsupportedModelError: for a model that can have no norm sites.
    """
    after = with_norm_sites(before)
    parameters = _count(after)  # a tied unembedding counts once, before and after
    with torch.no_grad():
        steps = change(after)
    if same_function:
        return kept(name, before, after, steps, parameters)
    error = compare_logits(after, before)
    widths = (before.cfg.d_model, after.cfg.d_model)
    return Variant(name, after, False, steps, error, widths, (parameters, _count(after)))


def _count(model: HookedTransformer) -> int:
    return sum(W.numel() for W in model.parameters())
