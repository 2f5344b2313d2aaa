"""Sentences that fit into the context of the small models."""

import random

SITE = "blocks.1.hook_resid_post"
_WORDS = ["add", "self,", "for", "in", "other", "Range", "café", "10", "print", "x.", "def", "猫"]


def sentences(n, words=4):
    draw = random.Random(0)
    return [draw.sample(_WORDS, words) for _ in range(n)]
