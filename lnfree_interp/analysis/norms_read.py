"""Which norms a question reads through.

Exactness is local: a question is exact on a model in which these norms are affine, whatever the
others do.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from lnfree_interp.analysis.asking import Analysis, analysis
from lnfree_interp.analysis.attribute import attribute
from lnfree_interp.analysis.targets import Target
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.analysis.view import LOGIT_CAP, SCORE_CAP, noting_reads
from lnfree_interp.errors import DataError
from lnfree_interp.models.site_names import NormSite

Question = Target | Callable[[Trace], Any]
"""A target, or a function that asks something of a trace."""

P = ParamSpec("P")
R = TypeVar("R")


def _noting(ask: Analysis[P, R]) -> Analysis[P, R]:
    """Note reads before there is a trace: norms inside sublayers are in the way of one."""

    @functools.wraps(ask)
    def asked(*args: Any, **kwargs: Any) -> Any:
        with noting_reads():
            return ask(*args, **kwargs)

    return asked


@_noting
@analysis
def norms_read(trace: Trace, of: Question) -> tuple[NormSite, ...]:
    """The norms that a question reads through: those that must be affine for an exact answer.

    Direct logit attribution reads through `ln_final` alone, the scores of a head through its own
    `ln1.qk` (and the norms on its queries and keys, in Qwen3), a neuron's input through its `ln2`;
    paths and flow read through the norms of all sublayers that they pass. Norms inside or behind
    sublayers (Gemma 2, Sub-LN) are read by every question: what attention and MLPs write is a sum
    over heads and neurons only once they are affine. `freeze_for` freezes what this lists.

    Args:
        trace: A trace; or a model and a prompt, as two arguments. The prompt only has to be long
            enough for the question's positions.
        of: A target, such as `lf.LogitDifference(...)`; or a function that asks a trace, such as
            `lambda trace: lf.expand_paths(trace, " Mary")`.

    Returns:
        The sites in the order of computation, live or not; none for a question that reads through
            no norm, and on a folded model those that it had.

    Raises:
        DataError: if `of` is neither, or the question cannot be asked of this prompt.

    Source:
        Ours.

    Examples:
        >>> lf.norms_read(model, "for i in", lf.Logit(" range"))
        (NormSite(kind='ln_final', layer=None),)
        >>> [str(site) for site in lf.norms_read(model, "for i in", lf.Neuron(2, 7))]
        ['blocks.2.ln2']
        >>> sites = lf.norms_read(model, "for i in", lambda trace: lf.flow_graph(trace, " range"))
        >>> len(sites), str(sites[0]), str(sites[-1])
        (9, 'blocks.0.ln1.v', 'ln_final')
    """
    if not (isinstance(of, Target) or callable(of)):
        raise DataError(
            f"{of!r:.60} is no question: give a target, such as lf.Logit(...), or a function of a "
            "trace, such as lambda trace: lf.expand_paths(trace, ...)"
        )
    with noting_reads() as noted:
        attribute(trace, of, "layer") if isinstance(of, Target) else of(trace)
    names = dict.fromkeys([*noted, *trace.view.inner_sites])
    sites = [NormSite.parse(name) for name in names if name not in (LOGIT_CAP, SCORE_CAP)]
    return tuple(sorted(sites, key=lambda site: site.order))
