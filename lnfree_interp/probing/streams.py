"""The stream at the words of sentences: a row for each word, at several places at once."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lnfree_interp.analysis.targets import read_at
from lnfree_interp.analysis.trace import Trace
from lnfree_interp.analysis.view import View
from lnfree_interp.errors import DataError
from lnfree_interp.numerics import own_precision
from lnfree_interp.probing.sentences import WordTokens

POOLS = ("first", "mean", "last")
"""Which of a word's tokens is read: the first, the mean over all, the last."""


def require_pool(pool: str) -> str:
    """A way of pooling, checked.

    Raises:
        DataError: if there is no such way.
    """
    if pool not in POOLS:
        raise DataError(f"pool={pool!r}: give one of {list(POOLS)}")
    return pool


def pooled_positions(positions: range, pool: str) -> slice:
    """The positions of a word that are read; their mean, if there are several."""
    start, stop = positions.start, positions.stop
    return {
        "first": slice(start, start + 1),
        "last": slice(stop - 1, stop),
        "mean": slice(start, stop),
    }[pool]


def pooled(
    stream: Float[Tensor, "pos d_model"], positions: Sequence[range], pool: str
) -> Float[Tensor, "word d_model"]:
    """A row for each word, in float64 on the CPU."""
    wide = stream.cpu().double()
    return torch.stack([wide[pooled_positions(one, pool)].mean(0) for one in positions])


@own_precision
def read_words(
    view: View,
    aligned: Sequence[WordTokens],
    sites: Sequence[str],
    pool: str,
    batch: int,
    bar: Any,
) -> dict[str, Float[Tensor, "word d_model"]]:
    """The stream at each word of some sentences, by site, in float64 on the CPU.

    Args:
        view: The model.
        aligned: The sentences with the tokens of their words.
        sites: Places of the stream, or norms behind it, as `lf.Probe` takes them.
        pool: Which of a word's tokens is read.
        batch: How many sentences run at once.
        bar: A progress bar, which is moved on by one for each sentence.
    """
    places = {site: read_at(view, site) for site in sites}
    hooks = sorted({place.hook for place, _ in places.values()})
    stop = min(max(place.layer for place, _ in places.values()) + 1, view.n_layers)
    found: dict[str, list[Tensor | None]] = {site: [None] * len(aligned) for site in sites}
    # Sentences of about one length run together, so that few positions are filled up.
    order = sorted(range(len(aligned)), key=lambda i: len(aligned[i].tokens))
    batch = batch if view.cfg.attention_dir == "causal" else 1
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        rows = [torch.tensor(aligned[i].tokens, device=view.device) for i in some]
        _, streams = view.run(Trace(view, rows).tokens, hooks, stop=stop)
        for site, (place, norm) in places.items():
            stream = streams[place.hook]
            stream = stream if norm is None else view.through_norm(norm, stream)
            for row, i in enumerate(some):
                found[site][i] = pooled(stream[row], aligned[i].positions, pool)
        bar.update(len(some))
    return {
        site: torch.cat([one for one in rows if one is not None]) for site, rows in found.items()
    }
