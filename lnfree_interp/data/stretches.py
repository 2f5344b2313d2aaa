"""Stretches of tokens, rare in text, that a model without norms must bear all the same."""

import random
from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

SHORTEST = 8
"""Tokens of the shortest stretch."""


def with_repeats(
    tokens: Int[Tensor, "sequence pos"], share: float, seed: str
) -> Int[Tensor, "sequence pos"]:
    """Some sequences with a stretch in which one token, or two in turn, are repeated.

    A token that is preceded by copies of itself alone cannot be told from the first token of a
    prompt by attention, so that a model makes an outlier of it too. (arXiv 2503.08908)

    The tokens come from anywhere in the given text. A stretch begins behind position 0, and has
    `SHORTEST` tokens or twice, four times, ... as many, up to all.

    Args:
        tokens: Text; it is not changed. Sequences that are shorter than a stretch stay as they are.
        share: The probability that a sequence has a stretch.
        seed: Decides which, where and what.
    """
    choose, changed, found = random.Random(seed), tokens.clone(), tokens.flatten()
    for stretch in _stretches(changed, share, choose):
        picks = [choose.randrange(len(found)) for _ in range(choose.choice((1, 1, 2)))]
        stretch.copy_(found[torch.tensor(picks)].repeat(len(stretch))[: len(stretch)])
    return changed


def with_random_tokens(
    tokens: Int[Tensor, "sequence pos"], share: float, seed: str, d_vocab: int
) -> Int[Tensor, "sequence pos"]:
    """Some sequences with a stretch of tokens from the whole vocabulary, each as likely.

    Most of a vocabulary is rare in text. In every second stretch the tokens come again after a
    period, at most half of it: what followed last time is all that predicts them. Stretches
    are as in `with_repeats`.

    Args:
        tokens: Text; it is not changed.
        share: The probability that a sequence has a stretch.
        seed: Decides which, where and what.
        d_vocab: The size of the vocabulary.
    """
    choose, changed = random.Random(seed), tokens.clone()
    for stretch in _stretches(changed, share, choose):
        width = len(stretch)
        period = choose.choice((width, choose.randint(SHORTEST // 2, width // 2)))
        picks = torch.tensor([choose.randrange(d_vocab) for _ in range(period)])
        stretch.copy_(picks.repeat(-(-width // period))[:width])
    return changed


def _stretches(
    tokens: Int[Tensor, "sequence pos"], share: float, choose: random.Random
) -> Iterator[Int[Tensor, " width"]]:
    """A view of one stretch of each chosen sequence."""
    length = tokens.shape[1]
    widths = [SHORTEST << n for n in range(length.bit_length()) if SHORTEST << n < length]
    if not widths or not share:
        return
    for row in tokens:
        if choose.random() < share:
            width = choose.choice(widths)
            at = choose.randrange(1, length - width + 1)
            yield row[at : at + width]
