"""What makes a function of a trace an analysis: a call that also takes a model and a prompt."""

import functools
from collections.abc import Callable
from typing import (
    Any,
    Concatenate,
    ParamSpec,
    Protocol,
    TypeVar,
    overload,
    runtime_checkable,
)

from lnfree_interp.analysis.prompts import Prompt
from lnfree_interp.analysis.trace import NotAffineError, Trace, trace
from lnfree_interp.analysis.view import Model
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import own_precision

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@runtime_checkable
class Analysis(Protocol[P, R_co]):
    """A call about a trace; or about a model and a prompt, from which it makes a trace."""

    @overload
    def __call__(self, trace: Trace, /, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(
        self, model: Model, prompt: Prompt, /, *args: P.args, **kwargs: P.kwargs
    ) -> R_co: ...


def analysis(ask: Callable[Concatenate[Trace, P], R]) -> Analysis[P, R]:
    """Let a call about a trace also take a model and a prompt, and compute without gradients in the
    model's own precision."""

    exact = own_precision(ask)

    @functools.wraps(ask)
    def asked(first: Any, *args: Any, **kwargs: Any) -> R:
        if not isinstance(first, Trace):
            if not args:
                raise DataError(
                    f"{ask.__name__} takes a trace, or a model and a prompt: give the prompt, or "
                    "lf.trace(model, prompt)"
                )
            prompt, *rest = args
            first, args = trace(first, prompt, keep="asked"), tuple(rest)
        try:
            return exact(first, *args, **kwargs)
        except NotAffineError:
            return first.refuse(lambda: exact(first, *args, **kwargs))

    return asked  # type: ignore[return-value]
