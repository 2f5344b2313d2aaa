"""Stretches of one token, again and again: rare in text, and what massive activations answer to."""

import random

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
    choose, length = random.Random(seed), tokens.shape[1]
    widths = [SHORTEST << n for n in range(length.bit_length()) if SHORTEST << n < length]
    if not widths or not share:
        return tokens
    tokens, found = tokens.clone(), tokens.flatten()
    for row in tokens:
        if choose.random() >= share:
            continue
        width = choose.choice(widths)
        at = choose.randrange(1, length - width + 1)
        picks = [choose.randrange(len(found)) for _ in range(choose.choice((1, 1, 2)))]
        row[at : at + width] = found[torch.tensor(picks)].repeat(width)[:width]
    return tokens
